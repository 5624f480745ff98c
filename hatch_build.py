"""Leave extras out of published wheels where they need a checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OF_THE_PACKAGE = {"files"}  # extras that the package itself uses


class CheckoutExtras(BuildHookInterface):  # type: ignore[type-arg]
    """Drop the other optional dependencies from every wheel but an editable one.

    They install what `experiments`, `tests` and `docs` need, and a wheel has none of those folders.
    In a checkout, `pip install -e ".[experiments]"` finds them as usual.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Change the metadata before the wheel is written."""
        extras = self.metadata.core.optional_dependencies
        if version == "standard":
            for name in extras.keys() - OF_THE_PACKAGE:
                del extras[name]

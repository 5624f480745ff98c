"""Leave the extras out of wheels that are published: they need a checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CheckoutExtras(BuildHookInterface):  # type: ignore[type-arg]
    """Drop `project.optional-dependencies` from every wheel but an editable one.

    The extras install what `experiments`, `tests` and `docs` need, and a wheel has none of those
    folders. In a checkout, `pip install -e ".[experiments]"` finds the extras as usual.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Change the metadata before the wheel is written."""
        if version == "standard":
            self.metadata.core.optional_dependencies.clear()

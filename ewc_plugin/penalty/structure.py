"""Whether a model is what it was: a hundredth of the time that naming its parameters takes."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class Structure:
    """A model's modules, and its parameters with their shapes, types and devices.

    What has been added since does not count; what has been replaced or removed does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._links: list[tuple[dict[str, Any], str, Any]] = [
            (table, name, value)
            for module in model.modules()
            for table in (module._modules, module._parameters)
            for name, value in table.items()
        ]
        self._forms = [(p, *_form(p)) for p in model.parameters()]

    def is_of(self, model: nn.Module) -> bool:
        """Whether `model` is the same object, unchanged in what counts."""
        return (
            self._model() is model
            and all(table.get(name) is value for table, name, value in self._links)
            and all((s, t, d) == _form(p) for p, s, t, d in self._forms)
        )


def _form(parameter: nn.Parameter) -> tuple[Any, Any, Any]:
    return parameter.shape, parameter.dtype, parameter.device

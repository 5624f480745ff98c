"""Parameters by names that survive wrappers, and whether a model still has the same ones."""

import weakref
from typing import Any

import torch  # noqa: F401  (the doctest compiles a model)
from torch import nn

_WRAPPER_SEGMENTS = (["module"], ["_orig_mod"])  # data parallel and the like; torch.compile


def canonical_names(model: nn.Module) -> dict[str, str]:
    """`model.named_parameters()` names -> the same names without the segments of wrappers.

    A wrapper is a module without parameters of its own whose only child is called `module` or
    `_orig_mod`. Names stay distinct: a wrapper has nothing else that its child's could clash with.

    Args:
        model: Wrapped as a whole, in parts, several times or not at all.

    Returns:
        One entry per parameter.

    Example:
        >>> canonical_names(nn.Sequential(torch.compile(nn.Linear(1, 1, bias=False))))
        {'0._orig_mod.weight': '0.weight'}
    """
    wrappers = {path for path, module in model.named_modules() if _is_wrapper(module)}
    names = [name for name, _ in model.named_parameters()]
    if not wrappers:
        return {name: name for name in names}
    return {name: _without(wrappers, name) for name in names}


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of `model`, trainable or not, by canonical name."""
    names = canonical_names(model)
    return {names[name]: parameter for name, parameter in model.named_parameters()}


def _is_wrapper(module: nn.Module) -> bool:
    return not module._parameters and list(module._modules) in _WRAPPER_SEGMENTS


def _without(wrappers: set[str], name: str) -> str:
    segments = name.split(".")
    paths = [".".join(segments[:i]) for i in range(len(segments))]  # the owner of each segment
    return ".".join(s for s, owner in zip(segments, paths, strict=True) if owner not in wrappers)


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

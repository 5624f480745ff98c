"""Parameter names without wrapper prefixes, and a fast test for a changed model."""

import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_WRAPPER_NAMES = (["module"], ["_orig_mod"])  # data parallel and the like; torch.compile


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Map names of `model.named_parameters()` to names without the parts that wrappers add.

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
    return by_canonical_name(model, dict(model.named_parameters()))


def by_canonical_name(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """Replace the names of `model.named_parameters()` by canonical ones; leave others alone."""
    names = canonical_names(model)
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def checked_fisher(model: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map F to canonical names and check that it fits the model.

    Args:
        model: The one that F was computed on.
        fisher: F by parameter name.

    Returns:
        The same tensors, by canonical name and without a graph.

    Raises:
        ValueError: A name or shape is not the model's, F is not real, finite and >= 0, or it or its
            parameter is on the meta device.
    """
    parameters = canonical_parameters(model)
    checked = {}
    for name, tensor in by_canonical_name(model, fisher).items():
        if name not in parameters:
            raise ValueError(f"`fisher` has {name!r}; the model has {sorted(parameters)}.")
        if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.layout != torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else tensor
            raise ValueError(f"`fisher[{name!r}]` must be a dense tensor of real numbers: {kind}.")
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"`fisher[{name!r}]` is {tuple(tensor.shape)}, the parameter "
                f"{tuple(parameters[name].shape)}: compute it on this model."
            )
        check_has_values(f"`fisher[{name!r}]`", tensor)
        check_has_values(f"The model's `{name}`", parameters[name])
        if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise ValueError(
                f"`fisher[{name!r}]` must be finite and >= 0, got {float(tensor.min())} to "
                f"{float(tensor.max())}: did the training diverge?"
            )
        checked[name] = tensor.detach()
    return checked


def check_has_values(what: str, tensor: Tensor) -> None:
    """Raise a ValueError if not all values of a tensor, named `what` in it, are here and dense."""
    if tensor.is_meta:
        raise ValueError(
            f"{what} is on the meta device and has no values: load the weights first "
            "(`model.to_empty(device=...)`, then `load_state_dict`)."
        )
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{what} is a {type(tensor).__name__}, split over processes, as FSDP does: use "
            "`DistributedDataParallel`, or a model that is whole."
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} is sparse ({tensor.layout}): make it dense, `.to_dense()`.")


def _is_wrapper(module: nn.Module) -> bool:
    children = [name for name, _ in module.named_children()]
    return children in _WRAPPER_NAMES and not any(True for _ in module.parameters(recurse=False))


def _without(wrappers: set[str], name: str) -> str:
    segments = name.split(".")
    paths = [".".join(segments[:i]) for i in range(len(segments))]  # the owner of each segment
    return ".".join(s for s, owner in zip(segments, paths, strict=True) if owner not in wrappers)


class ModelFingerprint:
    """Cheap test that a model still has the same modules and parameters.

    About 100 times faster than `named_parameters()`, so that it can run in every step. It notices
    modules and parameters that were replaced or removed and parameters of another shape, type or
    device, but not modules that were added. A TorchScript model, whose tables of parameters are
    new objects at each access, never matches.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._is_scripted = any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
        self._entries: list[tuple[dict[str, Any], str, Any]] = [
            (table, name, value)
            for module in model.modules()
            for table in (module._modules, module._parameters)
            for name, value in table.items()
        ]
        self._properties = [(p, *_properties(p)) for p in model.parameters()]

    def matches(self, model: nn.Module) -> bool:
        """Whether `model` is the same object with the same modules and parameters."""
        return (
            self._model() is model
            and not self._is_scripted
            and all(table.get(name) is value for table, name, value in self._entries)
            and all((s, t, d) == _properties(p) for p, s, t, d in self._properties)
        )


def _properties(parameter: nn.Parameter) -> tuple[Any, Any, Any]:
    return parameter.shape, parameter.dtype, parameter.device

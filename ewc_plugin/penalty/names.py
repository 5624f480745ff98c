"""Parameter names that survive wrappers: what is remembered under one is found under another."""

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

"""A tensor that is broadcast against the batch: scaled, added, concatenated, expanded."""

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import LayerCall, LayerRule, Layout, Sums

_NAMES = (
    *("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide"),
    *("pow", "maximum", "minimum", "fmax", "fmin", "where", "addcmul", "addcdiv", "lerp"),
    *("__radd__", "__rsub__", "__rmul__", "__rdiv__", "__rtruediv__", "__rpow__"),
    *("__add__", "__sub__", "__mul__", "__truediv__", "__pow__"),
)
_IN_PLACE = (
    *(f"{name}_" for name in _NAMES),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"),
)
# Functions whose tensor arguments are broadcast against each other and met entry by entry.
ELEMENTWISE = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in (*_NAMES, *_IN_PLACE)
    if hasattr(owner, name)
}


class Broadcast(LayerRule):
    """out = value.expand(shape), for whatever reads out.

    The gradient at the expanded value, summed over the axes that were broadcast except that of the
    samples, is the per-sample gradient of the value.
    """

    def bind(self, value: Tensor, expanded: Tensor) -> LayerCall:
        """The value, and the value expanded."""
        return LayerCall(expanded, {"value": value})

    def fits(self, call: LayerCall, layout: Layout) -> bool:
        """The value has no entries of its own for each sample."""
        return _aligned(call)[layout.dim] == 1

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """Sums of g [N, K, ...] over the broadcast axes, in the value's shape."""
        shape = list(_aligned(call))
        del shape[call.sample_dim]
        value = call.params["value"]
        assert value is not None
        axes = [1, *(i for i, size in enumerate(shape, 2) if size == 1)]
        return {call.names["value"]: g.sum(axes).reshape(len(g), *value.shape)}


def _aligned(call: LayerCall) -> tuple[int, ...]:
    """Shape of the value, with an axis for each of the expanded one."""
    value = call.params["value"]
    assert value is not None
    return (*(1,) * (call.a.dim() - value.dim()), *value.shape)

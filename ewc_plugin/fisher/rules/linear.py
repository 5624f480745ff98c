"""`F.linear`, on [N, I] and on sequences [N, T, I]."""

import torch.nn.functional as F
from torch import Tensor

from ewc_plugin.fisher.rules.base import LayerCall, LayerRule, Sums
from ewc_plugin.fisher.rules.products import add_product_squares

_SQUARED = 2**17  # entries


def _bind(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    return LayerCall(input, {"weight": weight, "bias": bias})


def _one_position(call: LayerCall, g: Tensor) -> bool:
    """Whether each sample has one row: then g a^T has rank one and its square factorises."""
    return g.numel() == len(g) * g.size(-1)


def _pool(call: LayerCall, a: Tensor, g2: Tensor, into: Sums) -> None:
    """F_W += (sum_s g_s^2)^T a^2; F_b += sum_n sum_s g_s^2."""
    a, g2 = a.reshape(len(a), -1), g2.reshape(len(g2), -1)
    if name := call.names.get("weight"):
        rows = max(1, _SQUARED // a.size(1))  # at a time, whose squares stay in the cache
        for a_part, g2_part in zip(a.split(rows), g2.split(rows), strict=True):
            into[name].addmm_(g2_part.T, a_part.square())
    if name := call.names.get("bias"):
        into[name].add_(g2.sum(0))


def _add(call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
    """F_W += sum_n (sum_t g_nt a_nt^T)^2; F_b += sum_n (sum_t g_nt)^2."""
    a, g = a.reshape(len(a), -1, a.size(-1)), g.reshape(len(g), -1, g.size(-1))  # [N, T, ...]
    if name := call.names.get("weight"):
        add_product_squares(g, a, into[name])
    if name := call.names.get("bias"):
        into[name].add_(g.sum(1).square_().sum(0))


LINEAR = LayerRule("linear", F.linear, _bind, _add, _pool, _one_position)

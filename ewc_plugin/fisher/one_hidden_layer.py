"""Many score vectors at once, where the logits are a linear read-out of elementwise activations.

With logits W phi(z) and score vectors v_s, the gradient at z is phi'(z) * (W^T v_s). What the rule
of the layer behind z needs is its square summed over s, and that is phi'(z)^2 * diag(W^T A W) with
A = sum_s v_s v_s^T [C, C] per sample: one matrix product over the pairs of classes, instead of a
backward pass for each of the C - 1 vectors of the exact Fisher.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.linear import LINEAR
from ewc_plugin.fisher.rules.products import n_pairs, pairs
from ewc_plugin.fisher.scores import Scores
from ewc_plugin.fisher.tracing.layer_calls import Record, Trace

_PAIRS_ENTRIES = 2**22  # of the products of two scores and two weights: above it, one by one
# Backward nodes of functions that act on each entry alone. All their inputs but one are constants.
_ELEMENTWISE = {
    f"{name}Backward0"
    for name in (
        *("Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Hardtanh", "Hardswish", "Softplus"),
        *("Tanh", "Sigmoid", "LogSigmoid", "Threshold", "Hardsigmoid", "View", "UnsafeView"),
    )
}


@dataclass
class Readout:
    """The two calls of a network with one hidden layer.

    Attributes:
        hidden: Gives z [N, H]; its rule pools.
        last: F.linear of h = phi(z); its output are the logits.
    """

    hidden: Record
    last: Record

    def add(self, trace: Trace, vectors: Tensor) -> None:
        """Fills the pools of both records.

        Args:
            trace: Of the forward pass that made the records.
            vectors: v [N, S, C].
        """
        weight, receive, h = self.last.call.params["weight"], self.last.receive, self.last.call.a
        assert weight is not None and receive is not None
        trace.pull_back(h, torch.ones_like(h), retain_graph=False)
        assert self.hidden.g2 is not None  # phi'(z)^2
        for v in vectors.unbind(1):
            receive(self.last, v)
        squares = pooled_squares(vectors, weight.detach())
        self.hidden.g2.mul_(squares.view_as(self.hidden.g2))


def find_readout(trace: Trace, logits: Tensor, scores: Scores) -> Readout | None:
    """The read-out of a network that is nothing but a hidden layer and one, if it pays.

    Args:
        trace: What the forward pass recorded.
        logits: What it returned, [N, C].
        scores: To be pulled back.

    Returns:
        None where the layers are others, where anything but elementwise functions lies between
        them, or where one backward pass per vector is cheaper.
    """
    N, C = logits.shape
    if len(trace.records) != 2 or scores.count < 2 or n_pairs(C) > scores.count * C:
        return None
    hidden, last = trace.records
    h, weight = last.call.a, last.call.params.get("weight")
    wide = logits.dtype in (torch.float32, torch.float64) and h.dtype == logits.dtype
    rows = h.dim() == 2 and hidden.out_shape == h.shape
    if not (wide and rows and hidden.rule is LINEAR and last.rule is LINEAR and weight is not None):
        return None
    if logits._backward_hooks or h._backward_hooks:  # they expect every vector
        return None
    if (N + h.size(1)) * n_pairs(C) > _PAIRS_ENTRIES or _record_of(logits.grad_fn) is not last:
        return None
    node = h.grad_fn
    while node is not None and node.name() in _ELEMENTWISE:
        node = node.next_functions[0][0]
    return Readout(hidden, last) if _record_of(node) is hidden else None


def _record_of(node: Any) -> Any:
    return getattr(node, "record", None)


def pooled_squares(vectors: Tensor, weight: Tensor) -> Tensor:
    """sum_s (W^T v_ns)^2, as one product over the pairs of classes.

    Args:
        vectors: v [N, S, C].
        weight: W [C, H].

    Returns:
        [N, H].

    Example:
        >>> v, W = torch.randn(2, 3, 4).double(), torch.randn(4, 5).double()
        >>> torch.allclose(pooled_squares(v, W), (v @ W).square().sum(1))
        True
    """
    t, u, twice = pairs(weight)
    a = torch.bmm(vectors.transpose(1, 2), vectors)[:, t, u].mul_(twice)
    return (a @ (weight[t] * weight[u])).clamp_(min=0.0)  # rounding alone makes it negative

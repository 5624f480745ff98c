"""Layer rules of `F.embedding` and `F.prelu`."""

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import JoinsCalls, LayerCall, LayerRule, Sums, channel_sums


class Embedding(LayerRule, JoinsCalls):
    """Rows of a table, picked by an index per position; `options` is the padding word, or None."""

    def bind(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> LayerCall | None:
        """The arguments of `F.embedding`."""
        if max_norm is not None or scale_grad_by_freq:
            return None  # max_norm changes the weight, scale_grad_by_freq its gradient
        if padding_idx is not None and padding_idx < 0:
            padding_idx += len(weight)
        return LayerCall(input, {"weight": weight}, padding_idx)

    def rows(self, call: LayerCall, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [N, T] and gradients [N, T, D]."""
        return a.reshape(len(a), -1), g.reshape(len(g), -1, g.size(-1))

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """Row v: the sum of g_nt over the positions t that hold v."""
        weight = call.params["weight"]
        assert weight is not None
        index, g = self.rows(call, a, g)
        gradients = g.new_zeros(len(g), *weight.shape)
        first = torch.arange(len(g), device=g.device)[:, None] * len(weight)
        gradients.flatten(0, 1).index_add_(0, (first + index).flatten(), g.flatten(0, 1))
        if call.options is not None:
            gradients[:, call.options] = 0  # the padding word has no gradient
        return {call.names["weight"]: gradients}

    def add(self, call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
        """F[v] += sum_n (sum of g_nt over the positions t that hold v)^2."""
        F_weight = into[call.names["weight"]]
        index = a.reshape(len(a), -1)  # [N, T]
        sample = torch.arange(len(a), device=a.device)[:, None]
        pairs, inverse = (sample * len(F_weight) + index).unique(return_inverse=True)
        rows = g.new_zeros(len(pairs), g.size(-1))  # one per sample and word in it
        rows.index_add_(0, inverse.flatten(), g.reshape(-1, g.size(-1)))
        word = pairs % len(F_weight)
        if call.options is not None:
            rows[word == call.options] = 0  # the padding word has no gradient
        F_weight.index_add_(0, word, rows.square_())


class PReLU(LayerRule):
    """out = max(a, 0) + weight * min(a, 0)."""

    def bind(self, input: Tensor, weight: Tensor) -> LayerCall:
        """The arguments of `F.prelu`."""
        return LayerCall(input, {"weight": weight})

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """sum_t g_nt min(a_nt, 0), per channel where the weight has channels."""
        weight = call.params["weight"]
        assert weight is not None
        products = a.clamp(max=0).mul_(g)  # [N, K, C, ...]
        if weight.numel() == 1:
            sums = products.flatten(1).sum(1, keepdim=True)
        else:
            sums = channel_sums(products)
        return {call.names["weight"]: sums.view(len(g), *weight.shape)}

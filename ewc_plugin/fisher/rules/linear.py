"""`F.linear`, on [N, I] and on sequences [N, T, I]."""

from torch import Tensor

from ewc_plugin.fisher.rules.base import LayerCall, LayerRule, Sums, TakesSquares
from ewc_plugin.fisher.rules.products import add_product_squares

_SQUARED = 2**17  # entries of the input whose squares stay in the cache


class Linear(LayerRule, TakesSquares):
    """out_t = W a_t + b at every position t of a sample."""

    def bind(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
        """The arguments of `F.linear`."""
        return LayerCall(input, {"weight": weight, "bias": bias})

    def add(self, call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
        """F_W += sum_n (sum_t g_nt a_nt^T)^2; F_b += sum_n (sum_t g_nt)^2."""
        a, g = a.reshape(len(a), -1, a.size(-1)), g.reshape(len(g), -1, g.size(-1))  # [N, T, ...]
        if name := call.names.get("weight"):
            add_product_squares(g, a, into[name])
        if name := call.names.get("bias"):
            into[name].add_(g.sum(1).square_().sum(0))

    def takes_squares(self, call: LayerCall, g: Tensor) -> bool:
        """With one position per sample g a^T has rank one, so its square factorises."""
        return g.numel() == len(g) * g.size(-1)

    def add_squares(self, call: LayerCall, a: Tensor, g2: Tensor, into: Sums) -> None:
        """F_W += (sum_s g_s^2)^T a^2; F_b += sum_n sum_s g_s^2."""
        a, g2 = a.reshape(len(a), -1), g2.reshape(len(g2), -1)
        if name := call.names.get("weight"):
            rows = max(1, _SQUARED // a.size(1))
            for a_part, g2_part in zip(a.split(rows), g2.split(rows), strict=True):
                into[name].addmm_(g2_part.T, a_part.square())
        if name := call.names.get("bias"):
            into[name].add_(g2.sum(0))

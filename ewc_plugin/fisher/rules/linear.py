"""Products with a matrix: `F.linear`, `torch.matmul` and `torch.addmm`, on rows and sequences."""

import math

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import JoinsCalls, LayerCall, LayerRule, Sums, TakesSquares
from ewc_plugin.fisher.rules.products import add_product_squares

_SQUARED = 2**17  # largest input whose squares fit the cache, in entries


class Linear(LayerRule, TakesSquares, JoinsCalls):
    """Rule of `F.linear`: out_t = W a_t + b at every position t of a sample."""

    def bind(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall | None:
        """The arguments of `F.linear`."""
        if weight.dim() != 2:
            return None
        return LayerCall(input, {"weight": weight, "bias": bias})

    def factors(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right factor of the weight's gradient, sum_t left_t right_t^T."""
        return g, a

    def rows(self, call: LayerCall, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [N, T, I] and gradients [N, T, O]."""
        T = math.prod(a.shape[1:-1])
        a = a.reshape(len(a), T, a.size(-1))
        return a, g.reshape(len(g), T, g.numel() // max(1, len(g) * T))

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """Of the weight sum_t g_nt a_nt^T, of the bias sum_t g_nt."""
        a, g = self.rows(call, a, g)
        gradients = {}
        if name := call.names.get("weight"):
            left, right = self.factors(a, g)
            weight = call.params["weight"]
            assert weight is not None
            gradients[name] = torch.bmm(left.transpose(1, 2), right).view(len(g), *weight.shape)
        if name := call.names.get("bias"):
            gradients[name] = g.sum(1)
        return gradients

    def add(self, call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
        """F_W += sum_n (sum_t g_nt a_nt^T)^2; F_b += sum_n (sum_t g_nt)^2."""
        a, g = self.rows(call, a, g)
        if name := call.names.get("weight"):
            left, right = self.factors(a, g)
            add_product_squares(left, right, _matrix(into[name]))
        if name := call.names.get("bias"):
            into[name].add_(g.sum(1).square_().sum(0))

    def takes_squares(self, call: LayerCall, g: Tensor) -> bool:
        """With one position per sample g a^T has rank one, so its square factorises."""
        return call.a.numel() == len(g) * call.a.size(-1)

    def add_squares(self, call: LayerCall, a: Tensor, g2: Tensor, into: Sums) -> None:
        """F_W += (sum_s g_s^2)^T a^2; F_b += sum_n sum_s g_s^2."""
        a, g2 = _rows(a), _rows(g2)
        if name := call.names.get("weight"):
            rows = max(1, _SQUARED // max(1, a.size(1)))
            for a_part, g2_part in zip(a.split(rows), g2.split(rows), strict=True):
                left, right = self.factors(a_part.square(), g2_part)
                _matrix(into[name]).addmm_(left.T, right)
        if name := call.names.get("bias"):
            into[name].add_(g2.sum(0))


def _rows(t: Tensor) -> Tensor:
    """[N, ...] as [N, K], where K may be 0."""
    return t.reshape(len(t), math.prod(t.shape[1:]))


class Matmul(Linear):
    """out_t = a_t W, with W [I, O] or a vector [I]."""

    def bind(self, input: Tensor, other: Tensor) -> LayerCall | None:  # type: ignore[override]
        """The arguments of `torch.matmul`, where the second is a parameter's matrix or vector."""
        if input.dim() < 1 or other.dim() not in (1, 2):
            return None
        return LayerCall(input, {"weight": other})

    def factors(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """As for `Linear`, of the transposed weight."""
        return a, g


class Addmm(Matmul):
    """out = b + a W, as GPT-2's `Conv1D` has it."""

    def bind(  # type: ignore[override]
        self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> LayerCall | None:
        """The arguments of `torch.addmm`; None where it scales or its bias is no vector."""
        if beta != 1 or alpha != 1 or input.dim() != 1:
            return None
        return LayerCall(mat1, {"weight": mat2, "bias": input})


def _matrix(sums: Tensor) -> Tensor:
    """A vector's sums as a matrix of one column, of the same memory."""
    return sums if sums.dim() == 2 else sums[:, None]

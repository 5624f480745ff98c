"""Value and gradient of the folded penalty: through autograd, or straight into `.grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ewc_plugin.quadratic import Quadratic, compute_dtype

Pair = tuple[nn.Parameter, Quadratic]

BLOCK = 1 << 18  # elements at a time on a CPU: intermediate results stay in its cache


class PenaltyFunction(torch.autograd.Function):
    """Computes value and gradient in one go; autograd's own graph would take several times as long.

    `forward` takes the quadratics and then their parameters; it leaves the constants out.
    """

    @staticmethod
    def forward(ctx: Any, quadratics: list[Quadratic], *thetas: Tensor) -> Tensor:
        """The value sum d (S d + 2 B)."""
        value, ctx.half_gradients = value_and_half_gradients(list(thetas), quadratics)
        ctx.dtypes = [t.dtype for t in thetas]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """2 (S d + B) for each parameter."""
        gradients = torch._foreach_mul(ctx.half_gradients, 2 * grad_output)
        return (None, *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)))


def value_and_half_gradients(
    thetas: list[Tensor], quadratics: list[Quadratic]
) -> tuple[Tensor, list[Tensor]]:
    """The value sum d (S d + 2 B), without the constants, and S d + B for each parameter."""
    loaded = [q.loaded(t) for t, q in zip(thetas, quadratics, strict=True)]
    d = torch._foreach_sub([t.detach() for t in thetas], [a for _, _, a in loaded])
    halves = torch._foreach_mul(d, [S for S, _, _ in loaded])
    offsets = [(i, B) for i, (_, B, _) in enumerate(loaded) if B is not None]
    values = []
    if offsets:
        torch._foreach_add_([halves[i] for i, _ in offsets], [B for _, B in offsets])
        values = [torch.dot(d[i].flatten(), B.flatten()) for i, B in offsets]
    values += [torch.dot(x.flatten(), y.flatten()) for x, y in zip(d, halves, strict=True)]
    return torch.stack(values).sum(), list(halves)


class GradientAdder:
    """Adds scale * gradient to `.grad` in blocks that fit a CPU's cache, and sums the value up."""

    def __init__(self) -> None:
        self._scratch: Tensor | None = None  # [3, BLOCK]: a new one in every step costs page faults

    def __call__(self, pairs: list[Pair], scale: float) -> Tensor:
        """Adds to the gradients; returns sum d (S d + 2 B), without the constants."""
        values = []
        for parameter, quadratic in pairs:
            if _has_flat_views(parameter, quadratic):
                values += self._add_blocks(parameter, quadratic, scale)
            else:
                values.append(_add_whole(parameter, quadratic, scale))
        return torch.stack(values).sum()

    def _add_blocks(self, parameter: nn.Parameter, q: Quadratic, scale: float) -> list[Tensor]:
        if self._scratch is None or self._scratch.dtype != parameter.dtype:
            self._scratch = torch.empty(3, BLOCK, dtype=parameter.dtype)
        assert parameter.grad is not None
        columns = [parameter.detach(), parameter.grad, q.fisher, q.anchor]
        if q.offset is not None:
            columns.append(q.offset)
        values = []
        for theta, grad, S, anchor, *rest in zip(
            *(c.view(-1).split(BLOCK) for c in columns), strict=True
        ):
            d, half, total = self._scratch[:, : len(theta)].unbind()
            torch.sub(theta, anchor, out=d)
            if rest:
                torch.addcmul(rest[0], S, d, out=half)
                torch.add(half, rest[0], out=total)
            else:
                torch.mul(S, d, out=half)
                total = half
            grad.add_(half, alpha=2 * scale)
            values.append(d.mul_(total).sum())  # faster than torch.dot
        return values


def _has_flat_views(parameter: nn.Parameter, q: Quadratic) -> bool:
    grad = parameter.grad
    if (
        not parameter.requires_grad
        or grad is None
        or grad.layout is not torch.strided
        or parameter.device.type != "cpu"
    ):
        return False
    tensors = [parameter, grad, *q.tensors]
    return all(
        t.is_contiguous() and t.device == parameter.device and t.dtype == compute_dtype(parameter)
        for t in tensors
    )


def _add_whole(parameter: nn.Parameter, q: Quadratic, scale: float) -> Tensor:
    value, (half,) = value_and_half_gradients([parameter], [q])
    if not parameter.requires_grad or (parameter.grad is None and q.is_at_rest(parameter)):
        return value
    gradient = half.mul_(2 * scale).to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return value

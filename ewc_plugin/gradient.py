"""Value and gradient of the folded penalty: through autograd, or straight into `.grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ewc_plugin.quadratic import Quadratic, compute_dtype

Pair = tuple[nn.Parameter, Quadratic]

BLOCK = 1 << 19  # elements at a time on a CPU: intermediate results stay in its cache
SMALL = 1 << 16  # elements below which an operation takes less time than calling it


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
    """Adds scale * gradient to `.grad` and sums the value up.

    Large tensors go in blocks that fit a CPU's cache, through memory that is kept: a new one in
    every step costs page faults. The others go together, so that each operation is called once.
    """

    def __init__(self) -> None:
        self._scratch: Tensor | None = None  # [3, BLOCK]

    def __call__(self, pairs: list[Pair], scale: float) -> Tensor:
        """Adds to the gradients; returns sum d (S d + 2 B), without the constants."""
        large = [pair for pair in pairs if _goes_in_blocks(*pair)]
        others = [pair for pair in pairs if not _goes_in_blocks(*pair)] if large else pairs
        values = [v for parameter, q in large for v in self._add_blocks(parameter, q, scale)]
        if others:
            values.append(_add_together(others, scale))
        return torch.stack(values).sum() if len(values) > 1 else values[0]

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


def _goes_in_blocks(parameter: nn.Parameter, q: Quadratic) -> bool:
    grad = parameter.grad
    if parameter.numel() <= SMALL or parameter.device.type != "cpu":
        return False
    if not parameter.requires_grad or grad is None or grad.layout is not torch.strided:
        return False
    return all(
        t.is_contiguous() and t.device == parameter.device and t.dtype == compute_dtype(parameter)
        for t in (parameter, grad, *q.tensors)
    )


def _add_together(pairs: list[Pair], scale: float) -> Tensor:
    value, halves = value_and_half_gradients([p for p, _ in pairs], [q for _, q in pairs])
    added = []
    for (parameter, q), half in zip(pairs, halves, strict=True):
        if not parameter.requires_grad or (parameter.grad is None and q.is_at_rest(parameter)):
            continue
        if parameter.grad is not None and parameter.grad.layout is torch.strided:
            added.append((parameter.grad, half))
            continue
        gradient = half.mul_(2 * scale).to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    if added:
        torch._foreach_add_([g for g, _ in added], [h for _, h in added], alpha=2 * scale)
    return value

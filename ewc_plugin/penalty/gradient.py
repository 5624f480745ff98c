"""Value and gradient of the folded penalty: through autograd, or straight into `.grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ewc_plugin.penalty.quadratic import Quadratic, compute_dtype

Pair = tuple[nn.Parameter, Quadratic]

BLOCK = 1 << 19  # elements at a time on a CPU: intermediate results stay in its cache


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

    What limits it is memory traffic and, for small parameters, the calls. So large parameters go in
    blocks that fit a CPU's cache, small ones side by side in memory of their own, both through
    scratch memory that is kept: a new one in every step costs page faults.
    """

    def __init__(self) -> None:
        self._pairs: list[Pair] = []
        self._sides: list[SideBySide] = []
        self._large: list[Pair] = []
        self._others: list[Pair] = []
        self._scratch = torch.empty(0)  # [2, BLOCK]

    def __call__(self, pairs: list[Pair], scale: float) -> Tensor:
        """Adds to the gradients; returns sum d (S d + 2 B), without the constants."""
        if pairs is not self._pairs or not all(side.is_current for side in self._sides):
            self._arrange(pairs)
        values: list[Tensor] = []
        for side in self._sides:
            value, halves = side()
            _add(side.pairs, halves, scale)
            values.append(value)
        others = list(self._others)
        for parameter, q in self._large:
            if _goes_in_blocks(parameter, q):
                values += self._add_blocks(parameter, q, scale)
            else:
                others.append((parameter, q))
        if others:
            value, halves = value_and_half_gradients([p for p, _ in others], [q for _, q in others])
            _add(others, halves, scale)
            values.append(value)
        return torch.stack(values).sum() if len(values) > 1 else values[0]

    def _arrange(self, pairs: list[Pair]) -> None:
        self._pairs, self._large, self._others = pairs, [], []
        groups: dict[torch.dtype, list[list[Pair]]] = {}
        for pair in pairs:
            parameter = pair[0]
            if not _is_plain(*pair):
                self._others.append(pair)
            elif parameter.numel() > BLOCK // 2:
                self._large.append(pair)
            else:
                rooms = groups.setdefault(parameter.dtype, [[]])
                if sum(p.numel() for p, _ in rooms[-1]) + parameter.numel() > BLOCK:
                    rooms.append([])
                rooms[-1].append(pair)
        self._sides = [SideBySide(room) for rooms in groups.values() for room in rooms]

    def _add_blocks(self, parameter: nn.Parameter, q: Quadratic, scale: float) -> list[Tensor]:
        if self._scratch.dtype != parameter.dtype or not len(self._scratch):
            self._scratch = torch.empty(2, BLOCK, dtype=parameter.dtype)
        assert parameter.grad is not None
        columns = [parameter.detach(), parameter.grad, q.fisher, q.anchor]
        if q.offset is not None:
            columns.append(q.offset)
        values = []
        for theta, grad, S, anchor, *rest in zip(
            *(c.view(-1).split(BLOCK) for c in columns), strict=True
        ):
            d, half = self._scratch[:, : len(theta)].unbind()
            torch.sub(theta, anchor, out=d)
            if rest:
                torch.addcmul(rest[0], S, d, out=half)
                grad.add_(half, alpha=2 * scale)
                values += [torch.dot(d, half), torch.dot(d, rest[0])]
            else:
                grad.addcmul_(S, d, value=2 * scale)
                values.append(torch.dot(S, d.square_()))
        return values


class SideBySide:
    """Parameters whose S, B and anchors lie side by side, so that an operation is called once.

    The quadratics' own tensors become views of that memory.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        quadratics = [q for _, q in pairs]
        self._fisher = torch.cat([q.fisher.view(-1) for q in quadratics])
        self._anchor = torch.cat([q.anchor.view(-1) for q in quadratics])
        self._offset: Tensor | None = None
        if any(q.offset is not None for q in quadratics):
            offsets = [
                torch.zeros_like(q.fisher) if q.offset is None else q.offset for q in quadratics
            ]
            self._offset = torch.cat([B.view(-1) for B in offsets])
        for i, q in enumerate(quadratics):
            q.fisher, q.anchor = self._views(self._fisher)[i], self._views(self._anchor)[i]
            if self._offset is not None and q.offset is not None:
                q.offset = self._views(self._offset)[i]
        self._d, self._half = torch.empty(2, len(self._fisher), dtype=self._fisher.dtype)
        self._d_views, self._half_views = self._views(self._d), self._views(self._half)
        self._state = self._tensors()

    @property
    def is_current(self) -> bool:
        """Whether the quadratics are what they were when they were put here."""
        return all(a is b for a, b in zip(self._state, self._tensors(), strict=True))

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        """The value sum d (S d + 2 B), and S d + B for each parameter until the next call."""
        torch._foreach_copy_(self._d_views, [p for p, _ in self.pairs])
        d, half, offset = self._d.sub_(self._anchor), self._half, self._offset
        if offset is None:
            torch.mul(self._fisher, d, out=half)
            return torch.dot(d, half), self._half_views
        torch.addcmul(offset, self._fisher, d, out=half)
        return torch.dot(d, half) + torch.dot(d, offset), self._half_views

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p, _ in self.pairs])
        return [part.view(p.shape) for part, (p, _) in zip(parts, self.pairs, strict=True)]

    def _tensors(self) -> list[Tensor | None]:
        return [t for _, q in self.pairs for t in (q.fisher, q.offset, q.anchor)]


def _is_plain(parameter: nn.Parameter, q: Quadratic) -> bool:
    """Whether it can be computed with in place, on a CPU."""
    return parameter.device.type == "cpu" and all(
        t.is_contiguous() and t.device == parameter.device and t.dtype == compute_dtype(parameter)
        for t in (parameter, *q.tensors)
    )


def _goes_in_blocks(parameter: nn.Parameter, q: Quadratic) -> bool:
    grad = parameter.grad
    if not parameter.requires_grad or grad is None or grad.layout is not torch.strided:
        return False
    return grad.is_contiguous() and grad.dtype == parameter.dtype and _is_plain(parameter, q)


def _add(pairs: list[Pair], halves: list[Tensor], scale: float) -> None:
    """Adds 2 scale (S d + B) to the gradients."""
    grads, added = [], []
    for (parameter, q), half in zip(pairs, halves, strict=True):
        grad = parameter.grad
        if not parameter.requires_grad or (grad is None and q.is_at_rest(parameter)):
            continue
        if grad is not None and grad.layout is torch.strided:
            grads.append(grad)
            added.append(half)
            continue
        gradient = (2 * scale * half).to(parameter.dtype)
        parameter.grad = gradient if grad is None else grad + gradient
    if grads:
        torch._foreach_add_(grads, added, alpha=2 * scale)

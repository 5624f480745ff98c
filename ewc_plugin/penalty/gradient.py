"""Value and gradient of the penalty: through autograd, or straight into `.grad`.

Without the additive constants, the value is sum S e^2 and its gradient 2 S e; e = theta - anchor +
offset. Large parameters on a CPU go in blocks that fit its cache, because memory traffic is what
limits this arithmetic; the others go together, operation by operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ewc_plugin.penalty.quadratic import Quadratic, as_real, compute_dtype

Pair = tuple[Tensor, Quadratic]
"""A parameter and its part of the penalty, in the same shape."""

BLOCK = 1 << 17  # entries that go through the cache together
_LARGE = 1 << 14  # smaller parameters: call overhead exceeds memory traffic


class PenaltyFunction(torch.autograd.Function):
    """Autograd function: computes sum S e^2 from quadratics and their parameters.

    The backward pass is differentiable too, so that second derivatives include 2 S.
    """

    @staticmethod
    def forward(ctx: Any, quadratics: Sequence[Quadratic], *thetas: Tensor) -> Tensor:
        """Sum of S e^2."""
        ctx.quadratics = quadratics
        ctx.save_for_backward(*thetas)
        return value(list(zip(thetas, quadratics, strict=True)))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return 2 S e for each parameter; None if e = 0 everywhere, unless a graph is made."""
        pairs = list(enumerate(zip(ctx.saved_tensors, ctx.quadratics, strict=True)))
        if not torch.is_grad_enabled():
            pairs = [(i, (theta, q)) for i, (theta, q) in pairs if not q.is_at_rest(theta)]
        gradients: list[Tensor | None] = [None] * len(ctx.quadratics)
        halves = _products(*_distances([pair for _, pair in pairs]))
        for (i, (theta, _)), half in zip(pairs, halves, strict=True):
            gradients[i] = _rounded(2 * grad_output.to(half.device) * half, theta)
        return None, *gradients


def traceable_value(pairs: Sequence[Pair]) -> Tensor:
    """The value in plain operations, which `torch.compile` and `torch.func` can trace."""
    values = []
    for theta, q in pairs:
        S, offset, anchor = q.loaded(theta)
        e = as_real(theta) - anchor
        e = e if offset is None else e + offset
        values.append((S * e * e).sum())
    return _total(values)


@torch.no_grad()
def value(pairs: Sequence[Pair]) -> Tensor:
    """The value, without the constants and without a graph."""
    values = []
    together = []
    for theta, q in pairs:
        if goes_in_blocks(theta, q):
            values += [_sum_of_squares(e, S) for e, S in blocks(theta, q)]
        else:
            together.append((theta, q))
    distances, weights = _distances(together)
    return _total(values + [_sum_of_squares(e, S) for e, S in zip(distances, weights, strict=True)])


@torch.no_grad()
def add_gradients_(pairs: Sequence[Pair], scale: float) -> Tensor:
    """Add scale * gradient to each parameter's `.grad`.

    Args:
        pairs: Parameters and their quadratics. One that needs no gradient counts in the value.
        scale: The lambda.

    Returns:
        The value sum S e^2, without the constants.
    """
    values = []
    together = []
    for theta, q in pairs:
        if not theta.requires_grad or not _make_dense_gradient(theta, q):
            values.append(value([(theta, q)]))
        elif goes_in_blocks(theta, q, theta.grad):
            for e, S, grad in blocks(theta, q, theta.grad):
                grad.addcmul_(S, e, value=2 * scale)
                values.append(_sum_of_squares(e, S))
        else:
            together.append((theta, q))
    distances, weights = _distances(together)
    halves = _products(distances, weights)
    _add([theta for theta, _ in together], halves, 2 * scale)
    values += [_sum_of_squares(e, S) for e, S in zip(distances, weights, strict=True)]
    return _total(values)


def _make_dense_gradient(theta: Tensor, q: Quadratic) -> bool:
    """Make `.grad` a dense tensor, unless it is None and e = 0 everywhere.

    A gradient of zeros would not be the same as none: Adam would move the parameter by its old
    momentum, and weight decay would shrink it.

    Args:
        theta: The parameter.
        q: Its quadratic.

    Returns:
        Whether there is a `.grad` to add to.
    """
    if theta.grad is None:
        if q.is_at_rest(theta):
            return False
        theta.grad = torch.zeros_like(theta)
    elif theta.grad.layout is not torch.strided:
        theta.grad = theta.grad.to_dense()  # the penalty moves all rows of an embedding
    return True


def goes_in_blocks(theta: Tensor, q: Quadratic, *more: Tensor | None) -> bool:
    """Whether to process a parameter in blocks: large, on a CPU, contiguous, one dtype."""
    return theta.numel() > _LARGE and all(
        t is not None
        and t.device.type == "cpu"
        and t.dtype == compute_dtype(theta)
        and t.is_contiguous()
        for t in (theta, *q.tensors, *more)
    )


def blocks(theta: Tensor, q: Quadratic, *more: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield e, S and the same piece of `more`, block by block. The memory of e is used again."""
    scratch = torch.empty(min(BLOCK, theta.numel()), dtype=theta.dtype)
    operands = [theta.detach(), q.anchor, q.fisher, *more]
    if q.offset is not None:
        operands.append(q.offset)
    pieces = zip(*(t.view(-1).split(BLOCK) for t in operands if t is not None), strict=True)
    for x, anchor, S, *rest in pieces:
        e = torch.sub(x, anchor, out=scratch if len(x) == len(scratch) else scratch[: len(x)])
        if q.offset is not None:
            e.add_(rest.pop())
        yield e, S, *rest


def _distances(pairs: Sequence[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    """Return e and S of each parameter; e is differentiable in the parameter."""
    if not pairs:
        return [], []
    loaded = [q.loaded(theta) for theta, q in pairs]
    thetas = [
        as_real(theta).to(S.dtype) for (theta, _), (S, _, _) in zip(pairs, loaded, strict=True)
    ]
    e = list(torch._foreach_sub(thetas, [anchor for _, _, anchor in loaded]))
    moved = [(i, offset) for i, (_, offset, _) in enumerate(loaded) if offset is not None]
    if moved:
        sums = torch._foreach_add([e[i] for i, _ in moved], [offset for _, offset in moved])
        for (i, _), total in zip(moved, sums, strict=True):
            e[i] = total
    return e, [S for S, _, _ in loaded]


def _products(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_mul(first, second)) if first else []


def _sum_of_squares(e: Tensor, S: Tensor) -> Tensor:
    """Sum S e^2 with torch.sum: a float32 dot product is off by 1e-6. Overwrites e."""
    return e.square_().mul_(S).sum()


def _total(values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return torch.stack([v.to(values[0].device) for v in values]).sum()


def _add(thetas: Sequence[Tensor], halves: Sequence[Tensor], factor: float) -> None:
    """Add factor * half to `.grad`, rounded once."""
    grads = [as_real(theta.grad) for theta in thetas if theta.grad is not None]
    if not grads:
        return
    if any(grad.dtype == torch.float16 for grad in grads):
        for grad, half in zip(grads, halves, strict=True):
            grad.copy_(_rounded(grad + factor * half, grad))
    else:
        torch._foreach_add_(grads, list(halves), alpha=factor)


def _rounded(gradient: Tensor, theta: Tensor) -> Tensor:
    """Convert a gradient to the parameter's type.

    Args:
        gradient: In the type in which it was computed; real parts [..., 2] of a complex one.
        theta: The parameter, or its `.grad`.

    Returns:
        The gradient in the type of `theta`.

    Raises:
        OverflowError: A number is finite, but not in float16.
    """
    if theta.is_complex() and not gradient.is_complex():
        gradient = torch.view_as_complex(gradient.contiguous())
    result = gradient.to(theta.dtype)
    if result.dtype == torch.float16 and bool((result.isinf() & gradient.isfinite()).any()):
        raise OverflowError(
            f"The penalty's gradient reaches {float(gradient.detach().abs().max()):.3g}, more than "
            "float16 can hold (65504): use a smaller `ewc_lambda`, or bfloat16 or float32 weights."
        )
    return result

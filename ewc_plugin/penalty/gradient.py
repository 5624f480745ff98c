"""Value and gradient of the penalty: through autograd, or straight into `.grad`.

Without the additive constants, the value is sum S e^2 and its gradient 2 S e; e = theta - anchor +
offset. `Pairs` prepares the parameters that are plain tensors on a CPU; the others go together,
operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ewc_plugin.penalty.pairs import Pair, Pairs
from ewc_plugin.penalty.quadratic import Quadratic, as_real


class PenaltyFunction(torch.autograd.Function):
    """Autograd function: computes sum S e^2 from quadratics and their parameters.

    The backward pass is differentiable too, so that second derivatives include 2 S.
    """

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, *thetas: Tensor) -> Tensor:
        """Sum of S e^2."""
        ctx.quadratics = [q for _, q in pairs]
        ctx.save_for_backward(*thetas)
        return value(pairs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return 2 S e for each parameter; None where `.grad` would get zeros of it."""
        pairs = list(enumerate(zip(ctx.saved_tensors, ctx.quadratics, strict=True)))
        if not torch.is_grad_enabled():
            pairs = [
                (i, (theta, q))
                for i, (theta, q) in pairs
                if not (q.is_at_rest(theta) and _accumulates(ctx.next_functions[i][0]))
            ]
        gradients: list[Tensor | None] = [None] * len(ctx.quadratics)
        halves = _products(*_distances([pair for _, pair in pairs]))
        for (i, (theta, _)), half in zip(pairs, halves, strict=True):
            gradients[i] = _rounded(2 * grad_output.to(half.device) * half, theta)
        return None, *gradients


def _accumulates(node: Any) -> bool:
    """Whether a node adds to a leaf's `.grad`, in a backward pass that does not return it."""
    try:
        return hasattr(node, "variable") and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # says that it is a leaf whose gradient `torch.autograd.grad` returns
        return False


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
def value(pairs: Pairs) -> Tensor:
    """The value, without the constants and without a graph."""
    values = [_sum_of_squares(*both) for blocks in pairs.large for both in blocks.distances()]
    values += [_sum_of_squares(group.distance(), group.S) for group in pairs.small]
    return _total(values + _values(*_distances(pairs.others)))


@torch.no_grad()
def add_gradients_(pairs: Pairs, scale: float) -> Tensor:
    """Add scale * gradient to each parameter's `.grad`.

    Args:
        pairs: Parameters and their quadratics. One that needs no gradient counts in the value.
        scale: The lambda.

    Returns:
        The value sum S e^2, without the constants.
    """
    values, others = [], pairs.others
    for blocks in pairs.large:
        whole = _gradient(blocks.theta, blocks.quadratic)
        if whole is not None and not whole.is_contiguous():
            others.append((blocks.theta, blocks.quadratic))
            continue
        grads = () if whole is None else blocks.split(whole)
        for (e, S), grad in zip_longest(blocks.distances(), grads):
            if grad is not None:
                grad.addcmul_(S, e, value=2 * scale)
            values.append(_sum_of_squares(e, S))
    for group in pairs.small:
        e = group.distance()
        torch.mul(group.S, e, out=group.change)
        for (theta, q), change in zip(group.pairs, group.changes, strict=True):
            if (grad := _gradient(theta, q)) is not None:
                grad.add_(change, alpha=2 * scale)
        values.append(_sum_of_squares(e, group.S))
    distances, weights = _distances(others)
    _add(others, _products(distances, weights), 2 * scale)
    return _total(values + _values(distances, weights))


def _gradient(theta: Tensor, q: Quadratic) -> Tensor | None:
    """The `.grad` to add to, which is made dense; None stays None if e = 0 everywhere.

    A gradient of zeros would not be the same as none: Adam would move the parameter by its old
    momentum, and weight decay would shrink it.

    Args:
        theta: The parameter.
        q: Its quadratic.

    Returns:
        None for a parameter that needs no gradient, too.
    """
    if not theta.requires_grad:
        return None
    if theta.grad is None:
        if q.is_at_rest(theta):
            return None
        theta.grad = torch.zeros_like(theta)
    elif theta.grad.layout is not torch.strided:
        theta.grad = theta.grad.to_dense()  # the penalty moves all rows of an embedding
    return theta.grad


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


def _values(distances: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [_sum_of_squares(e, S) for e, S in zip(distances, weights, strict=True)]


def _total(values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return torch.stack([v.to(values[0].device) for v in values]).sum()


def _add(pairs: Sequence[Pair], halves: Sequence[Tensor], factor: float) -> None:
    """Add factor * half to each `.grad` that there is to add to, rounded once."""
    grads = [_gradient(theta, q) for theta, q in pairs]
    both = [(as_real(g), half) for g, half in zip(grads, halves, strict=True) if g is not None]
    if not both:
        return
    if any(grad.dtype == torch.float16 for grad, _ in both):
        for grad, half in both:
            grad.copy_(_rounded(grad + factor * half, grad))
    else:
        torch._foreach_add_([grad for grad, _ in both], [half for _, half in both], alpha=factor)


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

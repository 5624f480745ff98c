"""The largest stable lambda of an optimizer, and the error of a training that diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ewc_plugin.penalty.pairs import Pair


class DivergedError(ArithmeticError, RuntimeError):
    """The loss or a weight is no longer finite; a subclass of two built-in errors."""


def largest_stable_lambda(optimizer: Optimizer, pairs: Sequence[Pair]) -> float:
    """The lambda above which the penalty alone makes gradient descent diverge.

    Descent on lambda S d^2 multiplies d by 1 - 2 lr lambda S in every step, so that it must have
    2 lr lambda max S < 2; momentum m makes the bound 2 (1 + m), Nesterov's 2 (1 + m) / (1 + 2 m).
    The task's own curvature comes on top: stay well below.

    Args:
        optimizer: Only for `torch.optim.SGD` is there such a bound: an Adam step is at most about
            lr long whatever the gradient.
        pairs: Of `QuadraticPenalty.pairs(model)`.

    Returns:
        The bound; infinite if there is none.

    Example:
        >>> from ewc_plugin.penalty.penalty import QuadraticPenalty
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> penalty = QuadraticPenalty()
        >>> penalty.consolidate(model, {"weight": torch.tensor([[50.0]])})
        >>> largest_stable_lambda(SGD(model.parameters(), lr=0.1), penalty.pairs(model))
        0.2
    """
    if not isinstance(optimizer, SGD):
        return math.inf
    largest = {parameter: float(q.fisher.max()) for parameter, q in pairs if q.fisher.numel()}
    bounds = [math.inf]
    for group in optimizer.param_groups:
        curvature = max((largest.get(p, 0.0) for p in group["params"]), default=0.0)
        bounds.append(_largest_in_group(group, curvature))
    return max(0.0, min(bounds))


def check_optimizer_state(optimizer: Optimizer, remedy: str = "") -> None:
    """Raise if a number that the optimizer keeps is not finite.

    The second moments of Adam and RMSprop overflow for gradients above 1e19. Each later step is
    then divided by infinity, so that the weights stay where they are and the loss looks normal.

    Args:
        optimizer: After any of its steps; reads all its state, so that once per epoch is enough.
        remedy: A sentence to end the message with.

    Raises:
        DivergedError: A tensor of its state has a number that is infinite or NaN.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.RMSprop([weight])
        >>> weight.grad = torch.tensor([1e30])
        >>> optimizer.step()
        >>> check_optimizer_state(optimizer)
        Traceback (most recent call last):
        ewc_plugin.penalty.stability.DivergedError: The training diverged: `square_avg` of RMSprop \
is not finite, so that its weights cannot move any more.
    """
    states = getattr(optimizer, "state", {}).values()  # a wrapper may have none
    for state in filter(lambda state: isinstance(state, Mapping), states):  # else: a count of steps
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                raise DivergedError(
                    f"The training diverged: `{name}` of {type(optimizer).__name__} is not finite, "
                    f"so that its weights cannot move any more. {remedy}".rstrip()
                )


def _largest_in_group(group: dict[str, Any], curvature: float) -> float:
    lr, momentum = float(group["lr"]), float(group["momentum"])
    bound = 2 * (1 + momentum)
    if group["nesterov"]:
        bound /= 1 + 2 * momentum
    lr *= 1 - float(group["dampening"]) if momentum else 1
    if lr * curvature <= 0:
        return math.inf
    return (bound / lr - float(group["weight_decay"])) / (2 * curvature)

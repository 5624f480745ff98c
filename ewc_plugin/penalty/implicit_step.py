"""The penalty as an implicit (proximal) step, which is stable for every lambda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ewc_plugin.penalty.options import checked_non_negative
from ewc_plugin.penalty.pairs import Pair, Pairs
from ewc_plugin.penalty.quadratic import Quadratic, as_real


@torch.no_grad()
def implicit_step_(optimizer: Optimizer, pairs: Sequence[Pair], ewc_lambda: float) -> None:
    """Move theta to argmin_x lambda penalty(x) + |x - theta|^2 / (2 lr), after `optimizer.step()`.

    With c = 2 lr lambda that is theta - e S / (1 / c + S), e = theta - anchor + offset: a weighted
    mean of theta and the penalty's minimum, which neither overshoots nor grows for any c. The
    minimum and its weight are kept for the next step, 2 numbers a parameter on a CPU. lr is
    each parameter group's own; the scaling of an adaptive optimizer is not taken into account.

    On permuted MNIST (results/implicit_step): with SGD it is as good as the penalty in the gradient
    where that is stable, and goes on where that diverges, though there it learns less and less of
    what is new. With Adam it wants a lambda about 1,000 times as large and then is as good; a
    lambda that is too large by a factor of 100 costs it much less.

    Call it once for each step that the optimizer took, and for no other: a gradient scaler that
    found infinities leaves steps out, and gradient accumulation takes one for several batches.

    Args:
        optimizer: Its parameter groups give lr.
        pairs: Of `QuadraticPenalty.pairs(model)`.
        ewc_lambda: The weight of the penalty.

    Raises:
        ValueError: `ewc_lambda` or 2 lr ewc_lambda is negative, not finite or above 1e38.

    Source: Kirkpatrick et al. 2017 (the penalty).

    Example:
        >>> from ewc_plugin.penalty.penalty import QuadraticPenalty
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1)
        >>> penalty = QuadraticPenalty()
        >>> penalty.consolidate(model, {"weight": torch.tensor([[2.0]])})
        >>> _ = torch.nn.init.constant_(model.weight, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        >>> implicit_step_(optimizer, penalty.pairs(model), ewc_lambda=2)
        >>> model.weight.item()  # 1 + 3 / (1 + 2 * 0.25 * 2 * 2)
        2.0
    """
    checked_non_negative("ewc_lambda", ewc_lambda)
    stiffness = {}
    for group in optimizer.param_groups:
        c = checked_non_negative("2 lr ewc_lambda", 2 * float(group["lr"]) * ewc_lambda)
        if c >= 1e-38:  # less underflows float32: no step
            stiffness.update({p: 1 / c for p in group["params"] if p.requires_grad})
    pairs = pairs if isinstance(pairs, Pairs) else Pairs(pairs)
    for blocks in pairs.large:
        if blocks.theta in stiffness:
            pull = blocks.pull
            blocks.theta.lerp_(pull.minimum, pull.weight(stiffness[blocks.theta]))
    others = pairs.others
    for small in pairs.small:
        first, *more = (stiffness.get(theta) for theta, _ in small.pairs)
        if first is not None and all(value == first for value in more):
            weights, minima = small.views(small.pull.weight(first)), small.views(small.pull.minimum)
            torch._foreach_lerp_([theta for theta, _ in small.pairs], minima, weights)
        else:
            others += small.pairs
    for theta, q in others:
        if theta in stiffness:
            _step(theta, q, stiffness[theta])


def _step(parameter: Tensor, q: Quadratic, stiffness: float) -> None:
    """Theta -= e S / (stiffness + S), for a parameter that is not prepared."""
    S, offset, anchor = q.loaded(parameter)
    theta = as_real(parameter)
    e = theta.to(S.dtype) - anchor
    if offset is not None:
        e += offset
    theta.copy_(theta.to(S.dtype) - e * (S / (S + stiffness)))

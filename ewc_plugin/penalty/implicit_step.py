"""The penalty as an implicit step, which no lambda makes unstable."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from ewc_plugin.penalty.gradient import Pair


@torch.no_grad()
def implicit_step_(optimizer: Optimizer, pairs: list[Pair], ewc_lambda: float) -> None:
    """Moves theta to argmin_x lambda penalty(x) + |x - theta|^2 / (2 lr), after `optimizer.step()`.

    With c = 2 lr lambda that is anchor + (d - c B) / (1 + c S), d = theta - anchor: a weighted mean
    of theta and the penalty's minimum, so that it neither overshoots nor grows, for every c >= 0.
    lr is each parameter group's own; an adaptive optimizer's scaling is not known to it.

    On permuted MNIST (results/implicit_step): with SGD it is as good as the penalty in the gradient
    where that is stable, and goes on where that diverges, though there it learns less and less of
    what is new. With Adam it wants a lambda about 1,000 times as large and then is as good; a
    lambda that is too large by a factor of 100 costs it much less.

    Args:
        optimizer: Whose parameter groups say lr.
        pairs: Of `QuadraticPenalty.pairs(model)`.
        ewc_lambda: The weight of the penalty.

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
    quadratics = dict(pairs)
    for group in optimizer.param_groups:
        c = 2 * float(group["lr"]) * ewc_lambda
        for parameter in group["params"]:
            if parameter not in quadratics or not parameter.requires_grad:
                continue
            S, B, anchor = quadratics[parameter].loaded(parameter)
            d = parameter.detach() - anchor
            if B is not None:
                d.sub_(B, alpha=c)
            parameter.copy_(d.div_(1 + c * S).add_(anchor))

"""Estimate of the trace of Avalanche's importances from a subset of the mini-batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import default_collate

from ewc_plugin.avalanche.fisher_data import collate_of
from ewc_plugin.avalanche.strategy_fisher import StrategyFisher
from ewc_plugin.avalanche.template import unpacked
from ewc_plugin.batch_parts import on_device
from ewc_plugin.contexts import evaluating, untouched_randomness

FIRST = 16  # mini-batches, evenly spaced, before the error is estimated for the first time
TOLERANCE = 0.04  # relative standard error; 10 % is then two and a half of them


def builtin_trace(fisher: StrategyFisher, strategy: Any, datasets: list[Any]) -> float:
    """Estimate sum_i F_i of Avalanche's `EWCPlugin`: 1/B sum_b |d criterion_b / d theta|^2.

    The B mini-batches are those that Avalanche makes of the data sets: `train_mb_size` samples in
    a row, not shuffled, a smaller one at the end that counts as much; here with eval transforms.
    Evenly spaced ones are taken, twice as many each time, until the standard error of their mean
    is at most 4 %. It is estimated from the differences of neighbours, since data that are sorted
    by class change slowly. The smaller ones at the end are always taken.

    Args:
        fisher: Prepares the strategy's batches and computes the model's outputs.
        strategy: With the criterion and the size of its mini-batches.
        datasets: What the Fisher was computed on.

    Returns:
        The trace, over the parameters that require a gradient.

    Raises:
        ValueError: The square of a mini-batch's gradient is not finite.

    Source: Avalanche's `EWCPlugin.compute_importances`.
    """
    size = strategy.train_mb_size
    places = [
        (data, range(start, min(start + size, len(data))))
        for data in (d.eval() if hasattr(d, "eval") else d for d in datasets)
        for start in range(0, len(data), size)
    ]
    full = [place for place in places if len(place[1]) == size]
    smaller = [place for place in places if len(place[1]) < size]
    with untouched_randomness(), evaluating(fisher.model):
        rest = [_squared_norm(fisher, strategy, *place) for place in smaller]
        mean = _mean(lambda b: _squared_norm(fisher, strategy, *full[b]), len(full))
    trace = (mean * len(full) + sum(rest)) / len(places)
    if not math.isfinite(trace):
        raise ValueError(
            "`normalize='avalanche'` scales F to the trace of Avalanche's own, which is "
            f"{trace} here: the gradient of a mini-batch is not finite. Use another `normalize`."
        )
    return trace


def _mean(value: Any, B: int) -> float:
    """Estimate the mean of value(0), ..., value(B - 1) from as few as the tolerance allows."""
    known: dict[int, float] = {}
    stride = 1 << max(0, (B // FIRST).bit_length() - 1)
    while stride >= 1:
        for b in range(0, B, stride):
            if b not in known:
                known[b] = value(b)
        x = torch.tensor([known[b] for b in sorted(known)], dtype=torch.float64)
        n = len(x)
        if n > 1:
            variance = float(x.diff().square().mean()) / 2
            error = math.sqrt(variance / n * (1 - n / B))
            if error <= TOLERANCE * float(x.mean()):
                break
        stride //= 2
    return sum(known.values()) / max(len(known), 1)


def _squared_norm(fisher: StrategyFisher, strategy: Any, data: Any, rows: range) -> float:
    collate = collate_of(strategy, data) or default_collate
    batch = on_device(collate([data[i] for i in rows]), strategy.device)
    if fisher.by_template:
        batch = unpacked(strategy, batch)
    loss = strategy._criterion(fisher.output(fisher.model, batch), fisher.targets(batch))
    params = [p for p in fisher.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in gradients if g is not None)

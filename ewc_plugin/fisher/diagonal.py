"""`diagonal_fisher`: batches in, one tensor per trainable parameter out."""

import sys
import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_plugin.batches import Batch, as_pytree, rechunk, subset
from ewc_plugin.contexts import evaluating
from ewc_plugin.fisher.accumulate import EnginePass
from ewc_plugin.fisher.mini_batch import batched_importances
from ewc_plugin.fisher.per_sample import Forward, in_company
from ewc_plugin.fisher.plan import EngineName, Plan, Served, make_plan
from ewc_plugin.fisher.scores import (
    FisherType,
    Score,
    Scores,
    own_vectors,
    parsed_type,
    score_vectors,
)

_SEED = 0  # of the generator that is made where none is passed
_ONE_LABEL = (FisherType.PREDICTED, FisherType.EMPIRICAL, FisherType.SAMPLED)  # with one draw


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    fisher_type: FisherType | str | Score = FisherType.PREDICTED,
    *,
    forward: Forward | None = None,
    targets: Callable[[Batch], Tensor] | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    n_draws: int = 1,
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    engine: EngineName = "auto",
    progress: bool = False,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information, averaged over samples.

    F_i = 1/N sum_n E_y[(d log p(y | x_n) / d theta_i)^2]; `fisher_type` says how E_y is taken.
    The score d log p / d theta has mean zero under the model's own labels, so F is its variance,
    and minus the expected second derivative of log p. The pass runs in eval mode; `.grad`,
    requires_grad, every module's flag and the global random state are left as they were.

    Args:
        model: Maps batch[0] [N, ...] to logits [N, C], unless `forward` says otherwise.
        batches: Yields tuples (x [N, ...], y [N] int64, ...) or other pytrees of tensors with a
            leading axis N, on the model's device. Sizes may differ; the result does not depend on
            them, except for BATCHED.
        fisher_type: Which labels E_y runs over; or, where the model is no softmax classifier, a
            `Score`, such as `gaussian_score`.
        forward: Maps (model, batch) to logits [N, C].
        targets: Maps a batch to y [N] int64; EMPIRICAL and BATCHED read it. Default: batch[1].
        criterion: BATCHED alone: maps (logits, y) to the loss. Default: the mean cross entropy.
        n_draws: SAMPLED alone: labels drawn per sample.
        max_samples: Use only so many samples, drawn without replacement.
        generator: For SAMPLED and `max_samples`. Default: one of our own, with a fixed seed.
        chunk_size: Samples per forward pass. Default: chosen from the model and the input.
        engine: "auto" serves each parameter by its layer's rule where there is one, else by
            `vmap(grad)`, else by a loop over samples; "rules", "vmap", "loop" force one.
        progress: Show a line on stderr.

    Returns:
        One tensor per trainable parameter, by name: its shape and device, in float32 or the
        parameter's dtype where that is wider. Zeros where the logits do not depend on it. Unit:
        nats / theta^2.

    Raises:
        ValueError: `batches` is empty, a logit is not finite (-inf is a masked class), samples
            interact, or an argument does not fit the others.

    Source: Kirkpatrick et al. 2017 (the penalty); Kunstner et al. 2019 (empirical against exact).

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> diagonal_fisher(model, [(torch.ones(3, 1), torch.tensor([0, 1, 1]))])
        {'weight': tensor([[0.2500],
                [0.2500]])}
    """
    fisher_type = parsed_type(fisher_type)
    _check_arguments(fisher_type, criterion, n_draws, max_samples, chunk_size, engine)
    params = _trainable(model)
    forward = forward or _first_item
    targets = targets or _second_item
    generator = generator or torch.Generator().manual_seed(_SEED)
    batches = map(as_pytree, batches)
    with evaluating(model):
        if fisher_type is FisherType.BATCHED:
            return batched_importances(
                model, params, batches, forward, targets, criterion or F.cross_entropy
            )
        if max_samples is not None:
            batches = subset(batches, max_samples, generator)

        def scores(batch: Batch, logits: Tensor) -> Scores:
            if not isinstance(fisher_type, FisherType):
                return own_vectors(logits, fisher_type, batch)
            y = None
            if fisher_type is FisherType.EMPIRICAL:
                y = _checked_targets(targets(batch), logits)
            return score_vectors(
                logits, fisher_type, targets=y, n_draws=n_draws, generator=generator
            )

        stream = iter(batches)
        first = next(stream, None)
        if first is None:
            raise ValueError("`batches` is empty: a Fisher needs at least one sample.")
        one_vector = fisher_type in _ONE_LABEL and n_draws == 1
        forward, plan = _planned(model, forward, params, first, engine, chunk_size, one_vector)
        engine_pass = EnginePass(model, forward, params, plan, scores, generator)
        started = time.monotonic()
        for chunk in rechunk(chain([first], stream), plan.chunk_size):
            engine_pass.add(chunk)
            if progress:
                seconds = time.monotonic() - started
                print(
                    f"\rFisher: {engine_pass.N:,} samples, {seconds:.0f} s", end="", file=sys.stderr
                )
        if progress:
            print(file=sys.stderr)
        return engine_pass.mean()


def explain(
    model: nn.Module,
    batch: Batch,
    *,
    forward: Forward | None = None,
    engine: EngineName = "auto",
) -> dict[str, Served]:
    """Which engine serves which parameter, and why: what `diagonal_fisher` decides on this batch.

    Args:
        model: As in `diagonal_fisher`.
        batch: Its first batch.
        forward: As in `diagonal_fisher`.
        engine: As in `diagonal_fisher`.

    Returns:
        Parameter name -> its engine and the layer rule, or the reason why none serves it.

    Raises:
        ValueError: As in `diagonal_fisher`.

    Example:
        >>> explain(nn.Linear(3, 2, bias=False), (torch.zeros(4, 3),))["weight"].detail
        'linear'
    """
    params = _trainable(model)
    with evaluating(model):
        return _planned(model, forward or _first_item, params, batch, engine)[1].served


def _planned(
    model: nn.Module,
    forward: Forward,
    params: dict[str, nn.Parameter],
    batch: Batch,
    engine: EngineName,
    chunk_size: int | None = None,
    one_vector: bool = False,
) -> tuple[Forward, Plan]:
    """The plan, and the forward to follow it with."""
    try:
        return forward, make_plan(model, forward, params, batch, engine, chunk_size, one_vector)
    except Exception:  # whatever a model's code raises
        company = in_company(model, forward, batch)
        if company is forward:
            raise
    return company, make_plan(model, company, params, batch, engine, chunk_size, one_vector)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("`model` has no parameter with requires_grad=True, so it has no Fisher.")
    return params


def _first_item(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch[0])
    return logits


def _second_item(batch: Batch) -> Tensor:
    targets: Tensor = batch[1]
    return targets


def _checked_targets(y: Tensor, logits: Tensor) -> Tensor:
    N, C = logits.shape
    if y.shape != (N,) or y.is_floating_point():
        raise ValueError(
            f"`targets` must be class indices [N] int64, got shape {tuple(y.shape)} {y.dtype}."
        )
    if bool((y < 0).any()) or bool((y >= C).any()):
        raise ValueError(
            f"`targets` must be in [0, {C}), the logits' classes, got {int(y.min())} to "
            f"{int(y.max())}."
        )
    return y.long()


def _check_arguments(
    fisher_type: FisherType | Score,
    criterion: object,
    n_draws: int,
    max_samples: int | None,
    chunk_size: int | None,
    engine: str,
) -> None:
    if engine not in get_args(EngineName):
        allowed = ", ".join(repr(e) for e in get_args(EngineName))
        raise ValueError(f"`engine` must be one of {allowed}, got {engine!r}.")
    for name, value in (
        ("n_draws", n_draws),
        ("max_samples", max_samples),
        ("chunk_size", chunk_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    if criterion is not None and fisher_type is not FisherType.BATCHED:
        raise ValueError(
            f"`criterion` enters fisher_type 'batched' alone, got {_said(fisher_type)}."
        )
    if n_draws != 1 and fisher_type is not FisherType.SAMPLED:
        raise ValueError(f"`n_draws` enters fisher_type 'sampled' alone, got {_said(fisher_type)}.")
    if fisher_type is FisherType.BATCHED and (max_samples or chunk_size):
        raise ValueError(
            "`max_samples` and `chunk_size` would change what fisher_type 'batched' computes. "
            "Leave them out."
        )


def _said(fisher_type: FisherType | Score) -> str:
    return repr(fisher_type.value) if isinstance(fisher_type, FisherType) else "a score"

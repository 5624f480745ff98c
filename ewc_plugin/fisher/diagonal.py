"""`diagonal_fisher`: batches in, one tensor per trainable parameter out."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_plugin.batches import Batch, as_pytree, rechunk, subset
from ewc_plugin.contexts import evaluating
from ewc_plugin.fisher.accumulate import Accumulator
from ewc_plugin.fisher.mini_batch import batched_importances
from ewc_plugin.fisher.model_call import Forward, ModelCall
from ewc_plugin.fisher.options import EngineName, check_options
from ewc_plugin.fisher.per_sample import taking_single_samples
from ewc_plugin.fisher.plan import Plan, Served, make_plan
from ewc_plugin.fisher.probe import probe
from ewc_plugin.fisher.result import Fisher
from ewc_plugin.fisher.scores import FisherType, LabelScores, Score, parsed_type

_SEED = 0  # of the generator that is made where none is passed


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
) -> Fisher:
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
        nats / theta^2. It is a dict that knows its `fisher_type` and `n_samples`.

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
    check_options(
        fisher_type,
        forward=forward,
        targets=targets,
        criterion=criterion,
        n_draws=n_draws,
        max_samples=max_samples,
        generator=generator,
        chunk_size=chunk_size,
        engine=engine,
        progress=progress,
    )
    call = ModelCall(model, forward or _first_item, _trainable(model))
    targets = targets or _second_item
    generator = generator or torch.Generator().manual_seed(_SEED)
    batches = map(as_pytree, batches)
    with evaluating(model):
        if isinstance(fisher_type, FisherType) and fisher_type is FisherType.BATCHED:
            tensors = batched_importances(call, batches, targets, criterion or F.cross_entropy)
            return Fisher(tensors, fisher_type=fisher_type.value)
        if max_samples is not None:
            batches = subset(batches, max_samples, generator)
        stream = iter(batches)
        first = next(stream, None)
        if first is None:
            raise ValueError("`batches` is empty: a Fisher needs at least one sample.")
        label_scores = LabelScores(fisher_type, n_draws, generator, targets)
        call, plan = _planned(call, first, engine, chunk_size, label_scores.one_vector)
        accumulator = Accumulator(call, plan, label_scores)
        show = _Progress() if progress else None
        for chunk in rechunk(chain([first], stream), plan.chunk_size):
            accumulator.add(chunk)
            if show:
                show(accumulator.N)
        if show:
            print(file=sys.stderr)
        name = fisher_type.value if isinstance(fisher_type, FisherType) else _name(fisher_type)
        return Fisher(accumulator.mean(), fisher_type=name, n_samples=accumulator.N)


def _name(score: Score) -> str:
    return str(getattr(score, "__name__", type(score).__name__))


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
    call = ModelCall(model, forward or _first_item, _trainable(model))
    with evaluating(model):
        return _planned(call, batch, engine)[1].served


def _planned(
    call: ModelCall,
    batch: Batch,
    engine: EngineName,
    chunk_size: int | None = None,
    one_vector: bool = False,
) -> tuple[ModelCall, Plan]:
    """The plan, and the call to follow it with: some models take no batch of one sample."""
    try:
        seen = probe(call, batch)
    except Exception:  # whatever a model's code raises
        forward = taking_single_samples(call.model, call.forward, batch)
        if forward is call.forward:
            raise
        call = replace(call, forward=forward)
        seen = probe(call, batch)
    return call, make_plan(call, seen, engine, chunk_size or seen.fitting_chunk(one_vector))


class _Progress:
    """A line on stderr, written over and over."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, N: int) -> None:
        seconds = time.monotonic() - self.started
        print(f"\rFisher: {N:,} samples, {seconds:.0f} s", end="", file=sys.stderr)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}.")
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

"""`diagonal_fisher`: the diagonal Fisher information of a model, exact per sample."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ewc_plugin.batches import Batch, draw_samples, not_empty, rechunk
from ewc_plugin.contexts import evaluating
from ewc_plugin.fisher.accumulate import Accumulator
from ewc_plugin.fisher.class_mean import ClassMeans
from ewc_plugin.fisher.dense import default_positions
from ewc_plugin.fisher.hugging_face import check_labels_are_shifted
from ewc_plugin.fisher.label_scores import IGNORE_INDEX, LabelScores
from ewc_plugin.fisher.mini_batch import batched_importances, mean_cross_entropy
from ewc_plugin.fisher.model_call import Forward, ModelCall
from ewc_plugin.fisher.options import EngineName, check_options
from ewc_plugin.fisher.outputs import default_forward, default_targets
from ewc_plugin.fisher.parameters import check_model, trainable, warn_of_parameters_without_effect
from ewc_plugin.fisher.per_sample import check_backward_is_linear
from ewc_plugin.fisher.plan import Served, make_plan
from ewc_plugin.fisher.probe import Probe, first_samples, probe
from ewc_plugin.fisher.result import Fisher
from ewc_plugin.fisher.scores import (
    AT_DATA_LABELS,
    BATCHED,
    CLASS_MEANS,
    REVERSED_LOGITS,
    FisherType,
    Score,
    parsed_type,
    type_name,
)

_SEED = 0  # seed of the default generator


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    fisher_type: FisherType | str | Score = FisherType.PREDICTED,
    *,
    forward: Forward | None = None,
    targets: Callable[[Batch], Tensor | None] | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    n_draws: int = 1,
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    engine: EngineName = "auto",
    progress: bool = False,
    class_dim: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    positions: Callable[[Batch], Tensor | None] | None = None,
) -> Fisher:
    """Diagonal of the Fisher information, averaged over samples.

    F_i = 1/N sum_n E_y[(d log p(y | x_n) / d theta_i)^2]; `fisher_type` says how E_y is taken.
    The score d log p / d theta has mean zero under the model's own labels, so F is its variance,
    and minus the expected second derivative of log p. The pass runs in eval mode; `.grad`,
    requires_grad, every module's flag, attributes and buffers, and the global random states of
    torch, NumPy and Python are left as they were.

    Every forward pass starts from the state (buffers, hidden states) that the model is found in, so
    the result does not depend on the order of the samples.

    Every engine is checked against the plain loop over single samples: before the pass on three
    samples, and during it on random samples of the chunks that run. Samples of several batches are
    put into one forward pass, since larger chunks are faster, and only where that changes none of
    their logits.

    Args:
        model: Maps batch[0] [N, ...] to logits [N, C], or to an object with `logits`, unless
            `forward` does.
        batches: Yields tuples (x [N, ...], y [N] int64, ...), mappings of keyword arguments, or
            other pytrees of tensors with a leading axis N, on the model's device. NumPy arrays and
            lists and tuples of plain values of length N are split likewise; all else is shared.
            Sizes may differ; the result does not depend on them, except for the batched types.
        fisher_type: Which labels E_y runs over; or, where the model is no softmax classifier, a
            `Score`, such as `gaussian_score`.
        forward: Maps (model, batch) to logits [N, C].
        targets: Maps a batch to y [N] int64, or for dense outputs y [N, T], [N, H, W], or None
            where there are none. Types at the data's labels and batched ones read it; dense outputs
            for `class_dim` and `ignore_index` too. Default: batch[1], or "labels" of a mapping.
        criterion: Batched types alone: maps (logits, y) to the loss. Default: the mean cross
            entropy.
        n_draws: SAMPLED alone: labels drawn per sample.
        max_samples: Use at most this many samples, and read no others. From a `DataLoader` over a
            map-style dataset (in order or shuffled), and of a list of batches, they are drawn
            without replacement; of anything else, which can only be read from its beginning, they
            are the first ones.
        generator: For SAMPLED and `max_samples`. Default: a new generator with seed 0.
        chunk_size: Samples per forward pass. Default: chosen from the model and the input.
        engine: "auto" computes each parameter by its layer's rule where there is one, else by
            `vmap(grad)`, else by a loop over samples; "rules", "vmap", "loop" force one.
        progress: Show a line on stderr.
        class_dim: Axis of the classes in dense outputs, [N, T, V] or [N, C, H, W]. Default: the one
            whose removal gives the labels' shape.
        ignore_index: The label of a sample, token or pixel without a score. Where labels are read
            it has none, and a sample without any is not counted in N.
        positions: Not for batched types. Maps a batch to the positions of dense outputs that have
            a score, nonzero or True, in the labels' shape; or to None: all. Default:
            "attention_mask" of a mapping; of a model with a decoder "decoder_attention_mask".

    Returns:
        One tensor per trainable parameter, by name: its shape and device, in float32 or the
        parameter's dtype where that is wider. Zeros where the logits do not depend on it. Unit:
        nats / theta^2. The result is a dict with the attributes `fisher_type` and `n_samples`.

    Raises:
        ValueError: `batches` is empty, a logit is not finite (-inf is a masked class), samples
            interact (a sample's logits depend on the others of its batch, or on chance), outputs
            are probabilities, an audit fails when the chunks before it can no longer be computed
            again, or an argument does not fit the others.
        TypeError: An argument has another type.

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
        class_dim=class_dim,
        ignore_index=ignore_index,
        positions=positions,
    )
    check_model(model)
    check_batches(batches)
    if fisher_type in AT_DATA_LABELS and forward is None and targets is None:
        check_labels_are_shifted(model)
    generator = generator or torch.Generator().manual_seed(_SEED)
    with evaluating(model) as state:
        call = ModelCall(model, forward or default_forward, trainable(model), state)
        if fisher_type in BATCHED:
            tensors = batched_importances(
                call,
                not_empty(batches),
                targets or default_targets,
                criterion or mean_cross_entropy(class_dim, ignore_index),
                reverse=fisher_type in REVERSED_LOGITS,
            )
            return Fisher(tensors, fisher_type=type_name(fisher_type))
        if max_samples is not None:
            batches = draw_samples(batches, max_samples, generator)
        # "Squares" are squared gradients of single samples. Read three samples; try the layer
        # rules, then vmap, on them against a loop over samples, and so choose an engine for each
        # parameter. Join or split the batches into chunks of a fast size, which changes no sample's
        # gradient unless samples interact (see `Raises`). Per chunk, run one forward pass and one
        # backward pass per score vector, square each sample's gradient, and add it to the sums.
        # Last, divide by N. (All that is in `accumulate`; `class_mean` squares means of classes.)
        stream = not_empty(batches)
        samples, first_batches = first_samples(stream)
        if samples is None:
            raise ValueError("`batches` is empty: a Fisher needs at least one sample.")
        label_scores = LabelScores(
            fisher_type,
            n_draws,
            generator,
            targets,
            class_dim=class_dim,
            ignore_index=ignore_index,
            positions=positions or default_positions(model),
        )
        call, probed = probe(call, samples)
        if not label_scores.one_vector:
            with_copies = call.single_sample == "copies"  # in a batch of the loader's own size
            one = samples.first if with_copies else samples.batch
            check_backward_is_linear(call, one, probed.v[:2])
        size = _chunk_size(call, probed, chunk_size, label_scores.one_vector)
        accumulator: Accumulator | ClassMeans
        if fisher_type in CLASS_MEANS:
            accumulator = ClassMeans(
                call,
                label_scores,
                size,
                may_regroup=probed.may_join,
                one_by_one=chunk_size == 1,
            )
        else:
            accumulator = Accumulator(
                call,
                make_plan(call, probed, engine),
                label_scores,
                size,
                may_join=probed.may_join,
                probe_had_different_samples=samples.n_different > 1,
                memory=probed.reference,
            )
        show = _Progress() if progress else None
        chunks = rechunk(
            chain(first_batches, stream),
            lambda: accumulator.limit,
            lambda: accumulator.may_join,
            accumulator.own_inputs,
        )
        for chunk in chunks:
            accumulator.add(chunk)
            if show:
                show(accumulator.N)
        if show:
            print(file=sys.stderr)
        fisher = Fisher(
            accumulator.mean(),
            fisher_type=type_name(fisher_type),
            n_samples=accumulator.n_labelled,
        )
        warn_of_parameters_without_effect(call, samples.batch, fisher, probed.reached)
        return fisher


def check_batches(batches: object) -> None:
    """Raise where one batch, or single samples, are given in place of batches."""
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(f"`batches` must be iterable, got {type(batches).__name__}.")
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"`batches` is a dataset, {type(batches).__name__}, which gives single samples: pass "
            "DataLoader(dataset, batch_size=...)."
        )
    if isinstance(batches, tuple) and [getattr(item, "ndim", 2) < 2 for item in batches] == [0, 1]:
        raise TypeError("`batches` looks like one batch, (x, y): pass a list of it, [(x, y)].")


def _chunk_size(call: ModelCall, probed: Probe, given: int | None, one_vector: bool) -> int:
    """Return the most samples per forward pass.

    Batches that must not be joined are taken whole, unless the caller gives a size and the model
    takes batches of other sizes than the loader's.
    """
    if not probed.may_join:
        return given if given and call.single_sample != "copies" else sys.maxsize
    return given or probed.fitting_chunk(one_vector)


def explain(
    model: nn.Module,
    batch: Batch,
    *,
    forward: Forward | None = None,
    engine: EngineName = "auto",
) -> Explanation:
    """Return which engine `diagonal_fisher` would use for each parameter, and why.

    Args:
        model: As in `diagonal_fisher`.
        batch: Its first batch.
        forward: As in `diagonal_fisher`.
        engine: As in `diagonal_fisher`.

    Returns:
        Parameter name -> its engine and the layer rule, or the reason why none serves it; and, as
        `checks`, what was checked.

    Raises:
        ValueError: As in `diagonal_fisher`.
        TypeError: `batch` is a loader or a list of batches.

    Example:
        >>> explain(nn.Linear(3, 2, bias=False), (torch.zeros(4, 3),))["weight"].detail
        'linear'
    """
    check_options(FisherType.PREDICTED, forward=forward, engine=engine)
    check_model(model)
    several = isinstance(batch, list) and all(isinstance(b, tuple | Mapping) for b in batch)
    if isinstance(batch, DataLoader) or several:
        raise TypeError(
            f"`batch` must be one batch, such as (x, y), got a {type(batch).__name__} of them: "
            "pass its first one."
        )
    with evaluating(model) as state:
        call = ModelCall(model, forward or default_forward, trainable(model), state)
        samples, _ = first_samples(not_empty([batch]))
        if samples is None:
            raise ValueError("`batch` is empty: there is nothing to try the model on.")
        call, probed = probe(call, samples)
        return Explanation(make_plan(call, probed, engine), _checks(call, probed))


class Explanation(dict[str, Served]):
    """The engine of each parameter, by name, and what was checked.

    Attributes:
        checks: The checks that the choice is based on, one sentence each.
    """

    def __init__(self, served: dict[str, Served], checks: tuple[str, ...]) -> None:
        super().__init__(served)
        self.checks = checks


def _checks(call: ModelCall, probed: Probe) -> tuple[str, ...]:
    different = probed.samples.n_different
    how = {
        "single": "alone",
        "pair": "beside a copy of itself, as the model takes no batch of one",
        "copies": "in a batch of copies of itself, as the model takes no other batch size",
    }[call.single_sample]
    checks = [f"A sample's own logits are those that it has {how}."]
    if not probed.may_join:
        checks.append(f"Samples stay in the loader's batches: {probed.why_not_joined}.")
    else:
        checks.append(
            f"{different} different sample{'s have' if different > 1 else ' has'} the same logits "
            "in one batch as alone, entry by entry."
        )
    checks.append("Each rule and vmap gave the squares of the first sample's own backward pass.")
    checks.append(
        "During a pass the first chunk, the first one with samples of several batches and, in 1 % "
        "of the time, others are audited: logits and squares of a random sample against its own "
        "forward and backward pass."
    )
    return tuple(checks)


class _Progress:
    """A progress line on stderr, updated in place."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, N: int) -> None:
        seconds = time.monotonic() - self.started
        print(f"\rFisher: {N:,} samples, {seconds:.0f} s", end="", file=sys.stderr)

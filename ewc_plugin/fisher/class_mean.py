"""Squares of the classes' mean scores: the part of E[g^2] that lies between the classes.

With g_n the gradient of log p(c_n | x_n), c_n the sample's label, and G_c the sum of g_n over the
n_c samples of class c,

    F = sum_c (n_c / N) (G_c / n_c)^2 = 1/N sum_c G_c^2 / n_c.

By the law of total variance E[g^2] = F + the mean of the variances within the classes, so F is at
most the per-sample Fisher of the same labels, and equal to it where all samples of a class have one
gradient. It is no Fisher information. Avalanche's EWC computes about this by accident: it squares
the gradients of mini-batches, and its data come sorted by class.

A chunk of one class needs no per-sample gradients: one ordinary backward pass gives its part of
G_c. So samples wait until there are enough of a class. Predicted classes are known from the model
alone; there the data's label is a guess, and samples that the model predicts otherwise wait once
more, for the chunk of their predicted class.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ewc_plugin.batches import Batch, Chunk, n_samples, rechunk, take
from ewc_plugin.fisher.accumulate import AuditError
from ewc_plugin.fisher.additivity import differing, obstacle, summed_alone, summed_gradients
from ewc_plugin.fisher.audit import Auditor
from ewc_plugin.fisher.chunk import check_same_again, out_of_memory, score_factor
from ewc_plugin.fisher.label_scores import LabelScores, is_index
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.outputs import INTERACT, SamplesInteractError, check_finite
from ewc_plugin.fisher.per_sample import zeros
from ewc_plugin.fisher.result import check_finite_squares
from ewc_plugin.fisher.rules.base import Sums
from ewc_plugin.fisher.scores import (
    AT_DATA_LABELS,
    REVERSED_LOGITS,
    FisherType,
    Scores,
    score_vectors,
)

_Waiting = dict[int, list[Batch]]  # class -> its samples, each batch with its places [N]

_CHUNKS_WAITING = 16  # of samples, over all classes
_MOST_WRONG = 0.3  # share of wrong guesses above which a forward pass without a graph is cheaper


@dataclass
class ClassSums:
    """Sums of gradients by class, and how many samples each is of: at most C copies of the model.

    Attributes:
        like: A zero for each parameter.
        gradients: Class -> G_c.
        counts: Class -> n_c.
    """

    like: Sums
    gradients: dict[int, Sums] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, c: int, gradients: Sums, scale: float, n: int) -> None:
        """Add the summed gradients of n samples of class c, times `scale`."""
        if c not in self.gradients:
            self.gradients[c] = {name: torch.zeros_like(t) for name, t in self.like.items()}
            self.counts[c] = 0
        self.counts[c] += n
        for name, gradient in gradients.items():
            self.gradients[c][name].add_(gradient, alpha=scale)

    def mean(self) -> Sums:
        """F = 1/N sum_c G_c^2 / n_c.

        Returns:
            One tensor per parameter.

        Raises:
            ValueError: There is no sample, or a gradient is not finite.
        """
        N = sum(self.counts.values())
        if not N:
            raise ValueError("No sample of `batches` has a label other than `ignore_index`.")
        total = {name: torch.zeros_like(t) for name, t in self.like.items()}
        for c in sorted(self.gradients):
            for name, gradient in self.gradients[c].items():
                total[name] += gradient.square().div_(self.counts[c] * N)
        check_finite_squares(total)
        return total


_kept: ContextVar[list[ClassSums] | None] = ContextVar("class sums", default=None)


@contextmanager
def keeping_class_sums() -> Iterator[list[ClassSums]]:
    """Keep the sums of the passes inside it: those of parts of the data add up, their F do not.

    Yields:
        The list to which they are added.
    """
    kept: list[ClassSums] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


class ClassMeans:
    """The pass over the data: samples wait by class, and each chunk of one class goes back once.

    Args:
        call: The model.
        label_scores: Of a class mean.
        chunk_size: Samples per backward pass.
        may_regroup: Whether samples may leave the loader's batches. Otherwise each batch goes back
            once for every class in it.
        one_by_one: Whether each sample has a backward pass of its own.

    Attributes:
        N: Number of samples so far.
        limit: Samples per chunk.
        may_join: Whether a chunk may have samples of several of the loader's batches.
    """

    def __init__(
        self,
        call: ModelCall,
        label_scores: LabelScores,
        chunk_size: int,
        *,
        may_regroup: bool,
        one_by_one: bool,
    ) -> None:
        assert isinstance(label_scores.fisher_type, FisherType)
        self.call, self.label_scores = call, label_scores
        self._type = label_scores.fisher_type
        self.limit, self.may_join = chunk_size, may_regroup
        self.N = 0
        self._auditor, self._gradient_auditor = Auditor(), Auditor()
        self._generator = torch.Generator().manual_seed(0)
        self._most_audited = 1  # samples in a backward pass whose gradient was compared
        self._all_audited = True  # those with several
        self._one_by_one = one_by_one
        if not one_by_one and (reason := obstacle(call)):
            self._go_one_by_one(reason)
        self._sums = ClassSums(zeros(call.params))
        self._known: _Waiting = defaultdict(list)
        self._guessed: _Waiting = defaultdict(list)
        self._n_guesses = self._n_wrong = 0

    @property
    def n_labelled(self) -> int:
        """Number of samples that a mean is of."""
        return sum(self._sums.counts.values())

    def add(self, chunk: Chunk) -> None:
        """Add samples to those that wait, and compute the chunks that are full."""
        batch, first = chunk.own().batch, self.N
        self.N += n_samples(batch)
        if not self.may_join:
            self._pull_back_each_class(batch, first)
            return
        labels, waiting = self._grouped(batch, first)
        index = torch.arange(first, self.N, device=labels.device)  # their places in the stream
        self._wait(waiting, (batch, index), labels)
        for waiting in (self._guessed, self._known):
            for c in [c for c, parts in waiting.items() if _size(parts) >= self.limit]:
                self._flush(waiting, c)
        while self._n_waiting() > _CHUNKS_WAITING * self.limit:
            self._flush(*max(self._queues(), key=lambda queue: _size(queue[0][queue[1]])))

    def own_inputs(self) -> None:
        """Nothing to do: samples that wait are copies."""

    def _grouped(self, batch: Batch, first: int) -> tuple[Tensor, _Waiting]:
        """The classes of samples, and whether they are known or guessed."""
        if self._type in AT_DATA_LABELS:
            return self.label_scores.sample_labels(batch), self._known
        guess = self.label_scores.labels(batch)
        if is_index(guess, n_samples(batch)) and self._n_wrong <= _MOST_WRONG * self._n_guesses:
            return guess, self._guessed
        return self._predicted(batch, first), self._known

    def mean(self) -> Sums:
        """F, once no sample waits."""
        for waiting in (self._guessed, self._known):  # in this order: wrong guesses wait once more
            for c in sorted(waiting, key=lambda c: -_size(waiting[c])):  # audited first
                self._flush(waiting, c)
        kept = _kept.get()
        if kept is not None:
            kept.append(self._sums)
        return self._sums.mean()

    def _logits(self, batch: Batch, places: int | Tensor) -> Tensor:
        logits = class_logits(self.call, batch)
        check_finite(logits, places)
        check_same_again(self.call, batch, logits)
        return logits

    def _predicted(self, batch: Batch, first: int) -> Tensor:
        """The model's classes; with gradients on, as some models have other outputs without."""
        N = n_samples(batch)
        try:
            return self._logits(batch, first).detach().argmax(1)
        except RuntimeError as error:
            if N == 1 or not out_of_memory(error):
                raise
        self.limit = (N + 1) // 2
        parts = (slice(0, self.limit), slice(self.limit, N))
        return torch.cat([self._predicted(take(batch, part), first + part.start) for part in parts])

    def _wait(self, waiting: _Waiting, batch: Batch, labels: Tensor) -> None:
        for c in labels.unique().tolist():
            if c != self.label_scores.ignore_index or waiting is self._guessed:
                waiting[c].append(take(batch, (labels == c).nonzero()[:, 0]))

    def _queues(self) -> list[tuple[_Waiting, int]]:
        return [(waiting, c) for waiting in (self._guessed, self._known) for c in waiting]

    def _n_waiting(self) -> int:
        return sum(_size(waiting[c]) for waiting, c in self._queues())

    def _flush(self, waiting: _Waiting, c: int) -> None:
        """Compute all that waits for a class, in chunks."""
        parts = waiting.pop(c)
        guessed = waiting is self._guessed
        for chunk in rechunk(parts, lambda: self.limit, lambda: True):
            self._add_chunk(c, chunk.batch, guessed=guessed)

    def _add_chunk(self, c: int, batch: Batch, *, guessed: bool) -> None:
        """Add the gradients of a chunk's samples of class c, in halves where memory runs out."""
        N = n_samples(batch)
        try:
            self._pull_back(c, batch, guessed=guessed)
        except RuntimeError as error:
            if N == 1 or not out_of_memory(error):
                raise
        else:
            return
        self.limit = (N + 1) // 2
        for part in (slice(0, self.limit), slice(self.limit, N)):
            self._add_chunk(c, take(batch, part), guessed=guessed)

    def _pull_back(self, c: int, batch: Batch, *, guessed: bool) -> None:
        """Add the summed gradient of a chunk; samples that are of another class wait for that."""
        logits = self._logits(*batch)
        self._audit(batch, logits)
        labels = torch.full((len(logits),), c, device=logits.device)
        if not guessed:
            self.label_scores.check_labels(labels, logits)
            self._add_class(c, batch[0], logits, labels)
            return
        predicted = logits.detach().argmax(1)
        self._add_class(c, batch[0], logits, predicted)
        wrong = (predicted != c).nonzero()[:, 0]
        self._n_guesses += len(logits)
        self._n_wrong += len(wrong)
        if len(wrong):
            # From here on their class is known: rounding in another chunk does not change it.
            self._wait(self._known, take(batch, wrong), predicted[wrong])

    def _pull_back_each_class(self, batch: Batch, first: int) -> None:
        logits = self._logits(batch, first)
        labels = logits.detach().argmax(1)
        if self._type in AT_DATA_LABELS:
            labels = self.label_scores.sample_labels(batch)
            self.label_scores.check_labels(labels, logits)
        for c in labels.unique().tolist():
            if c != self.label_scores.ignore_index:
                self._add_class(c, batch, logits, labels, retain_graph=True)

    def _add_class(
        self,
        c: int,
        batch: Batch,
        logits: Tensor,
        labels: Tensor,
        *,
        retain_graph: bool = False,
    ) -> None:
        """Add the summed gradient of the samples that have label c."""
        own = labels == c
        if not (n := int(own.sum())):
            return
        if not self._sums.counts:
            self.label_scores.check_outputs(logits)
        kind = FisherType.REVERSED if self._type in REVERSED_LOGITS else FisherType.EMPIRICAL
        vectors = score_vectors(logits, kind, targets=labels.where(own, c).long())
        v = vectors.vector(0) * own[:, None]
        factor = score_factor(self.call, Scores(1, lambda s: v), logits)
        pulled = (v * factor).to(logits.dtype)
        rows = own.nonzero()[:, 0]
        gradients = self._gradients(batch, logits, pulled, rows, retain_graph=retain_graph)
        self._sums.add(c, gradients, 1 / factor, n)

    def _gradients(
        self, batch: Batch, logits: Tensor, v: Tensor, rows: Tensor, *, retain_graph: bool
    ) -> Sums:
        """The summed gradient of some samples, in one backward pass where they add up.

        That is tried on the first several samples, on twice as many, and in 1 % of the time.

        Args:
            batch: N samples.
            logits: Theirs [N, C].
            v: Vectors [N, C] at the logits.
            rows: Which samples have one.
            retain_graph: Whether the graph is needed again.

        Returns:
            sum_n J_n^T v_n.

        Raises:
            AuditError: They do not, and sums that nobody compared may be wrong.
        """
        N, n = len(logits), len(rows)
        if self._one_by_one and N > 1:
            return summed_alone(self.call, batch, logits, v, rows)
        must = self._most_audited == 1 or n >= 2 * self._most_audited
        audit = N > 1 and self._gradient_auditor.watch(N, must=must) is not None
        together = summed_gradients(self.call, logits, v, retain_graph=retain_graph or audit)
        if not audit:
            self._all_audited &= N == 1
            return together
        started = time.perf_counter()
        names = differing(self.call, batch, logits, v, rows, together, self._generator)
        self._gradient_auditor.spend(time.perf_counter() - started)
        if names:
            if not self._all_audited:
                raise AuditError(
                    f"An audit found, after {self.N} samples, that gradients of samples do "
                    f"not add up in one backward pass (seen at {', '.join(names)}), so the class "
                    "means so far may be wrong. Pass chunk_size=1."
                )
            self._go_one_by_one(f"seen at {', '.join(names)}")
            return summed_alone(self.call, batch, logits, v, rows)
        self._most_audited = max(n, self._most_audited)
        return together

    def _go_one_by_one(self, reason: str) -> None:
        self._one_by_one = True
        warnings.warn(
            f"Gradients of samples do not add up in one backward pass ({reason}): each sample goes "
            "back alone now, which is slower, and exact.",
            stacklevel=2,
        )

    def _audit(self, batch: Batch, logits: Tensor) -> None:
        """Compare a sample's logits with those that it has alone, in the first chunk and later."""
        watch = self._auditor.watch(len(logits), must=not self._auditor.count)
        if watch is None:
            return
        started = time.perf_counter()
        watch.scale = logits.detach()
        watch.logits = watch.scale[watch.n : watch.n + 1]
        alone = self.call.sample_logits(batch[0], watch.n)
        if not self._auditor.outputs_hold(self.call, batch[0], watch, alone):
            place = int(batch[1][watch.n])
            raise SamplesInteractError(
                f"`model` gives sample {place} of `batches` other logits alone than in a batch "
                f"of {len(logits)}: {INTERACT}"
            )
        self._auditor.spend(time.perf_counter() - started)


def class_logits(call: ModelCall, batch: Batch) -> Tensor:
    """The logits [N, C] of a batch; raise where a sample has several labels or none.

    Args:
        call: The model.
        batch: N samples.

    Returns:
        The logits.

    Raises:
        ValueError: They are dense, or one value per sample.
    """
    logits = call.logits(batch)
    if logits.dim() != 2:
        raise ValueError(
            "`fisher_type` 'class_mean' needs one label per sample and logits [N, C], got outputs "
            f"of shape {tuple(logits.shape)}. Use 'predicted' or 'empirical'."
        )
    return logits


def _size(parts: list[Batch]) -> int:
    return sum(len(places) for _, places in parts)

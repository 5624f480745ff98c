"""Running sums of squared gradients over the data; chunks that fail are computed again."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ewc_plugin.batches import Chunk, different_samples, n_entries, n_samples, versions
from ewc_plugin.fisher.audit import Auditor
from ewc_plugin.fisher.chunk import add_chunk, out_of_memory
from ewc_plugin.fisher.label_scores import LabelScores
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.outputs import INTERACT, SamplesInteractError
from ewc_plugin.fisher.plan import Served
from ewc_plugin.fisher.result import check_finite_squares
from ewc_plugin.fisher.rules.base import Sums
from ewc_plugin.fisher.scores import ScoreError
from ewc_plugin.fisher.tracing.layer_calls import Watch

_RECENT_ENTRIES = 2**20  # input entries stored for recomputation, at least


class AuditError(ValueError):
    """An audit failed when sums that may be wrong can no longer be computed again."""


@dataclass(frozen=True)
class _Change:
    """What is done otherwise when recent inputs are computed again.

    Attributes:
        limit: Samples per chunk; None: as before.
        may_join: Whether batches may still be joined.
        served: The parameters that have another engine now.
    """

    limit: int | None = None
    may_join: bool = True
    served: dict[str, Served] = field(default_factory=dict)


class Accumulator:
    """The running sums of squared gradients in one pass over the data.

    Squares are added to `_recent` first, and to `_sums` once in a while. Where memory runs out, or
    a chunk fails a check, `_recent` is dropped and its inputs, which are still stored, are computed
    again in another way. The inputs of `_sums` are no longer stored: an audit that fails once
    `_recent` has been merged into `_sums` is an error.

    Attributes:
        N: Number of samples so far.
        limit: Samples per chunk.
        may_join: Whether a chunk may have samples of several of the loader's batches.
        served: Which engine serves which parameter.

    Args:
        call: The model.
        served: The plan.
        label_scores: Gives the score vectors of a chunk.
        chunk_size: The first `limit`.
        may_join: As the attribute.
        probe_had_different_samples: Whether the probe's samples differ. Otherwise the first chunk
            with different ones is audited.
        memory: A tensor for each sum; its content is no longer needed. Fresh memory is slow.
    """

    def __init__(
        self,
        call: ModelCall,
        served: dict[str, Served],
        label_scores: LabelScores,
        chunk_size: int,
        *,
        may_join: bool,
        probe_had_different_samples: bool,
        memory: Sums,
    ) -> None:
        self.call, self.label_scores = call, label_scores
        self.served, self.limit, self.may_join = dict(served), chunk_size, may_join
        self.N = 0
        self.auditor = Auditor()
        self._audited_joined, self._audited_different = False, probe_had_different_samples
        self._sums: Sums = {}
        self._recent = {name: total.zero_() for name, total in memory.items()}
        self._ignored = self._recent_ignored = 0  # samples without a label
        self._inputs: list[Chunk] = []  # of `_recent`
        self._input_entries = 0
        self._most_entries = max(sum(p.numel() for p in call.params.values()), _RECENT_ENTRIES)
        self._generator_state = label_scores.generator.get_state()  # before the first of them

    @property
    def n_labelled(self) -> int:
        """Number of samples so far that have a label where labels are read."""
        return self.N - self._ignored - self._recent_ignored

    def mean(self) -> Sums:
        """The sums over samples, divided once."""
        self._merge_recent()
        if not self.n_labelled:
            raise ValueError(
                "No sample of `batches` has a label other than `ignore_index`, so there is no "
                "Fisher."
            )
        check_finite_squares(self._sums)
        return {name: total.div_(self.n_labelled) for name, total in self._sums.items()}

    def add(self, chunk: Chunk) -> None:
        """Add the squares of a chunk, split into parts if the model or memory requires it."""
        waiting = [chunk]
        while waiting:
            chunk = waiting.pop(0)
            if len(parts := self._parts(chunk)) > 1:
                waiting = parts + waiting
                continue
            change = self._attempt(chunk)
            # Once `_attempt` has returned, the memory of a failed attempt is free again.
            if change is None:
                self._keep(chunk)
            else:
                self._apply(change)
                waiting = [*self._drop_recent(), chunk, *waiting]

    def own_inputs(self) -> None:
        """Copy the stored inputs that lie in the loader's memory, which it may use again."""
        self._inputs = [chunk.own() for chunk in self._inputs]

    def _parts(self, chunk: Chunk) -> list[Chunk]:
        """Return the parts of a chunk that may be computed at once, as far as is known now."""
        if len(chunk.sizes) > 1 and not self.may_join:
            return chunk.split()
        N, limit = n_samples(chunk.batch), self.limit
        if limit >= N:
            return [chunk]
        return [chunk.part(start, start + limit) for start in range(0, N, limit)]

    def _attempt(self, chunk: Chunk) -> _Change | None:
        """Add one chunk to the recent sums; return what must change if that failed."""
        N, joined = n_samples(chunk.batch), len(chunk.sizes) > 1
        watch = self.auditor.watch(N, must=self._must_audit(chunk, joined))
        before = versions(chunk.batch)
        try:
            ignored = add_chunk(
                self.call,
                self.served,
                self.label_scores,
                chunk.batch,
                self.N,
                self._recent,
                watch,
            )
            if versions(chunk.batch) != before:  # unlike in the probe, the model works in place
                self.call = replace(self.call, copies_input=True)
            change = None if watch is None else self._audit(chunk, watch, joined)
        except (ScoreError, AuditError):
            raise
        except Exception as error:  # whatever a model's code raises
            if isinstance(error, RuntimeError) and out_of_memory(error):
                if N == 1:
                    raise
                return _Change(limit=(N + 1) // 2)
            if not joined:
                raise
            return _Change(may_join=False)  # more samples than the loader gives
        if change is None:
            self._recent_ignored += ignored
        return change

    def _apply(self, change: _Change) -> None:
        self.limit = change.limit or self.limit
        self.may_join &= change.may_join
        self.served |= change.served

    def _keep(self, chunk: Chunk) -> None:
        """Store a chunk whose squares are among the recent sums."""
        self._inputs.append(chunk)
        self.N += n_samples(chunk.batch)
        self._input_entries += n_entries(chunk.batch)
        if self._input_entries > self._most_entries:
            self._merge_recent()

    def _must_audit(self, chunk: Chunk, joined: bool) -> bool:
        if not self.auditor.count or (joined and not self._audited_joined):
            return True
        if not self._audited_different and len(different_samples(chunk.batch, 2)) > 1:
            self._audited_different = True
            return True
        return False

    def _audit(self, chunk: Chunk, watch: Watch, joined: bool) -> _Change | None:
        """Compare one sample of a chunk with the loop; return what must change if they differ."""
        started = time.perf_counter()
        index = self.N + watch.n
        alone = self.call.sample_logits(chunk.batch, watch.n)
        if not self.auditor.outputs_hold(self.call, chunk.batch, watch, alone):
            if not joined:
                raise SamplesInteractError(
                    f"`model` gives sample {index} of `batches` other logits alone than in a batch "
                    f"of {n_samples(chunk.batch)}: {INTERACT}"
                )
            self._check_nothing_merged("samples of several batches interact", "chunk_size=1")
            # Batches of the loader's may interact too, where nobody has looked: the loop compares
            # every sample alone with its batch.
            loop = dict.fromkeys(self.served, Served("loop", "joined samples interact"))
            return _Change(may_join=False, served=loop)
        names = self.auditor.differing(self.call, self.served, chunk.batch, watch, alone)
        self.auditor.spend(time.perf_counter() - started)
        if not names:
            self._audited_joined |= joined
            return None
        self._check_nothing_merged(
            f"the squares of sample {index} for {', '.join(names)} are not those of the sample "
            "loop",
            "engine='loop'",
        )
        warnings.warn(
            f"The squares of sample {index} for {', '.join(names)} are not those of the sample "
            "loop, which serves these parameters now: slower, and exact.",
            stacklevel=2,
        )
        return _Change(served=dict.fromkeys(names, Served("loop", "an audit found other squares")))

    def _check_nothing_merged(self, what: str, remedy: str) -> None:
        if self._sums:
            raise AuditError(
                f"An audit found, after {self.N} samples, that {what}, so the Fisher so far may be "
                f"wrong. Pass {remedy}."
            )

    def _merge_recent(self) -> None:
        if not self._sums:
            self._sums, self._recent = self._recent, _LazyZeros(self._recent)
        else:
            for name, total in self._recent.items():
                self._sums[name] += total
                total.zero_()
        self._ignored, self._recent_ignored = self._ignored + self._recent_ignored, 0
        self._inputs, self._input_entries = [], 0
        self._generator_state = self.label_scores.generator.get_state()

    def _drop_recent(self) -> list[Chunk]:
        """Set the recent sums to zero; return their inputs, to be computed again."""
        inputs, self._inputs, self._input_entries = self._inputs, [], 0
        for total in self._recent.values():
            total.zero_()
        self._recent_ignored = 0
        self.label_scores.generator.set_state(self._generator_state)
        self.N -= sum(n_samples(chunk.batch) for chunk in inputs)
        return inputs


class _LazyZeros(dict[str, Tensor]):
    """A dict of sums that creates a zero tensor when a parameter is first accessed."""

    def __init__(self, like: Sums) -> None:
        super().__init__()
        self._like = like

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.zeros_like(self._like[name])
        return self[name]

"""The pass over the data: running sums, and smaller chunks where memory runs out."""

import math

import torch
from torch import Tensor

from ewc_plugin.batches import Batch, n_entries, n_samples, take
from ewc_plugin.fisher.chunk import add_chunk, out_of_memory
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.per_sample import zeros
from ewc_plugin.fisher.plan import Plan
from ewc_plugin.fisher.rules.base import Sums
from ewc_plugin.fisher.scores import LabelScores

_RECENT_ENTRIES = 2**20  # of inputs kept for a repetition, where the parameters are fewer


class Accumulator:
    """The running sums of one pass.

    Squares are added to `_recent` first, and to `_sums` once in a while. Where memory runs out,
    `_recent` is dropped and its inputs, still kept, are repeated in chunks of half the size.

    Attributes:
        N: Number of samples so far.
    """

    def __init__(self, call: ModelCall, plan: Plan, label_scores: LabelScores) -> None:
        self.call = call.on_copies() if plan.overwrites_input else call
        self.served, self.limit = dict(plan.served), plan.chunk_size
        self.label_scores = label_scores
        self.N = 0
        self._sums: Sums = {}
        self._recent = zeros(call.params)
        self._inputs: list[Batch] = []  # of `_recent`
        self._input_entries = 0
        self._most_entries = max(sum(p.numel() for p in call.params.values()), _RECENT_ENTRIES)
        self._generator_state = label_scores.generator.get_state()  # before the first of them

    def mean(self) -> Sums:
        """The sums over samples, divided once."""
        self._merge_recent()
        for name, total in self._sums.items():
            if total.numel() and not math.isfinite(float(total.max())):  # squares: no -inf
                raise ValueError(
                    f"The Fisher of `{name}` is not finite: its gradients overflow {total.dtype}."
                )
        return {name: total.div_(self.N) for name, total in self._sums.items()}

    def add(self, batch: Batch) -> None:
        """Adds a batch's squares, in halves where memory runs out."""
        N = n_samples(batch)
        if (step := self.limit) < N:  # fixed here: a part that runs out of memory lowers the limit
            for start in range(0, N, step):
                self.add(take(batch, slice(start, start + step)))
            return
        self._inputs.append(batch)
        try:
            add_chunk(self.call, self.served, self.label_scores, batch, self.N, self._recent)
        except RuntimeError as error:
            if N == 1 or not out_of_memory(error):
                raise
        else:
            self.N += N
            self._input_entries += n_entries(batch)
            if self._input_entries > self._most_entries:
                self._merge_recent()
            return
        # Out here the failed attempt's frames are gone, and with them the memory they used.
        self.limit = (N + 1) // 2
        self._repeat_recent()

    def _merge_recent(self) -> None:
        if not self._sums:
            self._sums, self._recent = self._recent, _LazyZeros(self._recent)
        else:
            for name, total in self._recent.items():
                self._sums[name] += total
                total.zero_()
        self._inputs, self._input_entries = [], 0
        self._generator_state = self.label_scores.generator.get_state()

    def _repeat_recent(self) -> None:
        """Drops the recent sums, and adds their inputs once more."""
        inputs, self._inputs, self._input_entries = self._inputs, [], 0
        for total in self._recent.values():
            total.zero_()
        self.label_scores.generator.set_state(self._generator_state)
        self.N -= sum(n_samples(batch) for batch in inputs[:-1])  # the last one was never counted
        for batch in inputs:
            self.add(batch)


class _LazyZeros(dict[str, Tensor]):
    """A zero sum is made for a parameter when something is first added to it."""

    def __init__(self, like: Sums) -> None:
        super().__init__()
        self._like = like

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.zeros_like(self._like[name])
        return self[name]

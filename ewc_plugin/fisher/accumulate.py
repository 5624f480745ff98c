"""The pass over the data: one backward per score vector, each parameter by its own engine."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch, copied, n_entries, n_samples, take
from ewc_plugin.fisher.logits import check_finite, checked_logits
from ewc_plugin.fisher.one_hidden_layer import find_readout
from ewc_plugin.fisher.per_sample import Forward, loop_squares, vmap_squares, zeros
from ewc_plugin.fisher.plan import Plan, Served
from ewc_plugin.fisher.rules.base import Layout, Sums
from ewc_plugin.fisher.scores import Scores
from ewc_plugin.fisher.tracing.capture import Capture
from ewc_plugin.fisher.tracing.layer_calls import Record, Trace, parameters_in_graph

_VECTORS_AT_ONCE = 32  # handed to the samplewise engines, which repeat the forward pass per block
_HELD_ENTRIES = 2**20  # of inputs that wait for the commit, where the parameters are fewer


class EnginePass:
    """The running sums of one pass.

    Sums go to `pending` first, and to `sums` once in a while: where memory runs out, what is
    pending is dropped and its inputs, still held, go through again in halves.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        params: dict[str, nn.Parameter],
        plan: Plan,
        scores: Callable[[Batch, Tensor], Scores],
        generator: torch.Generator,
    ) -> None:
        self.model, self.params = model, params
        self.forward = _on_a_copy(forward) if plan.overwrites_input else forward
        self.served, self.limit = dict(plan.served), plan.chunk_size
        self.scores, self.generator = scores, generator
        self.sums: Sums = {}
        self.pending = zeros(params)
        self.held: list[Batch] = []  # whose squares are pending
        self._held_entries = 0
        self._most_held = max(sum(p.numel() for p in params.values()), _HELD_ENTRIES)
        self.N = 0
        self._state = generator.get_state()  # before the first of them
        self._unscale = 1.0
        self._n_vectors = 1

    def mean(self) -> Sums:
        """The sums over samples, divided once."""
        self._commit()
        for name, total in self.sums.items():
            if total.numel() and not math.isfinite(float(total.max())):  # squares: no -inf
                raise ValueError(
                    f"The Fisher of `{name}` is not finite: its gradients overflow {total.dtype}."
                )
        return {name: total.div_(self.N) for name, total in self.sums.items()}

    def add(self, batch: Batch) -> None:
        """Adds a batch's squares, in halves where memory runs out."""
        N = n_samples(batch)
        if (step := self.limit) < N:  # fixed here: a part that runs out of memory lowers the limit
            for start in range(0, N, step):
                self.add(take(batch, slice(start, start + step)))
            return
        self.held.append(batch)
        try:
            self._add_chunk(batch, N)
        except RuntimeError as error:
            if N == 1 or not out_of_memory(error):
                raise
        else:
            self.N += N
            self._held_entries += n_entries(batch)
            if self._held_entries > self._most_held:
                self._commit()
            return
        # Out here the failed attempt's frames are gone, and with them the memory they held.
        self.limit = (N + 1) // 2
        self._again()

    def _commit(self) -> None:
        if not self.sums:
            self.sums, self.pending = self.pending, _LazyZeros(self.pending)
        else:
            for name, total in self.pending.items():
                self.sums[name] += total
                total.zero_()
        self.held, self._held_entries = [], 0
        self._state = self.generator.get_state()

    def _again(self) -> None:
        """Drops what is pending, and adds the inputs held once more."""
        held, self.held, self._held_entries = self.held, [], 0
        for total in self.pending.values():
            total.zero_()
        self.generator.set_state(self._state)
        self.N -= sum(n_samples(batch) for batch in held[:-1])  # the last one was never counted
        for batch in held:
            self.add(batch)

    def _add_chunk(self, batch: Batch, N: int) -> None:
        """Adds a chunk's squares to the pending sums."""
        logits, trace = self._trace(batch, N)
        check_finite(logits, self.N)
        if moved := self._misfits(logits, trace, N):
            for name in moved:
                self.served[name] = Served("loop", "its calls depend on the data")
            self._add_chunk(batch, N)
            return
        scores = self.scores(batch, logits)
        if not self._served("vmap", "loop") and (readout := find_readout(trace, logits, scores)):
            vectors = [scores.vector(s).to(logits.dtype) for s in range(scores.count)]
            readout.add(trace, torch.stack(vectors, 1))
        else:
            self._pull_back(batch, logits, scores, trace)
        del logits
        for record in trace.records:
            record.finish(self._layout(record), N, self.pending)

    def _pull_back(self, batch: Batch, logits: Tensor, scores: Scores, trace: Trace) -> None:
        """One backward pass per vector, and the samplewise engines on blocks of them."""
        scale = self._scale(scores, logits)
        self._unscale, self._n_vectors = 1 / scale, scores.count
        samplewise = self._served("vmap", "loop")
        vectors: list[Tensor] = []
        for s in range(scores.count):
            v = (scores.vector(s) * scale).to(logits.dtype)
            last = s == scores.count - 1
            trace.pull_back(logits, v, retain_graph=not last)
            if samplewise:
                vectors.append(v)
            if vectors and (last or len(vectors) == _VECTORS_AT_ONCE):
                self._samplewise(batch, torch.stack(vectors, 1))
                vectors = []

    def _scale(self, scores: Scores, logits: Tensor) -> float:
        """A power of two that brings half-precision score vectors to size 1, off the underflow."""
        dtypes = {logits.dtype, *(p.dtype for p in self.params.values())}
        wide = all(torch.finfo(dtype).bits >= 32 for dtype in dtypes)
        if wide and not torch.is_autocast_enabled(logits.device.type):
            return 1.0
        largest = max(float(scores.vector(s).abs().max()) for s in range(scores.count))
        return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0

    def _served(self, *engines: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.params.items() if self.served[name].engine in engines}

    def _layout(self, record: Record) -> Layout:
        layout = self.served[next(iter(record.call.names.values()))].layout
        assert layout is not None
        return layout

    def _trace(self, batch: Batch, N: int) -> tuple[Tensor, Trace]:
        def receive(record: Record, g: Tensor) -> None:
            record.add(
                g,
                self._layout(record),
                N,
                self.pending,
                count=self._n_vectors,
                unscale=self._unscale,
            )

        names = {id(p): name for name, p in self._served("rules").items()}
        with Capture(self.model, names, receive) as capture:
            logits = checked_logits(self.model, self.forward, batch)
        return logits, capture.trace

    def _misfits(self, logits: Tensor, trace: Trace, N: int) -> set[str]:
        """Parameters used in another way than in the trial: data-dependent control flow."""
        calls = Counter(name for r in trace.records for name in r.call.names.values())
        outside = parameters_in_graph(logits)
        misfits = {
            name
            for name, p in self._served("rules").items()
            if id(p) in outside and name not in trace.claimed
        }
        for record in trace.records:
            for name in record.call.names.values():
                layout = self.served[name].layout
                if calls[name] > 1 or layout is None or not record.fits(layout, N):
                    misfits |= set(record.call.names.values())
        return misfits | set(trace.barred)

    def _samplewise(self, batch: Batch, vectors: Tensor) -> None:
        """Adds the squares of the parameters that no rule serves."""
        if params := self._served("vmap"):
            try:
                sums = vmap_squares(self.model, self.forward, params, batch, vectors)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                for name in params:
                    self.served[name] = Served("loop", f"vmap: {error}")
            else:
                for name, total in sums.items():
                    self.pending[name] += total * self._unscale**2
        if params := self._served("loop"):
            for name, total in loop_squares(
                self.model, self.forward, params, batch, vectors
            ).items():
                self.pending[name] += total * self._unscale**2


def _on_a_copy(forward: Forward) -> Forward:
    return lambda model, batch: forward(model, copied(batch))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    text = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


class _LazyZeros(dict[str, Tensor]):
    """A zero sum is made for a parameter when something is first added to it."""

    def __init__(self, like: Sums) -> None:
        super().__init__()
        self._like = like

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.zeros_like(self._like[name])
        return self[name]

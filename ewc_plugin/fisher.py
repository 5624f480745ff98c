"""`diagonal_fisher`: batches in, one tensor per trainable parameter out."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_plugin.batched import batched_importances
from ewc_plugin.batches import Batch, n_samples, rechunk, subset
from ewc_plugin.capture import Capture, Record, Trace, parameters_in_graph
from ewc_plugin.guard import evaluating
from ewc_plugin.probe import EngineName, Plan, Served, checked_logits, make_plan
from ewc_plugin.rules.base import Layout, Sums
from ewc_plugin.samplewise import Forward, loop_squares, vmap_squares, zeros
from ewc_plugin.scores import FisherType, Scores, score_vectors

_SEED = 0  # of the generator that is made where none is passed
_VECTORS_AT_ONCE = 32  # handed to the samplewise engines, which repeat the forward pass per block


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    fisher_type: FisherType | str = FisherType.PREDICTED,
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
        fisher_type: Which labels E_y runs over.
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
    fisher_type = FisherType.parse(fisher_type)
    _check_arguments(fisher_type, criterion, n_draws, max_samples, chunk_size, engine)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("`model` has no parameter with requires_grad=True, so it has no Fisher.")
    forward = forward or _first_item
    targets = targets or _second_item
    generator = generator or torch.Generator().manual_seed(_SEED)
    with evaluating(model):
        if fisher_type is FisherType.BATCHED:
            return batched_importances(
                model, params, batches, forward, targets, criterion or F.cross_entropy
            )
        if max_samples is not None:
            batches = subset(batches, max_samples, generator)

        def scores(batch: Batch, logits: Tensor) -> Scores:
            y = None
            if fisher_type is FisherType.EMPIRICAL:
                y = _checked_targets(targets(batch), logits)
            return score_vectors(
                logits, fisher_type, targets=y, n_draws=n_draws, generator=generator
            )

        engine_pass: _Pass | None = None
        for batch in rechunk(batches, chunk_size or 512):
            if engine_pass is None:
                plan = make_plan(model, forward, params, batch, engine)
                engine_pass = _Pass(model, forward, params, plan, scores)
            engine_pass.add(batch)
        if engine_pass is None:
            raise ValueError("`batches` is empty: a Fisher needs at least one sample.")
    return engine_pass.mean()


class _Pass:
    """The running sums of one pass."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        params: dict[str, nn.Parameter],
        plan: Plan,
        scores: Callable[[Batch, Tensor], Scores],
    ) -> None:
        self.model, self.forward, self.params, self.plan = model, forward, params, dict(plan)
        self.scores = scores
        self.sums = zeros(params)
        self.N = 0

    def mean(self) -> Sums:
        """The sums over samples, divided once."""
        for name, total in self.sums.items():
            if not bool(torch.isfinite(total).all()):
                raise ValueError(f"The Fisher of `{name}` is not finite: its gradients overflow.")
        return {name: total / self.N for name, total in self.sums.items()}

    def add(self, batch: Batch) -> None:
        """Adds one chunk's squares."""
        N = n_samples(batch)
        chunk: Sums = _LazyZeros(self.sums)
        logits, trace = self._trace(batch, N, chunk)
        self._check_finite(logits, N)
        if moved := self._misfits(logits, trace, N):
            for name in moved:
                self.plan[name] = Served("loop", "its calls depend on the data")
            self.add(batch)
            return
        scores = self.scores(batch, logits)
        vectors: list[Tensor] = []
        for s in range(scores.count):
            v = scores.vector(s).to(logits.dtype)
            last = s == scores.count - 1
            trace.pull_back(logits, v, retain_graph=not last)
            vectors.append(v)
            if last or len(vectors) == _VECTORS_AT_ONCE:
                self._samplewise(batch, torch.stack(vectors, 1), chunk)
                vectors = []
        for record in trace.records:
            record.add_pool(self._layout(record), N, self.sums)
        for name, s_chunk in chunk.items():
            self.sums[name] += s_chunk
        self.N += N

    def _served(self, *engines: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.params.items() if self.plan[name].engine in engines}

    def _layout(self, record: Record) -> Layout:
        layout = self.plan[next(iter(record.call.names.values()))].layout
        assert layout is not None
        return layout

    def _trace(self, batch: Batch, N: int, chunk: Sums) -> tuple[Tensor, Trace]:
        def receive(record: Record, g: Tensor) -> None:
            record.add(g, self._layout(record), N, chunk)

        names = {id(p): name for name, p in self._served("rules").items()}
        device = next(iter(self.params.values())).device
        with Capture(names, device, receive) as capture:
            logits = checked_logits(self.model, self.forward, batch)
        return logits, capture.trace

    def _misfits(self, logits: Tensor, trace: Trace, N: int) -> set[str]:
        """Parameters used in another way than in the trial: data-dependent control flow."""
        calls = Counter(name for r in trace.records for name in r.call.names.values())
        outside = parameters_in_graph(logits)
        misfits = {name for name, p in self._served("rules").items() if id(p) in outside}
        for record in trace.records:
            for name in record.call.names.values():
                layout = self.plan[name].layout
                if calls[name] > 1 or layout is None or not record.fits(layout, N):
                    misfits |= set(record.call.names.values())
        return misfits | set(trace.barred)

    def _samplewise(self, batch: Batch, vectors: Tensor, chunk: Sums) -> None:
        """Adds the squares of the parameters that no rule serves."""
        if params := self._served("vmap"):
            try:
                sums = vmap_squares(self.model, self.forward, params, batch, vectors)
            except RuntimeError as error:
                for name in params:
                    self.plan[name] = Served("loop", f"vmap: {error}")
            else:
                for name, total in sums.items():
                    chunk[name] += total
        if params := self._served("loop"):
            for name, total in loop_squares(
                self.model, self.forward, params, batch, vectors
            ).items():
                chunk[name] += total

    def _check_finite(self, logits: Tensor, N: int) -> None:
        """Raises on NaN, inf, or a sample without any finite logit; -inf masks a class."""
        bad = logits.isnan() | (logits == torch.inf)
        bad = bad.any(1) | (logits == -torch.inf).all(1)
        if bool(bad.any()):
            first = self.N + int(bad.nonzero()[0])
            raise ValueError(
                f"`model` gave a logit that is not finite for sample {first} of `batches` "
                f"(counted from 0, in the order they came). Did the training diverge?"
            )


class _LazyZeros(dict[str, Tensor]):
    """A zero sum is made for a parameter when something is first added to it."""

    def __init__(self, like: Sums) -> None:
        super().__init__()
        self._like = like

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.zeros_like(self._like[name])
        return self[name]


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
    fisher_type: FisherType,
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
            f"`criterion` enters fisher_type 'batched' alone, got {fisher_type.value!r}."
        )
    if n_draws != 1 and fisher_type is not FisherType.SAMPLED:
        raise ValueError(
            f"`n_draws` enters fisher_type 'sampled' alone, got {fisher_type.value!r}."
        )
    if fisher_type is FisherType.BATCHED and (max_samples or chunk_size):
        raise ValueError(
            "`max_samples` and `chunk_size` would change what fisher_type 'batched' computes. "
            "Leave them out."
        )

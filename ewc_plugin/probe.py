"""Decides before the pass which engine serves which parameter, by a trial on three samples.

The trial finds each recorded tensor's sample axis, and every choice is checked against the loop
over single samples: a parameter that a layer rule gets wrong (called twice, tied, used outside the
recorded call, samples reordered) is served by `vmap(grad)`, and where that fails, by the loop.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ewc_plugin.batches import Batch, copied, has_samples, n_samples, take
from ewc_plugin.capture import Capture, OverwrittenError, Record, Trace, parameters_in_graph
from ewc_plugin.rules.base import Layout, Sums
from ewc_plugin.samplewise import Forward, add_gradient_squares, vmap_squares, zeros

EngineName = Literal["auto", "rules", "vmap", "loop"]

_CHUNK_ENTRIES = 2**23  # of the layers' outputs in one forward pass
_SMALLEST_CHUNK, _LARGEST_CHUNK = 16, 512
_TRIAL = 3  # samples
_SCORED = 2  # of them: one would not tell a sum of squares from the square of a sum


@dataclass(frozen=True)
class Served:
    """Who serves one parameter.

    Attributes:
        engine: "rules", "vmap" or "loop".
        detail: The layer rule's name, or why no rule serves it.
        layout: Where a rule finds the samples.
    """

    engine: Literal["rules", "vmap", "loop"]
    detail: str
    layout: Layout | None = None


@dataclass(frozen=True)
class Plan:
    """Who serves each parameter.

    Attributes:
        served: An entry per parameter, in order.
        chunk_size: Samples per forward pass.
        overwrites_input: Whether the model works in place on its input and so needs a copy.
    """

    served: dict[str, Served]
    chunk_size: int
    overwrites_input: bool


def checked_logits(model: nn.Module, forward: Forward, batch: Batch) -> Tensor:
    """The logits [N, C] of a batch, refused where they can't be a classifier's.

    Args:
        model: The model.
        forward: Maps (model, batch) to logits.
        batch: N samples.

    Returns:
        What `forward` returned.

    Raises:
        ValueError: Not a tensor [N, C] with C >= 2.
    """
    logits = forward(model, batch)
    N = n_samples(batch)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"`model` must return logits [N, C], got {type(logits).__name__}. "
            "Pass `forward`, which maps (model, batch) to them."
        )
    if logits.dim() != 2 or len(logits) != N:
        raise ValueError(
            f"`model` must return logits [N, C], got shape {tuple(logits.shape)} for N = {N}. "
            "Pass `forward`, which maps (model, batch) to them."
        )
    if logits.size(1) < 2:
        raise ValueError(
            "`model` must return logits of at least 2 classes, got 1, whose softmax is constant. "
            "Give a binary head two logits, or use fisher_type 'batched' with your `criterion`."
        )
    return logits


def check_finite(logits: Tensor, first: int) -> None:
    """Refuses NaN, inf, and a sample without any finite logit; -inf masks a class.

    Args:
        logits: [N, C].
        first: Index of its first sample in the whole stream.

    Raises:
        ValueError: A logit is not finite.
    """
    masked = logits == -torch.inf
    bad = (~logits.isfinite() & ~masked).any(1) | masked.all(1)
    if bool(bad.any()):
        raise ValueError(
            f"`model` gave a logit that is not finite for sample {first + int(bad.nonzero()[0])} "
            "of `batches` (counted from 0, in the order they came). Did the training diverge?"
        )


def make_plan(
    model: nn.Module,
    forward: Forward,
    params: dict[str, nn.Parameter],
    batch: Batch,
    engine: EngineName,
    chunk_size: int | None = None,
) -> Plan:
    """Who serves which parameter.

    Args:
        model: In eval mode.
        forward: Maps (model, batch) to logits.
        params: The trainable parameters.
        batch: Its first three samples are tried (repeated where there are fewer).
        engine: "auto", or one engine that must serve all.
        chunk_size: Samples per forward pass; chosen where it is None.

    Returns:
        An entry per parameter, in order, and the number of samples per chunk.

    Raises:
        ValueError: The samples of a batch interact, or the forced engine can't serve a parameter.
    """
    trial = _Trial(model, forward, params, batch)
    chunk_size = chunk_size or trial.chunk_size()
    if engine == "loop":
        served = {name: Served("loop", "forced") for name in params}
        return Plan(served, chunk_size, trial.overwrites_input)
    plan: dict[str, Served] = {}
    reasons = dict.fromkeys(params, "forced")
    if engine != "vmap":
        plan, reasons = trial.rules()
    if engine == "rules" and reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"`engine` 'rules' can't serve every parameter ({listed}). Use 'auto'.")
    if reasons:
        failure = trial.vmap_failure({name: params[name] for name in reasons})
        if failure and engine == "vmap":
            raise ValueError(f"`engine` 'vmap' can't serve this model ({failure}). Use 'auto'.")
        for name, reason in reasons.items():
            if failure:
                plan[name] = Served("loop", f"{reason}; vmap: {failure}")
            else:
                plan[name] = Served("vmap", reason)
    served = {name: plan[name] for name in params}
    return Plan(served, chunk_size, trial.overwrites_input)


class _Trial:
    """Three samples, random vectors at their logits, and the loop's answer."""

    def __init__(
        self, model: nn.Module, forward: Forward, params: dict[str, nn.Parameter], batch: Batch
    ) -> None:
        self.model, self.forward, self.params = model, forward, params
        self.batch = take(batch, torch.arange(_TRIAL) % n_samples(batch))
        self.received: dict[int, Tensor] = {}  # id of a record -> the gradient it received
        self.logits, self.trace = self._run(self.batch, self._receive)
        half = torch.finfo(self.logits.dtype).bits < 32
        self.tolerance = 0.1 if half else 0.01
        check_finite(self.logits, 0)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(_SCORED, self.logits.size(1), generator=generator, dtype=torch.float64)
        # The last sample has no score: whatever lands in its rows still shows.
        self.v = F.pad(v.to(self.logits), (0, 0, 0, _TRIAL - _SCORED))
        self.reference = zeros(params)
        for n in reversed(range(_SCORED)):
            alone, self.trace_alone = self._run(take(self.batch, slice(n, n + 1)), None)
            self._check_independence(alone, self.logits[n : n + 1])
            add_gradient_squares(self.reference, params, alone, self.v[n : n + 1])

    def _run(
        self, batch: Batch, receive: Callable[[Record, Tensor], None] | None
    ) -> tuple[Tensor, Trace]:
        names = {id(p): name for name, p in self.params.items()}
        batch = copied(batch)  # the model may work on its input in place
        with Capture(self.model, names, receive) as capture:
            logits = checked_logits(self.model, self.forward, batch)
        leaves = [leaf for leaf in tree_leaves(batch) if has_samples(leaf)]
        self.overwrites_input = any(leaf._version for leaf in leaves)
        return logits, capture.trace

    def _receive(self, record: Record, g: Tensor) -> None:
        self.received[id(record)] = g

    def chunk_size(self) -> int:
        """Samples whose recorded tensors fill the cache's neighbourhood, not the memory."""
        entries = sum(leaf.numel() for leaf in tree_leaves(self.batch) if has_samples(leaf))
        for record in self.trace.records:
            # Convolutions are slower on a large batch: they keep reordered copies of their inputs.
            copies = 2 if record.rule.name.startswith("conv") else 1
            entries += copies * record.out_shape.numel()
        weights = sum(p.numel() for p in self.params.values())
        # Each chunk also passes once over all sums: many weights want many samples.
        fitting = max(_CHUNK_ENTRIES, 2 * weights) * _TRIAL // entries
        power_of_two = 1 << (fitting.bit_length() - 1) if fitting else 1
        return min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, power_of_two))

    def _check_independence(self, alone: Tensor, together: Tensor) -> None:
        """Raises where a sample's logits depend on its batch, or on chance."""
        if alone.shape == together.shape:
            masked = alone == together  # -inf
            difference = (alone - together).detach().masked_fill(masked, 0).abs()
            scale = together.detach().masked_fill(together == -torch.inf, 0).abs().max()
            if not bool((difference > self.tolerance * scale).any()):
                return
        raise ValueError(
            "`model` gives a sample other logits alone than in a batch of three: its samples "
            "interact or its forward is random, so no per-sample Fisher exists. Switch batch "
            "statistics and noise off, or use fisher_type 'batched'."
        )

    def rules(self) -> tuple[dict[str, Served], dict[str, str]]:
        """What the layer rules serve, and for all other parameters the reason."""
        plan: dict[str, Served] = {}
        self.trace.pull_back(self.logits, self.v, retain_graph=True)
        calls = Counter(name for r in self.trace.records for name in r.call.names.values())
        outside = parameters_in_graph(self.logits)
        reasons = {
            name: self._structural(name, p, calls, outside) for name, p in self.params.items()
        }
        reasons = {name: reason for name, reason in reasons.items() if reason}
        comparable = [r.call.names for r in self.trace.records] == [
            r.call.names for r in self.trace_alone.records
        ]
        for record, single in zip(self.trace.records, self.trace_alone.records, strict=False):
            for name in record.call.names.values():
                if name not in reasons and not comparable:
                    reasons[name] = "its calls depend on the data"
            if any(name in reasons for name in record.call.names.values()):
                for name in record.call.names.values():
                    reasons.setdefault(name, "its layer's other parameter has no rule")
                continue
            served = self._layout(record, _layouts(record.out_shape, single.out_shape))
            for name in record.call.names.values():
                if isinstance(served, Served):
                    plan[name] = served
                else:
                    reasons[name] = served
        for name in self.params:
            if name not in plan and name not in reasons:
                if bool(self.reference[name].any()):
                    reasons[name] = "no layer rule sees it"
                else:
                    plan[name] = Served("rules", "unused")
        return plan, {name: reasons[name] for name in self.params if name in reasons}

    def _structural(
        self, name: str, p: nn.Parameter, calls: "Counter[str]", outside: set[int]
    ) -> str:
        """Why no rule can serve a parameter, or nothing."""
        if name in self.trace.claimed and calls[name] == 1:
            return ""
        if name in self.trace.barred:
            return self.trace.barred[name]
        if calls[name] > 1:
            return f"used in {calls[name]} calls"
        if id(p) in outside:
            return "used directly" if not calls[name] else "used in a call and directly"
        return ""

    def _layout(self, record: Record, layouts: list[Layout]) -> Served | str:
        """The one layout in which the rule gives the loop's answer, or why there is none."""
        if not layouts:
            return "no sample axis found"
        g = self.received.get(id(record))
        right = [layout for layout in layouts if g is None or self._agrees(record, g, layout)]
        if len(right) == 1:
            return Served("rules", record.rule.name, right[0])
        return "the layer rule disagrees with the loop" if not right else "ambiguous sample axis"

    def _agrees(self, record: Record, g: Tensor, layout: Layout) -> bool:
        if not record.fits(layout, _TRIAL):
            return False
        sums: Sums = {
            name: torch.zeros_like(self.reference[name]) for name in record.call.names.values()
        }
        try:
            record.add(g, layout, _TRIAL, sums)
            record.add_pool(layout, _TRIAL, sums)
        except (RuntimeError, IndexError, OverwrittenError):
            return False  # the rule's shapes do not hold in this layout
        return all(self.close(sums[name], self.reference[name]) for name in sums)

    def close(self, got: Tensor, expected: Tensor) -> bool:
        """Whether squares agree but for rounding and a flipped ReLU."""
        low, high = got.sub_(expected).aminmax()  # `got` has served
        return bool(torch.maximum(-low, high) <= self.tolerance * expected.max())

    def vmap_failure(self, params: dict[str, nn.Parameter]) -> str:
        """Why vmap can't serve these parameters, or nothing."""
        try:
            sums = vmap_squares(self.model, self.forward, params, self.batch, self.v[:, None])
        except Exception as error:  # whatever a model's code raises under a transform
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if all(self.close(sums[name], self.reference[name]) for name in params):
            return ""
        return "its values differ from the loop's"


def _layouts(three: torch.Size, one: torch.Size) -> list[Layout]:
    """Layouts under which one axis grows from one sample to three, and no other does."""
    if len(three) != len(one):
        return []
    grown = [dim for dim in range(len(three)) if three[dim] != one[dim]]
    if len(grown) != 1 or three[grown[0]] != _TRIAL * one[grown[0]]:
        return []
    layout = Layout(grown[0], one[grown[0]])
    return [layout] if layout.folded == 1 else [layout, replace(layout, interleaved=True)]

"""Three samples, together and alone: what every choice of engine is checked against."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ewc_plugin.batches import Batch, copied, has_samples, n_entries, n_samples, take
from ewc_plugin.fisher.logits import check_finite
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.per_sample import add_gradient_squares, zeros
from ewc_plugin.fisher.rules.base import Sums, device_kind
from ewc_plugin.fisher.tracing.capture import Capture
from ewc_plugin.fisher.tracing.layer_calls import (
    OnGradient,
    Trace,
    TracedCall,
    parameters_in_graph,
)

SAMPLES = 3
_SCORED = 2  # of them: one would not tell a sum of squares from the square of a sum

_CHUNK_ENTRIES = {"cpu": 2**22, "other": 2**23}  # of the layers' outputs in one forward pass
# Every layer call also costs a CPU tenths of a millisecond of Python per chunk. Where one vector
# goes back and frees the outputs on its way, many small calls are worth up to twice the entries.
_ENTRIES_PER_CALL = 2**19
_SMALLEST_CHUNK, _LARGEST_CHUNK = 16, 1024


@dataclass(frozen=True)
class Probe:
    """Three samples, random score vectors at their logits, and the loop's answer.

    It refers to no autograd graph.

    Attributes:
        batch: The three samples.
        v: The vectors [3, C]; that of the last sample is zero.
        reference: Squares that the loop over samples gives, by parameter name.
        traced: The traced calls of a forward pass of the three samples.
        gradients: id of a traced call -> the gradient at its output.
        single: The traced calls of a forward pass of the first sample alone.
        untraceable: Parameters that no rule can serve, each with the reason.
        direct: Names of the parameters that the graph reaches past the traced calls.
        overwrites_input: Whether the model works in place on its input.
        tolerance: Largest relative difference that counts as rounding and flipped ReLUs.
    """

    batch: Batch
    v: Tensor
    reference: Sums
    traced: tuple[TracedCall, ...]
    gradients: dict[int, Tensor]
    single: tuple[TracedCall, ...]
    of_registered_rules: frozenset[str]
    untraceable: dict[str, str]
    direct: frozenset[str]
    overwrites_input: bool
    tolerance: float

    def close(self, got: Tensor, expected: Tensor) -> bool:
        """Whether squares agree but for rounding and a flipped ReLU; overwrites `got`."""
        low, high = got.sub_(expected).aminmax()
        return bool(torch.maximum(-low, high) <= self.tolerance * expected.max())

    def fitting_chunk(self, one_vector: bool) -> int:
        """Largest power-of-two batch whose traced layer outputs stay near cache size."""
        entries = n_entries(self.batch)
        entries += sum(traced.out_shape.numel() for traced in self.traced)
        weights = sum(total.numel() for total in self.reference.values())
        # Each chunk also passes once over all sums: many weights want many samples.
        device = device_kind(self.v)
        room = _CHUNK_ENTRIES[device]
        if device == "cpu" and one_vector:
            room = min(2 * room, max(room, _ENTRIES_PER_CALL * len(self.traced)))
        fitting = max(room, 2 * weights) * SAMPLES // entries
        power_of_two = 1 << (fitting.bit_length() - 1) if fitting else 1
        return min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, power_of_two))


def probe(call: ModelCall, batch: Batch) -> Probe:
    """Runs the first three samples of a batch (repeated where there are fewer).

    Args:
        call: The model.
        batch: N samples.

    Returns:
        What was seen.

    Raises:
        ValueError: The samples of a batch interact, or the outputs are no finite logits [N, C].
    """
    batch = take(batch, torch.arange(SAMPLES) % n_samples(batch))
    gradients: dict[int, Tensor] = {}
    logits, trace, overwrites_input = _run(
        call, batch, lambda traced, g: gradients.__setitem__(id(traced), g)
    )
    check_finite(logits, 0)
    half = torch.finfo(logits.dtype).bits < 32
    tolerance = 0.1 if half else 0.01
    v = _random_vectors(logits)
    reference = zeros(call.params)
    for n in reversed(range(_SCORED)):
        alone, trace_alone, _ = _run(call, take(batch, slice(n, n + 1)), None)
        _check_independence(alone, logits[n : n + 1], tolerance)
        add_gradient_squares(reference, call.params, alone, v[n : n + 1])
    in_graph = parameters_in_graph(logits)
    trace.pull_back(logits, v, retain_graph=False)
    return Probe(
        batch=batch,
        v=v,
        reference=reference,
        traced=tuple(trace.calls),
        gradients=gradients,
        single=tuple(trace_alone.calls),
        of_registered_rules=frozenset(trace.of_registered_rules),
        untraceable=trace.untraceable,
        direct=frozenset(name for name, p in call.params.items() if id(p) in in_graph),
        overwrites_input=overwrites_input,
        tolerance=tolerance,
    )


def _run(
    call: ModelCall, batch: Batch, on_gradient: OnGradient | None
) -> tuple[Tensor, Trace, bool]:
    """Logits, what was traced, and whether the model worked on its input in place."""
    names = {id(p): name for name, p in call.params.items()}
    batch = copied(batch)
    with Capture(call.model, names, on_gradient) as capture:
        logits = call.logits(batch)
    leaves = [leaf for leaf in tree_leaves(batch) if has_samples(leaf)]
    return logits, capture.trace, any(leaf._version for leaf in leaves)


def _random_vectors(logits: Tensor) -> Tensor:
    """[3, C]; the last sample has no score, so whatever lands in its rows still shows."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(_SCORED, logits.size(1), generator=generator, dtype=torch.float64, device="cpu")
    return F.pad(v.to(logits), (0, 0, 0, SAMPLES - _SCORED)).detach()


def _check_independence(alone: Tensor, together: Tensor, tolerance: float) -> None:
    """Raises where a sample's logits depend on its batch, or on chance."""
    if alone.shape == together.shape:
        masked = alone == together  # -inf
        difference = (alone - together).detach().masked_fill(masked, 0).abs()
        scale = together.detach().masked_fill(together == -torch.inf, 0).abs().max()
        if not bool((difference > tolerance * scale).any()):
            return
    raise ValueError(
        "`model` gives a sample other logits alone than in a batch of three: its samples "
        "interact or its forward is random, so no per-sample Fisher exists. Switch batch "
        "statistics and noise off, or use fisher_type 'batched'."
    )

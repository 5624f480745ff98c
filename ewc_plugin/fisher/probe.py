"""The probe: runs three samples together and alone, as a reference for choosing engines."""

import pickle
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ewc_plugin.batches import (
    Batch,
    copied,
    different_samples,
    join,
    joinable,
    n_entries,
    n_samples,
    take,
    versions,
)
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.outputs import (
    INTERACT,
    SamplesInteractError,
    check_finite,
    is_half,
    outputs_agree,
)
from ewc_plugin.fisher.per_sample import gradient_squares, typical
from ewc_plugin.fisher.rules.base import Sums, device_kind
from ewc_plugin.fisher.tracing.capture import Capture
from ewc_plugin.fisher.tracing.layer_calls import (
    HOOKED,
    OnGradient,
    Trace,
    TracedCall,
    has_custom_function,
    parameters_in_graph,
)

SAMPLES = 3
_SCORED = 2  # samples with a score vector; with one, sum of squares = square of sum
_READ_AHEAD = 8  # batches, for different samples

# Roundings in a gradient that cancels, relative to the largest one of its calls, and to a typical
# one of the model. In half precision they are capped, so that a wrong rule still shows.
_CALL_NOISE, _MODEL_NOISE, _MOST_NOISE = 1024, 16, 2.0**-5

_CHUNK_ENTRIES = {"cpu": 2**22, "other": 2**23}  # of the layers' outputs in one forward pass
# Every layer call also costs a CPU tenths of a millisecond of Python per chunk. Where one vector
# goes back and frees the outputs on its way, many small calls are worth up to four times as much.
_ENTRIES_PER_CALL, _MOST_TIMES = 500_000, 4
_SMALLEST_CHUNK, _LARGEST_CHUNK = 16, 1024


@dataclass(frozen=True)
class Samples:
    """The samples that the probe uses.

    Attributes:
        batch: Three samples, different ones where there are; some more than once where not.
        n_different: How many differ from each other.
        first: The loader's first batch.
        of_one_batch: Whether all three are from it.
    """

    batch: Batch
    n_different: int
    first: Batch
    of_one_batch: bool


def first_samples(stream: Iterator[Batch]) -> tuple[Samples | None, list[Batch]]:
    """Read the samples for the probe from the stream.

    Args:
        stream: Batches with samples. Few are read beyond the first one, and only where it has less
            than three different samples.

    Returns:
        The samples (None where there are none), and the batches that were read.
    """
    first = next(stream, None)
    if first is None:
        return None, []
    chosen, read = different_samples(first, SAMPLES), [first]
    batch = take(first, torch.tensor(chosen, device="cpu"))
    n_different = len(chosen)
    while n_different < SAMPLES and len(read) <= _READ_AHEAD:
        read[-1] = copied(read[-1])  # the loader may use its memory again
        if (more := next(stream, None)) is None:
            break
        read.append(more)
        if joinable(batch, more):
            both = join([batch, more])
            chosen = [*range(n_different), *different_samples(both, SAMPLES)[n_different:]]
            batch, n_different = take(both, torch.tensor(chosen, device="cpu")), len(chosen)
    if n_different < SAMPLES:
        batch = take(batch, torch.arange(SAMPLES, device="cpu") % n_different)
    of_one_batch = len(read) == 1 or n_different == 1
    return Samples(copied(batch), n_different, read[0], of_one_batch), read


@dataclass(frozen=True)
class Probe:
    """Result of the probe: three samples, random score vectors, and the loop's squares.

    It refers to no autograd graph.

    Attributes:
        samples: The samples.
        v: The vectors [3, C]; that of the last sample is zero.
        reference: Squares of the first sample alone, by parameter name.
        half: Whether the model computes in less than float32.
        reached: Names of the parameters that the first sample's logits depend on.
        why_not_joined: The reason why batches must not be joined; empty if they may be.
        untraced: The reason why rules cannot be used at all; empty if they can.
        traced: The traced calls of a forward pass of the three samples.
        gradients: id of a traced call -> the gradient at its output.
        single: The traced calls of a forward pass of the first sample alone.
        of_registered_rules: As in `Trace`.
        untraceable: As in `Trace`.
        direct: Names of the parameters that the graph reaches past the traced calls.
        hooked: Names of the parameters with a hook on their gradient, or on that of a tensor which
            comes from them.
    """

    samples: Samples
    v: Tensor
    reference: Sums
    half: bool
    reached: frozenset[str]
    why_not_joined: str = ""
    untraced: str = ""
    traced: tuple[TracedCall, ...] = ()
    gradients: dict[int, Tensor] | None = None
    single: tuple[TracedCall, ...] = ()
    of_registered_rules: frozenset[str] = frozenset()
    untraceable: dict[str, str] | None = None
    direct: frozenset[str] = frozenset()
    hooked: frozenset[str] = frozenset()

    @property
    def may_join(self) -> bool:
        """Whether samples of several batches may be put into one forward pass."""
        return not self.why_not_joined

    def wrong(self, sums: Sums, expected: Sums | None = None) -> set[str]:
        """Parameters whose squares differ from the loop's by more than rounding and a flipped ReLU.

        A gradient that is zero in exact arithmetic (the bias of a key projection: softmax is shift
        invariant) is rounding noise in both, so a difference does not count below the square of
        16 eps times a typical gradient of the model (`typical`), or of 1024 eps times the largest
        one among `sums`, which come from the same layer calls. eps is that of the outputs' dtype.

        Args:
            sums: Squares of parameters of the same calls; overwritten.
            expected: What they should be. Default: the loop's.

        Returns:
            Their names.
        """
        eps = torch.finfo(self.v.dtype).eps
        noise = max(
            min(_MODEL_NOISE * eps, _MOST_NOISE) ** 2 * typical(self._largest.values()),
            min(_CALL_NOISE * eps, _MOST_NOISE) ** 2 * max(self._largest[name] for name in sums),
        )
        if expected is None:
            largest, expected = self._largest, self.reference
        else:
            largest = _maxima(expected)
        return {
            name
            for name in sums
            if not self._close(sums[name], expected[name], largest[name], noise)
        }

    @cached_property
    def _largest(self) -> dict[str, float]:
        return _maxima(self.reference)

    def _close(self, got: Tensor, expected: Tensor, largest: float, noise: float) -> bool:
        if not got.numel():
            return True
        low, high = got.sub_(expected).aminmax()
        tolerance = 0.1 if self.half else 0.01
        return max(-float(low), float(high)) <= tolerance * largest + noise

    def fitting_chunk(self, one_vector: bool) -> int:
        """Largest power-of-two batch whose traced layer outputs stay near cache size."""
        entries = n_entries(self.samples.batch)
        entries += sum(traced.out_shape.numel() for traced in self.traced)
        weights = sum(total.numel() for total in self.reference.values())
        # Each chunk also passes once over all sums: many weights want many samples.
        device = device_kind(self.v)
        room = _CHUNK_ENTRIES[device]
        if device == "cpu" and one_vector:
            room = min(_MOST_TIMES * room, max(room, _ENTRIES_PER_CALL * len(self.traced)))
        fitting = max(room, 2 * weights) * SAMPLES // max(1, entries)
        power_of_two = 1 << (fitting.bit_length() - 1) if fitting else 1
        return min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, power_of_two))


def _maxima(sums: Sums) -> dict[str, float]:
    return {name: float(t.max()) if t.numel() else 0.0 for name, t in sums.items()}


def probe(call: ModelCall, samples: Samples) -> tuple[ModelCall, Probe]:
    """Run the model on three samples, together and alone, and record the results.

    Args:
        call: The model.
        samples: The samples.

    Returns:
        The call, with what it takes to have one sample's logits; and what was seen.

    Raises:
        SamplesInteractError: The samples of one of the loader's batches interact, or the model is
            random.
        ValueError: The outputs are no finite logits [N, C].
        RuntimeError: The model's own backward pass fails.
    """
    call, seen, alone = _probe_alone(call, samples)
    if call.single_sample == "copies":
        return call, replace(
            seen, why_not_joined="it takes no batch of another size than the loader's"
        )
    return _probe_together(call, seen, alone)


def _probe_alone(call: ModelCall, samples: Samples) -> tuple[ModelCall, Probe, Tensor]:
    """Run the first sample alone, forwards and backwards.

    Args:
        call: The model.
        samples: The samples.

    Returns:
        The call, with the way to compute one sample's logits; what was seen; the logits [1, C].

    Raises:
        SamplesInteractError: As `probe`.
        RuntimeError: As `probe`.
    """
    batch = samples.batch
    random_state = _random_state(call)
    try:
        single, alone, untraced, copies_input = _alone(call, batch)
    except SamplesInteractError:
        raise
    except Exception:  # whatever a model's code raises; a real fault is raised again
        call = _single_samples(call, samples)
        batch = samples.first if call.single_sample == "copies" else batch
        single, alone, untraced, copies_input = _alone(call, batch)
    check_finite(alone, 0)
    draws = random_state != _random_state(call)
    by_backward = has_custom_function(alone)
    call = replace(call, by_backward=by_backward, copies_input=copies_input, draws=draws)
    half = is_half(alone, call.params)
    v = _random_vectors(alone)
    in_graph = parameters_in_graph(alone)
    reached = frozenset(name for name, p in call.params.items() if id(p) in in_graph)
    try:
        reference = gradient_squares(call, alone, v[:1])
    except RuntimeError:
        if untraced:
            raise
        untraced = "its forward pass is run again in the backward pass"
        alone = call.sample_logits(batch, 0)
        reference = gradient_squares(call, alone, v[:1])
    seen = Probe(
        samples, v, reference, half, reached, untraced=untraced, single=single, hooked=call.hooked
    )
    return call, seen, alone.detach()


def _probe_together(call: ModelCall, seen: Probe, alone: Tensor) -> tuple[ModelCall, Probe]:
    """Run the samples in one batch, and record the layer calls and their gradients.

    Args:
        call: The model.
        seen: What was seen of the first sample alone.
        alone: Its logits [1, C].

    Returns:
        The call, and what was seen of both.

    Raises:
        SamplesInteractError: As `probe`.
    """
    gradients: dict[int, Tensor] = {}
    try:
        together, trace, copies_input = _run(
            call, seen.samples.batch, lambda traced, g: gradients.__setitem__(id(traced), g)
        )
    except SamplesInteractError:
        raise
    except Exception as error:  # whatever a model's code raises
        return call, _not_together(call, seen, alone, error)
    call = replace(call, copies_input=call.copies_input or copies_input)
    if not outputs_agree(together[:1], alone, together, seen.half):
        return call, _not_together(call, seen, alone, None)
    check_finite(together, 0)
    direct = parameters_in_graph(together)
    untraced = seen.untraced
    if not untraced:
        try:
            trace.pull_back(together, seen.v, retain_graph=False)
        except RuntimeError as error:
            untraced = f"its backward pass can't be cut: {_line(error)}"
    hooked = {name for name, reason in trace.untraceable.items() if reason == HOOKED}
    return call, replace(
        seen,
        untraced=untraced,
        hooked=seen.hooked | hooked,
        traced=tuple(trace.calls),
        gradients=gradients,
        of_registered_rules=frozenset(trace.of_registered_rules),
        untraceable=trace.untraceable,
        direct=frozenset(name for name, p in call.params.items() if id(p) in direct),
    )


def _single_samples(call: ModelCall, samples: Samples) -> ModelCall:
    """Return the call with the first working way to compute a single sample's logits.

    A `squeeze()` that also takes the sample axis away, as in Avalanche's `MTSimpleCNN`, wants a
    second sample; a state that was made for the loader's batches wants as many as these have.

    Args:
        call: The model.
        samples: The samples.

    Returns:
        The call.

    Raises:
        SamplesInteractError: A sample's logits depend on the others of its batch.
    """
    for way in ("single", "pair"):
        found = replace(call, single_sample=way)
        try:
            found.sample_logits(copied(samples.first), 0)
        except Exception:  # whatever a model's code raises; a real fault is raised again below
            continue
        return found
    found = replace(call, single_sample="copies")
    whole = found.logits(copied(samples.first)).detach()
    for n in {0, len(whole) - 1}:
        own = found.sample_logits(copied(samples.first), n)
        if not outputs_agree(own, whole[n : n + 1], whole, is_half(whole, call.params)):
            raise SamplesInteractError(
                "`model` gives a sample other logits beside others than beside copies of itself: "
                f"{INTERACT}"
            )
    return found


def _alone(call: ModelCall, batch: Batch) -> tuple[tuple[TracedCall, ...], Tensor, str, bool]:
    """Run the first sample alone.

    Args:
        call: The model.
        batch: With the sample.

    Returns:
        Its trace, its logits, why tracing failed (if so), and whether the model works in place on
        its input.

    Raises:
        SamplesInteractError: The model is random.
    """
    own = copied(batch)
    try:
        names = {id(p): name for name, p in call.params.items()}
        capture = Capture(call.state, names, None, 1)
        alone = call.sample_logits(own, 0, capture)
        return tuple(capture.trace.calls), alone, "", _written(own)
    except SamplesInteractError:
        raise
    except Exception as error:  # whatever a model's code raises under a function mode
        own = copied(batch)
        alone = call.sample_logits(own, 0)
        return (), alone, f"not traced: {_line(error)}", _written(own)


def _random_state(call: ModelCall) -> bytes:
    """Of the generators that a forward pass may draw from: the global ones and the model's."""
    cuda = {p.device for p in call.params.values() if p.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    states = [
        torch.get_rng_state(),
        *(torch.cuda.get_rng_state(device) for device in sorted(cuda, key=str)),
        random.getstate(),
        numpy and numpy.random.get_state(legacy=False),
        *call.state.random_states(),
    ]
    return pickle.dumps([s.tolist() if isinstance(s, Tensor) else s for s in states])


def _quietly(call: ModelCall, batch: Batch, n: int) -> Tensor:
    # With gradients on: a hook that the forward pass registers wants a tensor that has some.
    return call.sample_logits(copied(batch), n).detach()


def _run(call: ModelCall, batch: Batch, on_gradient: OnGradient) -> tuple[Tensor, Trace, bool]:
    """Return the logits, the trace, and whether the model modified its input in place."""
    names = {id(p): name for name, p in call.params.items()}
    batch = copied(batch)
    capture = Capture(call.state, names, on_gradient, n_samples(batch))
    logits = call.logits(batch, capture)
    return logits, capture.trace, _written(batch)


def _written(batch: Batch) -> bool:
    """Whether a tensor of a fresh copy was changed in place."""
    return any(versions(batch))


def _not_together(call: ModelCall, seen: Probe, alone: Tensor, error: Exception | None) -> Probe:
    """Find why three samples together fail: tracing, joined batches, or interacting samples.

    Args:
        call: The model.
        seen: What was seen so far.
        alone: Logits of the first sample alone.
        error: What the traced forward pass of three samples raised, if it did.

    Returns:
        What was seen, with the reason.

    Raises:
        SamplesInteractError: They interact in the loader's own batches, or the model is random.
    """
    samples = seen.samples
    again = _quietly(call, samples.batch, 0)
    if not outputs_agree(again, alone, alone, seen.half):
        raise SamplesInteractError(f"`model` gives the same sample two outputs: {INTERACT}")
    try:
        plain = call.logits(copied(samples.batch))
        if outputs_agree(plain[:1], alone, plain, seen.half):
            why = _line(error) if error else "other outputs"
            return replace(seen, untraced=f"not traced: {why}")
    except Exception as caught:  # whatever a model's code raises
        error = caught
    first = samples.first
    whole = call.logits(copied(first))
    own = _quietly(call, first, 0)
    interact = not outputs_agree(own, whole[:1], whole, seen.half)
    if interact or (samples.of_one_batch and error is None):
        raise SamplesInteractError(
            f"`model` gives a sample other logits alone than in a batch of three: {INTERACT}"
        )
    why = _line(error) if error else "their outputs change"
    return replace(seen, why_not_joined=f"samples of several batches can't be joined: {why}")


def _random_vectors(logits: Tensor) -> Tensor:
    """[3, ...]; the last sample has no score, so whatever lands in its rows still shows."""
    generator, shape = torch.Generator().manual_seed(0), logits.shape[1:]
    v = torch.randn(_SCORED, *shape, generator=generator, dtype=torch.float64, device="cpu")
    last = torch.zeros(SAMPLES - _SCORED, *shape, dtype=torch.float64, device="cpu")
    return torch.cat([v, last]).to(logits).detach()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

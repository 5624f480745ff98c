"""The squares of one chunk: one forward pass, one backward pass per score vector."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch, n_samples
from ewc_plugin.fisher.label_scores import LabelScores
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.one_hidden_layer import find_one_hidden_layer
from ewc_plugin.fisher.outputs import (
    INTERACT,
    SamplesInteractError,
    check_finite,
    is_half,
    outputs_agree,
)
from ewc_plugin.fisher.per_sample import loop_squares, vmap_squares
from ewc_plugin.fisher.plan import Served, layout_of, wrong_numbers
from ewc_plugin.fisher.rules.base import Layout, Sums
from ewc_plugin.fisher.scores import Scores
from ewc_plugin.fisher.tracing.capture import Capture
from ewc_plugin.fisher.tracing.layer_calls import (
    WATCHED_VECTORS,
    Trace,
    TracedCall,
    Watch,
    parameters_in_graph,
)
from ewc_plugin.fisher.tracing.shared import find_shared

_VECTORS_PER_BLOCK = 32  # handed to vmap and the loop, which repeat the forward pass per block


@dataclass
class _Scale:
    """Scale factor of a chunk's gradients, and the number of score vectors."""

    unscale: float = 1.0
    n_vectors: int = 1


def add_chunk(
    call: ModelCall,
    served: dict[str, Served],
    label_scores: LabelScores,
    batch: Batch,
    first: int,
    into: Sums,
    watch: Watch | None = None,
) -> int:
    """Add the squares of a chunk's samples.

    Args:
        call: The model.
        served: Which engine serves which parameter. Parameters that turn out to be used in another
            way than in the probe, because the model's control flow depends on the data, are moved
            to the loop.
        label_scores: Give the score vectors.
        batch: N samples.
        first: Index of the first one in the whole stream.
        into: Parameter name -> its sum.
        watch: A sample whose logits, vectors and squares are to be kept.

    Returns:
        How many of the samples have no label.
    """
    N, scale = n_samples(batch), _Scale()
    logits, trace = _forward(call, served, batch, scale, into, watch)
    check_finite(logits, first)
    check_same_again(call, batch, logits)
    if moved := _used_otherwise(call, served, logits, trace, N):
        served |= dict.fromkeys(moved, Served("loop", "its calls depend on the data"))
        return add_chunk(call, served, label_scores, batch, first, into, watch)
    if first == 0:
        label_scores.check_outputs(logits)
    scores = label_scores.vectors(batch, logits)
    per_sample = any(s.engine != "rules" for s in served.values())
    one_by_one = per_sample or (watch and scores.count > WATCHED_VECTORS)
    hidden = None if one_by_one or trace.shared else find_one_hidden_layer(trace, logits, scores)
    if hidden is not None:
        vectors = [scores.vector(s).to(logits.dtype) for s in range(scores.count)]
        hidden.add(trace, torch.stack(vectors, 1))
        if watch:
            watch.vectors = [v[watch.n] for v in vectors]
            for traced in trace.calls:
                traced.watch_squares()
    else:
        _pull_back(call, served, batch, logits, scores, trace, scale, into, watch)
    if watch:
        watch.scale = logits.detach()
        watch.logits = watch.scale[watch.n : watch.n + 1]
        watch.unscale = scale.unscale
    del logits, hidden
    for traced in trace.calls:
        traced.finish(_layout(served, traced), N, into, watch)
    return 0 if scores.n_samples is None else N - scores.n_samples


def _forward(
    call: ModelCall,
    served: dict[str, Served],
    batch: Batch,
    scale: _Scale,
    into: Sums,
    watch: Watch | None,
) -> tuple[Tensor, Trace]:
    N = n_samples(batch)

    def on_gradient(traced: TracedCall, g: Tensor) -> None:
        layout = _layout(served, traced)
        if watch:
            traced.watch(g, layout, N, watch, scale.unscale)
        traced.add(g, layout, N, into, count=scale.n_vectors, unscale=scale.unscale)

    rules = _params(call, served, "rules")
    if not rules:  # no parameter uses a rule, so no tracing is needed
        return call.logits(batch), Trace(torch.empty(0, device="cpu"))
    names = {id(p): name for name, p in rules.items()}
    capture = Capture(call.state, names, on_gradient, N)
    logits = call.logits(batch, capture)
    capture.trace.shared = find_shared(capture.trace.calls)
    return logits, capture.trace


def check_same_again(call: ModelCall, batch: Batch, logits: Tensor) -> None:
    """Compare outputs with those of another forward pass, of a model that draws random numbers.

    Args:
        call: The model.
        batch: N samples.
        logits: Their outputs.

    Raises:
        SamplesInteractError: Noise changes one: too seldom, perhaps, for the audit of few samples.
    """
    if not call.draws:
        return
    again = call.logits(batch)
    if not outputs_agree(again, logits, logits, is_half(logits, call.params)):
        raise SamplesInteractError(f"`model` gives the same samples two outputs: {INTERACT}")


def _used_otherwise(
    call: ModelCall, served: dict[str, Served], logits: Tensor, trace: Trace, N: int
) -> set[str]:
    """Names of parameters that this chunk uses differently from the probe."""
    in_graph = parameters_in_graph(logits)
    found = {
        name
        for name, p in _params(call, served, "rules").items()
        if id(p) in in_graph and name not in trace.of_registered_rules
    }
    for traced in trace.calls:
        layout = layout_of(served, traced)
        if layout is None or not traced.fits(layout, N):
            found |= set(traced.params)
    return found | wrong_numbers(served, trace.calls) | set(trace.untraceable)


def _pull_back(
    call: ModelCall,
    served: dict[str, Served],
    batch: Batch,
    logits: Tensor,
    scores: Scores,
    trace: Trace,
    scale: _Scale,
    into: Sums,
    watch: Watch | None,
) -> None:
    """Run one backward pass per score vector; pass blocks of vectors to the slower engines."""
    factor = score_factor(call, scores, logits)
    scale.unscale, scale.n_vectors = 1 / factor, scores.count
    per_sample = any(s.engine != "rules" for s in served.values())
    vectors: list[Tensor] = []
    for s in range(scores.count):
        v = (scores.vector(s) * factor).to(logits.dtype)
        last = s == scores.count - 1
        if watch:
            watch.sees(v)
        trace.pull_back(logits, v, retain_graph=not last)
        for shared in trace.shared:
            shared.add(n_samples(batch), into, watch)
        if per_sample:
            vectors.append(v)
        if vectors and (last or len(vectors) == _VECTORS_PER_BLOCK):
            block = torch.stack(vectors, 1)
            _add_per_sample(call, served, batch, logits, block, scale.unscale, into)
            vectors = []


def score_factor(call: ModelCall, scores: Scores, logits: Tensor) -> float:
    """A power of two that scales half-precision score vectors to about 1, against underflow."""
    dtypes = {logits.dtype, *(p.dtype for p in call.params.values())}
    wide = all(torch.finfo(dtype).bits >= 32 for dtype in dtypes)
    if wide and not torch.is_autocast_enabled(logits.device.type):
        return 1.0
    largest = max(float(scores.vector(s).abs().max()) for s in range(scores.count))
    return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0


def _add_per_sample(
    call: ModelCall,
    served: dict[str, Served],
    batch: Batch,
    logits: Tensor,
    vectors: Tensor,
    unscale: float,
    into: Sums,
) -> None:
    """Add the squares of the parameters that no rule serves."""
    if params := _params(call, served, "vmap"):
        try:
            sums = vmap_squares(call.only(params), batch, vectors)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            served |= {name: Served("loop", f"vmap: {error}") for name in params}
        else:
            for name, total in sums.items():
                into[name] += total * unscale**2
    if params := _params(call, served, "loop"):
        for name, total in loop_squares(call.only(params), batch, logits, vectors).items():
            into[name] += total * unscale**2


def _params(call: ModelCall, served: dict[str, Served], engine: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in call.params.items() if served[name].engine == engine}


def _layout(served: dict[str, Served], traced: TracedCall) -> Layout:
    layout = layout_of(served, traced)
    assert layout is not None
    return layout


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    text = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )

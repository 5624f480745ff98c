"""Decides before the pass which engine serves which parameter.

A layer rule where the trial finds that it gives the sample loop's answer, else `vmap(grad)` where
that does, else the loop itself.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.per_sample import Forward
from ewc_plugin.fisher.probe import SAMPLES, Trial
from ewc_plugin.fisher.rules.base import Layout, Sums
from ewc_plugin.fisher.tracing.layer_calls import OverwrittenError, Record, parameters_in_graph

EngineName = Literal["auto", "rules", "vmap", "loop"]


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


def make_plan(
    model: nn.Module,
    forward: Forward,
    params: dict[str, nn.Parameter],
    batch: Batch,
    engine: EngineName,
    chunk_size: int | None = None,
    one_vector: bool = False,
) -> Plan:
    """Who serves which parameter.

    Args:
        model: In eval mode.
        forward: Maps (model, batch) to logits.
        params: The trainable parameters.
        batch: Its first three samples are tried (repeated where there are fewer).
        engine: "auto", or one engine that must serve all.
        chunk_size: Samples per forward pass; chosen where it is None.
        one_vector: Whether one score vector per sample is known to go back through the graph.

    Returns:
        An entry per parameter, in order, and the number of samples per chunk.

    Raises:
        ValueError: The samples of a batch interact, or the forced engine can't serve a parameter.
    """
    trial = Trial(model, forward, params, batch)
    chunk_size = chunk_size or trial.fitting_chunk(one_vector)
    if engine == "loop":
        served = {name: Served("loop", "forced") for name in params}
        return Plan(served, chunk_size, trial.overwrites_input)
    plan: dict[str, Served] = {}
    reasons = dict.fromkeys(params, "forced")
    if engine != "vmap":
        plan, reasons = match_rules(trial)
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


def match_rules(trial: Trial) -> tuple[dict[str, Served], dict[str, str]]:
    """What the layer rules serve, and for all other parameters the reason."""
    trial.pull_back()
    reasons = _structural(trial)
    plan: dict[str, Served] = {}
    together, alone = trial.trace.records, trial.trace_alone.records
    if [r.call.names for r in together] != [r.call.names for r in alone]:
        for record in together:
            for name in record.call.names.values():
                reasons.setdefault(name, "its calls depend on the data")
    for record, single in zip(together, alone, strict=False):
        names = record.call.names.values()
        if any(name in reasons for name in names):
            for name in names:
                reasons.setdefault(name, "its layer's other parameter has no rule")
            continue
        served = _matching_layout(trial, record, _layouts(record.out_shape, single.out_shape))
        for name in names:
            if isinstance(served, Served):
                plan[name] = served
            else:
                reasons[name] = served
    for name in trial.params:
        if name not in plan and name not in reasons:
            if bool(trial.reference[name].any()):
                reasons[name] = "no layer rule sees it"
            else:
                plan[name] = Served("rules", "unused")
    return plan, {name: reasons[name] for name in trial.params if name in reasons}


def _structural(trial: Trial) -> dict[str, str]:
    """Parameters that no rule can serve, whatever its values, each with the reason."""
    calls = Counter(name for r in trial.trace.records for name in r.call.names.values())
    outside = parameters_in_graph(trial.logits)
    reasons = {name: _why_none(trial, name, p, calls, outside) for name, p in trial.params.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_none(
    trial: Trial, name: str, p: nn.Parameter, calls: "Counter[str]", outside: set[int]
) -> str:
    if name in trial.trace.claimed and calls[name] == 1:
        return ""
    if name in trial.trace.barred:
        return trial.trace.barred[name]
    if calls[name] > 1:
        return f"used in {calls[name]} calls"
    if id(p) in outside:
        return "used directly" if not calls[name] else "used in a call and directly"
    return ""


def _matching_layout(trial: Trial, record: Record, layouts: list[Layout]) -> Served | str:
    """The one layout in which the rule gives the loop's answer, or why there is none."""
    if not layouts:
        return "no sample axis found"
    g = trial.received.get(id(record))
    right = [layout for layout in layouts if g is None or _agrees(trial, record, g, layout)]
    if len(right) == 1:
        return Served("rules", record.rule.name, right[0])
    return "the layer rule disagrees with the loop" if not right else "ambiguous sample axis"


def _agrees(trial: Trial, record: Record, g: Tensor, layout: Layout) -> bool:
    if not record.fits(layout, SAMPLES):
        return False
    sums: Sums = {
        name: torch.zeros_like(trial.reference[name]) for name in record.call.names.values()
    }
    try:
        record.add(g, layout, SAMPLES, sums)
        record.finish(layout, SAMPLES, sums)
    except (RuntimeError, IndexError, OverwrittenError):
        return False  # the rule's shapes do not hold in this layout
    return all(trial.close(sums[name], trial.reference[name]) for name in sums)


def _layouts(three: torch.Size, one: torch.Size) -> list[Layout]:
    """Layouts under which one axis grows from one sample to three, and no other does."""
    if len(three) != len(one):
        return []
    grown = [dim for dim in range(len(three)) if three[dim] != one[dim]]
    if len(grown) != 1 or three[grown[0]] != SAMPLES * one[grown[0]]:
        return []
    layout = Layout(grown[0], one[grown[0]])
    return [layout] if layout.folded == 1 else [layout, replace(layout, interleaved=True)]

"""Decides before the pass which engine serves which parameter.

A layer rule where the probe finds that it gives the sample loop's answer, else `vmap(grad)` where
that does, else the loop itself.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.options import EngineName
from ewc_plugin.fisher.per_sample import vmap_squares
from ewc_plugin.fisher.probe import SAMPLES, Probe
from ewc_plugin.fisher.rules.base import Layout, Sums
from ewc_plugin.fisher.rules.registry import RegisteredRule
from ewc_plugin.fisher.tracing.layer_calls import OverwrittenError, TracedCall, Watch


@dataclass(frozen=True)
class Served:
    """Which engine serves one parameter.

    Attributes:
        engine: "rules", "vmap" or "loop".
        detail: The layer rule's name, or why no rule serves it.
        layout: Where a rule finds the samples.
    """

    engine: Literal["rules", "vmap", "loop"]
    detail: str
    layout: Layout | None = None


def make_plan(call: ModelCall, seen: Probe, engine: EngineName) -> dict[str, Served]:
    """Chooses an engine for each parameter.

    Args:
        call: The model.
        seen: What the probe saw of it.
        engine: "auto", or one engine that must serve all.

    Returns:
        An entry per parameter, in order.

    Raises:
        ValueError: The forced engine can't serve a parameter.
    """
    if engine == "loop" or (seen.apart and engine == "auto"):
        return {name: Served("loop", seen.apart or "forced") for name in call.params}
    plan: dict[str, Served] = {}
    reasons = dict.fromkeys(call.params, seen.apart or seen.untraced or "forced")
    if engine != "vmap" and not (seen.apart or seen.untraced):
        plan, reasons = _match_rules(seen)
    if engine == "rules" and reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"`engine` 'rules' can't serve every parameter ({listed}). Use 'auto'.")
    if reasons:
        failure = _vmap_failure(call.only({name: call.params[name] for name in reasons}), seen)
        if failure and engine == "vmap":
            raise ValueError(f"`engine` 'vmap' can't serve this model ({failure}). Use 'auto'.")
        for name, reason in reasons.items():
            if failure:
                plan[name] = Served("loop", f"{reason}; vmap: {failure}")
            else:
                plan[name] = Served("vmap", reason)
    return {name: plan[name] for name in call.params}


def _vmap_failure(call: ModelCall, seen: Probe) -> str:
    """Why vmap can't serve these parameters, or nothing."""
    if seen.apart:
        return seen.apart
    first_alone = torch.zeros_like(seen.v)
    first_alone[0] = seen.v[0]
    try:
        sums = vmap_squares(call, seen.samples.batch, first_alone[:, None])
    except Exception as error:  # whatever a model's code raises under a transform
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if all(seen.close(sums[name], seen.reference[name]) for name in call.params):
        return ""
    return "its values differ from the loop's"


def _match_rules(seen: Probe) -> tuple[dict[str, Served], dict[str, str]]:
    """What the layer rules serve, and for all other parameters the reason why not."""
    reasons = _unservable(seen)
    together, single = seen.traced, seen.single
    if [t.call.names for t in together] != [t.call.names for t in single]:
        _mark_calls(together, "its calls depend on the data", reasons)
    plan: dict[str, Served] = {}
    for traced, alone in zip(together, single, strict=False):
        names = traced.call.names.values()
        if any(name in reasons for name in names):  # a call is served as a whole
            _mark_calls((traced,), "its layer's other parameter has no rule", reasons)
            continue
        served = _matching_layout(seen, traced, _layouts(traced.out_shape, alone.out_shape))
        if isinstance(served, Served):
            plan |= dict.fromkeys(names, served)
        else:
            _mark_calls((traced,), served, reasons)
    for name, total in seen.reference.items():
        if name not in plan and name not in reasons:
            if bool(total.any()):
                reasons[name] = "no layer rule sees it"
            else:
                plan[name] = Served("rules", "unused")
    return plan, {name: reasons[name] for name in seen.reference if name in reasons}


def _mark_calls(calls: tuple[TracedCall, ...], reason: str, reasons: dict[str, str]) -> None:
    """Gives the parameters of these calls a reason, unless they have one."""
    for traced in calls:
        for name in traced.call.names.values():
            reasons.setdefault(name, reason)


def _unservable(seen: Probe) -> dict[str, str]:
    """Parameters that no rule can serve, whatever its values, each with the reason."""
    calls = Counter(name for traced in seen.traced for name in traced.call.names.values())
    reasons = {name: _why_none(seen, name, calls[name]) for name in seen.reference}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_none(seen: Probe, name: str, n_calls: int) -> str:
    if name in seen.of_registered_rules and n_calls == 1:
        return ""
    if seen.untraceable and name in seen.untraceable:
        return seen.untraceable[name]
    if n_calls > 1:
        return f"used in {n_calls} calls"
    if name in seen.direct:
        return "used in a call and directly" if n_calls else "used directly"
    return ""


def _matching_layout(seen: Probe, traced: TracedCall, layouts: list[Layout]) -> Served | str:
    """The one layout in which the rule gives the loop's answer, or why there is none."""
    if not layouts:
        return "no sample axis found"
    g = (seen.gradients or {}).get(id(traced))
    right = [layout for layout in layouts if g is None or _agrees(seen, traced, g, layout)]
    if len(right) == 1:
        return Served("rules", traced.rule.name, right[0])
    return "the layer rule disagrees with the loop" if not right else "ambiguous sample axis"


def _agrees(seen: Probe, traced: TracedCall, g: Tensor, layout: Layout) -> bool:
    """Whether a rule gives the first sample's squares as the loop does."""
    # One of a third party's must also add up two samples' squares, instead of squaring a sum.
    if not traced.fits(layout, SAMPLES):
        return False
    names = traced.call.names.values()
    try:
        first = _squares_of(seen, traced, g, layout, 0)
        if isinstance(traced.rule, RegisteredRule):
            second = _squares_of(seen, traced, g, layout, 1)
            together: Sums = {name: torch.zeros_like(seen.reference[name]) for name in names}
            traced = traced.fresh()
            traced.add(g, layout, SAMPLES, together)
            traced.finish(layout, SAMPLES, together)
            if not all(seen.close(together[n], first[n] + second[n]) for n in names):
                return False
    except (RuntimeError, IndexError, OverwrittenError):
        return False  # the rule's shapes do not hold in this layout
    return all(seen.close(first[name], seen.reference[name]) for name in names)


def _squares_of(seen: Probe, traced: TracedCall, g: Tensor, layout: Layout, n: int) -> Sums:
    watch = Watch(n)
    traced = traced.fresh()
    traced.watch(g, layout, SAMPLES, watch)
    traced.finish(layout, SAMPLES, {}, watch)
    return watch.squares


def _layouts(three: torch.Size, one: torch.Size) -> list[Layout]:
    """Layouts under which one axis grows from one sample to three, and no other does."""
    if len(three) != len(one):
        return []
    grown = [dim for dim in range(len(three)) if three[dim] != one[dim]]
    if len(grown) != 1 or three[grown[0]] != SAMPLES * one[grown[0]]:
        return []
    layout = Layout(grown[0], one[grown[0]])
    return [layout] if layout.folded == 1 else [layout, replace(layout, interleaved=True)]

"""Choose the engine for each parameter, before the pass over the data.

A layer rule if it gives the same squares as the sample loop on the probe; else `vmap(grad)` if
it does; else the loop itself.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.options import EngineName
from ewc_plugin.fisher.per_sample import vmap_squares
from ewc_plugin.fisher.probe import SAMPLES, Probe
from ewc_plugin.fisher.rules.base import Layout, Sums
from ewc_plugin.fisher.rules.registry import RegisteredRule
from ewc_plugin.fisher.tracing.layer_calls import HOOKED, OverwrittenError, TracedCall, Watch
from ewc_plugin.fisher.tracing.shared import connected, find_shared

_DATA_DEPENDENT = "its calls depend on the data"


@dataclass(frozen=True)
class Served:
    """The engine chosen for one parameter.

    Attributes:
        engine: "rules", "vmap" or "loop".
        detail: The layer rule's name, or why no rule serves it.
        layout: Where a rule finds the samples: one for each call on the parameter, or one for all
            of several calls, however many another batch has.
    """

    engine: Literal["rules", "vmap", "loop"]
    detail: str
    layout: Layout | tuple[Layout, ...] | None = None


def make_plan(call: ModelCall, seen: Probe, engine: EngineName) -> dict[str, Served]:
    """Choose an engine for each parameter.

    Args:
        call: The model.
        seen: The result of the probe.
        engine: "auto", or one engine that must serve all.

    Returns:
        An entry per parameter, in order.

    Raises:
        ValueError: The forced engine can't serve a parameter.
    """
    if engine == "loop" or (not seen.may_join and engine == "auto"):
        return {name: Served("loop", seen.why_not_joined or "forced") for name in call.params}
    plan: dict[str, Served] = {}
    reasons = dict.fromkeys(call.params, seen.why_not_joined or seen.untraced or "forced")
    if engine != "vmap" and seen.may_join and not seen.untraced:
        plan, reasons = _match_rules(seen)
    if engine == "rules" and reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"`engine` 'rules' can't serve every parameter ({listed}). Use 'auto'.")
    if reasons:
        failures = _vmap_failures(call.only({name: call.params[name] for name in reasons}), seen)
        if failures and engine == "vmap":
            failure = next(iter(failures.values()))
            raise ValueError(f"`engine` 'vmap' can't serve this model ({failure}). Use 'auto'.")
        for name, reason in reasons.items():
            if name in failures:
                plan[name] = Served("loop", f"{reason}; vmap: {failures[name]}")
            else:
                plan[name] = Served("vmap", reason)
    return {name: plan[name] for name in call.params}


def layout_of(served: dict[str, Served], traced: TracedCall) -> Layout | None:
    """Return where a call has its samples; None if the probe did not see it."""
    layout = served[traced.params[0]].layout
    if not isinstance(layout, tuple):
        return layout
    return layout[traced.position] if traced.position < len(layout) else None


def wrong_numbers(served: dict[str, Served], calls: list[TracedCall]) -> set[str]:
    """Parameters that fewer or more calls read than in the probe, where that matters."""
    count = Counter(name for traced in calls for name in set(traced.params))
    layouts = {name: served[name].layout for name in count}
    return {
        name
        for name, layout in layouts.items()
        if isinstance(layout, tuple) and len(layout) < count[name]
    }


def _vmap_failures(call: ModelCall, seen: Probe) -> dict[str, str]:
    """The parameters that vmap can't serve, each with the reason."""
    if not seen.may_join:
        return dict.fromkeys(call.params, seen.why_not_joined)
    first_alone = torch.zeros_like(seen.v)
    first_alone[0] = seen.v[0]
    try:
        sums = vmap_squares(call, seen.samples.batch, first_alone[:, None])
    except Exception as error:  # whatever a model's code raises under a transform
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return dict.fromkeys(call.params, reason)
    wrong = {name for name in call.params if seen.wrong({name: sums[name]})}
    reasons = dict.fromkeys(wrong, "its values differ from the loop's")
    return reasons | {name: HOOKED for name in call.params if name in seen.hooked}


def _match_rules(seen: Probe) -> tuple[dict[str, Served], dict[str, str]]:
    """Return the parameters with a layer rule, and for each other one the reason it has none."""
    reasons = _unservable(seen)
    alone = _shapes_alone(seen)
    _mark_calls([t for t in seen.traced if id(t) not in alone], _DATA_DEPENDENT, reasons)
    plan: dict[str, Served] = {}
    for calls in connected(list(seen.traced)):  # calls that share a parameter are served together
        if any(name in reasons for traced in calls for name in traced.params):
            _mark_calls(calls, "another parameter of its layer has no rule", reasons)
            continue
        layouts = _matching_layouts(seen, calls, [alone[id(traced)] for traced in calls])
        if isinstance(layouts, str):
            _mark_calls(calls, layouts, reasons)
        else:
            plan |= _served(calls, layouts)
    for name, total in seen.reference.items():
        if name not in plan and name not in reasons:
            if bool(total.any()):
                reasons[name] = "no layer rule sees it"
            else:
                plan[name] = Served("rules", "unused")
    return plan, {name: reasons[name] for name in seen.reference if name in reasons}


def _shapes_alone(seen: Probe) -> dict[int, torch.Size]:
    """Shape of the output for one sample, by the id of a call on three."""
    # A loop over time steps may call its cell less often for a single sample.
    single: dict[tuple[str, ...], list[TracedCall]] = {}
    for traced in seen.single:
        single.setdefault((traced.rule.name, *traced.params), []).append(traced)
    count: Counter[tuple[str, ...]] = Counter()
    shapes = {}
    for traced in seen.traced:
        what = (traced.rule.name, *traced.params)
        if same := single.get(what):
            shapes[id(traced)] = same[min(count[what], len(same) - 1)].out_shape
        count[what] += 1
    return shapes


def _served(calls: list[TracedCall], layouts: list[Layout]) -> dict[str, Served]:
    """The entries of the parameters of these calls, which rules serve in these layouts."""
    served: dict[str, Served] = {}
    for name in dict.fromkeys(name for traced in calls for name in traced.params):
        own = [i for i, traced in enumerate(calls) if name in traced.params]
        rules = " + ".join(dict.fromkeys(calls[i].rule.name for i in own))
        layout = tuple(layouts[i] for i in own)
        same = len(own) > 1 and len(set(layout)) == 1
        times = f" in {len(own)} calls" if len(own) > 1 else ""
        served[name] = Served("rules", f"{rules}{times}", layout[0] if same else layout)
    return served


def _mark_calls(calls: list[TracedCall], reason: str, reasons: dict[str, str]) -> None:
    """Give the parameters of these calls a reason, unless they have one."""
    for traced in calls:
        for name in traced.params:
            reasons.setdefault(name, reason)


def _unservable(seen: Probe) -> dict[str, str]:
    """Parameters that no rule can serve, whatever its values, each with the reason."""
    calls = Counter(name for traced in seen.traced for name in traced.params)
    reasons = {name: _why_none(seen, name, calls[name]) for name in seen.reference}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_none(seen: Probe, name: str, n_calls: int) -> str:
    if name in seen.hooked:
        return HOOKED
    if name in seen.of_registered_rules:
        return f"its registered rule is used in {n_calls} calls" if n_calls > 1 else ""
    if seen.untraceable and name in seen.untraceable:
        return seen.untraceable[name]
    if name in seen.direct:
        return "used in a call and directly" if n_calls else "used directly"
    return ""


def _matching_layouts(
    seen: Probe, calls: list[TracedCall], alone: list[torch.Size]
) -> list[Layout] | str:
    """The one layout of each call in which the rules give the loop's answer, or why there is none.

    Args:
        seen: What the probe saw.
        calls: Those that share parameters.
        alone: Shape of each one's output for one sample.

    Returns:
        A layout per call, or the reason.
    """
    options = [_layouts(t.out_shape, one) for t, one in zip(calls, alone, strict=True)]
    if not all(options):
        return "no sample axis found"
    # Calls that share parameters in one model fold samples in the same way, or not at all.
    choices = [
        [option[min(i, len(option) - 1)] for option in options]
        for i in range(max(len(option) for option in options))
    ]
    right = [layouts for layouts in choices if _agrees(seen, calls, layouts)]
    if len(right) == 1 or (right and not any(id(t) in (seen.gradients or {}) for t in calls)):
        return right[0]
    return "the layer rule disagrees with the loop" if not right else "ambiguous sample axis"


def _agrees(seen: Probe, calls: list[TracedCall], layouts: list[Layout]) -> bool:
    """Whether the rules give the first sample's squares as the loop does."""
    # A registered rule is also tested on two samples: it must sum squares, not square a sum.
    if not all(t.fits(layout, SAMPLES) for t, layout in zip(calls, layouts, strict=True)):
        return False
    try:
        first = _squares_of(seen, calls, layouts, 0)
        if isinstance(calls[0].rule, RegisteredRule):
            second = _squares_of(seen, calls, layouts, 1)
            both = {name: first[name] + second[name] for name in first}
            together: Sums = {name: torch.zeros_like(seen.reference[name]) for name in first}
            traced = calls[0].fresh()
            if (g := (seen.gradients or {}).get(id(calls[0]))) is not None:
                traced.add(g, layouts[0], SAMPLES, together)
            traced.finish(layouts[0], SAMPLES, together)
            if seen.wrong(together, both):
                return False
    except (RuntimeError, IndexError, OverwrittenError):
        return False  # the rule's shapes do not hold in this layout
    return not seen.wrong(first)


def _squares_of(seen: Probe, calls: list[TracedCall], layouts: list[Layout], n: int) -> Sums:
    watch, fresh = Watch(n), [traced.fresh() for traced in calls]
    shared = find_shared(fresh)
    for traced, original, layout in zip(fresh, calls, layouts, strict=True):
        if (g := (seen.gradients or {}).get(id(original))) is None:
            continue
        if traced.shared is not None:
            traced.add(g, layout, SAMPLES, {})
        else:
            traced.watch(g, layout, SAMPLES, watch)
    for several in shared:
        several.watch(SAMPLES, watch)
    for traced, layout in zip(fresh, layouts, strict=True):
        traced.finish(layout, SAMPLES, {}, watch)
    return watch.squares


def _layouts(three: torch.Size, one: torch.Size) -> list[Layout]:
    """Layouts under which an axis grows from one sample to three, whatever the others do."""
    if len(three) != len(one):
        return []
    # A model may cut its sequences to the longest of a batch, so several axes may grow.
    grown = [dim for dim in range(len(three)) if three[dim] != one[dim]]
    layouts = [Layout(dim, one[dim]) for dim in grown if three[dim] == SAMPLES * one[dim]]
    folded = [replace(layout, interleaved=True) for layout in layouts if layout.folded > 1]
    return layouts + folded

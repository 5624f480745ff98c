"""Cost of a diagonal Fisher: our engine beside plain PyTorch and other libraries.

Every time is a multiple of the gradient pass: one forward and backward over the same samples. All
engines of a network are timed in turn, round after round, each between two gradient passes that are
its unit, so whatever else the machine does falls on all alike. The gradient pass is timed so too:
the spread of its own row is what the machine adds. On a CPU the clock is the process's own CPU time
(one thread), which is what a quiet machine's clock would show; on a GPU it is the wall clock after
synchronising. Peak memory is the median of three fresh processes. An engine is called wrong where
it claims the per-sample Fisher and is off the float64 sample loop by more than 1 %.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import random
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import matplotlib.pyplot as plt
import pandas as pd
import pandera.pandas as pa
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.figures import style
from experiments.reporting.study_output import columns, study_output
from experiments.results import tables
from experiments.results.schemas import PROVENANCE
from experiments.settings.grids import check_device
from experiments.settings.values import Count, check_values
from experiments.timing.fisher_engines import (
    ENGINES,
    NETWORKS,
    OURS,
    UNIT,
    Engine,
    Fisher,
    NotOfferedError,
    Problem,
    make_problem,
    relative_error,
    sample_loop,
)

WRONG = 0.01  # relative error; float32 with a flipped ReLU stays below
_ERROR_SAMPLES = 6
MOST_PANELS = 5  # of the figure, beside each other
_PEAKS = 3  # fresh processes: what the allocator rounds up differs from one to the next
Kind = Literal["predicted", "exact"]
KINDS = get_args(Kind)
MEASURED = ["device", "network", "kind"]  # together, so that multiples are of one unit


_MULTIPLES = ("multiple_q1", "multiple_q3", "multiple_min", "multiple_max")
FISHER_SPEED = pa.DataFrameSchema(
    {
        **columns(str, "network"),
        **columns(str, "kind", check=pa.Check.isin(KINDS)),
        **columns(str, "engine"),
        **columns(str, "version", nullable=True),
        **columns(str, "device"),
        **columns(int, "samples", "rounds", check=pa.Check.ge(1)),
        **columns(
            str,
            "status",
            check=pa.Check.isin([
                *("ok", "approximation", "wrong values"),
                *("not offered", "failed", "absent"),
            ]),
        ),
        **columns(str, "note", nullable=True),
        **columns(float, "relative_error", "relative_error_float64", nullable=True),
        **columns(float, "seconds_per_sample", nullable=True, check=pa.Check.gt(0)),
        **columns(
            float,
            *("multiple_of_gradient_pass", *_MULTIPLES),
            *("peak_mib", "peak_multiple"),
            nullable=True,
        ),
        **PROVENANCE,
    },
    unique=["network", "kind", "engine", "device"],
    strict=True,
    name="fisher_speed.csv",
)


@dataclass(frozen=True)
class FisherSpeedSettings:
    """Time, memory and error of the diagonal Fisher, engine by engine."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """Networks to measure on."""
    engines: tuple[str, ...] = tuple(ENGINES)
    """Engines to measure; the gradient pass is always among them."""
    kinds: tuple[Kind, ...] = KINDS
    """Label types: the model's argmax, or all classes."""
    rounds: Count = 9
    """Times each engine is measured, in turn, after one round that is not counted."""
    device: str = "cpu"
    """Where to run: cpu, or cuda."""
    no_memory: bool = False
    """Leave out peak memory, which takes a fresh process per engine."""
    out: str = "runs/fisher-speed"
    """Folder of the table and the plot."""


def run(settings: FisherSpeedSettings) -> pd.DataFrame:
    """Measure and write `fisher_speed.csv` and `fisher_speed.png`.

    Args:
        settings: What to measure. What the folder holds of other networks, label types and devices
            is kept.

    Returns:
        A row per network, label type and engine. Units: seconds per sample, multiples of the
        gradient pass, MiB.

    Raises:
        ValueError: An unknown network or engine, or a device that is not there.
    """
    _check(settings)
    torch.set_num_threads(1)
    output = study_output(settings)
    if absent := [name for name in settings.engines if ENGINES[name].version() is None]:
        output.console.print(
            f"Not installed, so that the table has no times of them: {', '.join(absent)}. "
            "`pip install -e '.[peers]'` has them all.",
            markup=False,
        )
    held = tables.read(output.folder, FISHER_SPEED)
    rows = []
    for network in settings.networks:
        for kind in settings.kinds:
            output.console.print(f"{network}, {kind}: {settings.rounds} rounds ...")
            rows += output.cell(f"{network} {kind}", partial(_measure, network, kind, settings))
    table = output.table(_with_kept(pd.DataFrame(rows), held), FISHER_SPEED)
    if table["multiple_of_gradient_pass"].notna().any():
        output.figure(draw_speeds(table), "fisher_speed")
    names = ("network", "kind", "engine", "status", "multiple_of_gradient_pass", "peak_multiple")
    output.show(table[[*names, "relative_error"]], index=False)
    output.console.print(f"Table and figure: {output.folder}")
    return table


def _with_kept(table: pd.DataFrame, held: pd.DataFrame) -> pd.DataFrame:
    """The new rows, and those held of what was not measured anew."""
    if held.empty:
        return table
    new = set(table[MEASURED].itertuples(index=False, name=None))
    kept = [cell not in new for cell in held[MEASURED].itertuples(index=False, name=None)]
    both = pd.concat([held[kept], table], ignore_index=True) if any(kept) else table
    places = {name: i for i, name in enumerate((*NETWORKS, *KINDS))}
    return both.sort_values(
        MEASURED, kind="stable", key=lambda c: c.map(lambda x: places.get(x, x)), ignore_index=True
    )


def _check(settings: FisherSpeedSettings) -> None:
    check_values(settings)
    for field, given, allowed in (
        ("networks", settings.networks, NETWORKS),
        ("engines", settings.engines, ENGINES),
    ):
        for name in given:
            if name not in allowed:
                raise ValueError(f"`{field}` must be among {', '.join(allowed)}, got {name!r}.")
    check_device(settings.device)


def _measure(network: str, kind: str, settings: FisherSpeedSettings) -> list[dict[str, object]]:
    """Rows of one network and label type; all are absent without the network's library."""
    try:
        reference, missing = _reference(network, kind, settings.device), ""
    except ModuleNotFoundError as error:
        reference, missing = {}, f"pip install {error.name}"
    rows: dict[str, dict[str, object]] = {}
    timed: dict[str, tuple[Callable[[], Fisher], int]] = {}
    for name in dict.fromkeys((UNIT, *settings.engines)):
        engine = ENGINES[name]
        spec = NETWORKS[network]
        samples = spec.slow_samples if engine.slow else spec.samples
        row: dict[str, object] = {
            "network": network, "kind": kind, "engine": name, "version": engine.version(),
            "device": settings.device, "samples": samples, "rounds": settings.rounds,
        }  # fmt: skip
        rows[name] = row
        if missing:
            row["status"], row["note"] = "absent", missing
            continue
        row["status"], row["note"], row["relative_error"] = _try(
            engine, network, kind, settings, reference
        )
        if row["status"] in ("ok", "wrong values", "approximation"):
            problem = make_problem(network, kind, samples=samples, device=settings.device)
            timed[name] = engine.prepare(problem), samples
    if missing:
        return list(rows.values())
    _time(timed, rows, settings)
    if OURS in rows:
        rows[OURS]["relative_error_float64"] = _float64_error(
            network, kind, reference, settings.device
        )
    if not settings.no_memory:
        for name in timed:
            compiled = "compiled" in name  # its peak would be the compiler's
            if (kind == "predicted" or name in (UNIT, OURS)) and not compiled:
                rows[name]["peak_mib"] = _peak(network, kind, name, settings.device)
        for name in timed:
            if "peak_mib" in rows[name]:
                peaks = rows[name]["peak_mib"], rows[UNIT]["peak_mib"]
                rows[name]["peak_multiple"] = peaks[0] / peaks[1]  # type: ignore[operator]
    return list(rows.values())


def _double(problem: Problem) -> Problem:
    x = problem.x.double() if problem.x.is_floating_point() else problem.x
    return replace(problem, model=deepcopy(problem.model).double(), x=x)


def _reference(network: str, kind: str, device: str) -> Fisher:
    problem = make_problem(network, kind, samples=_ERROR_SAMPLES, device=device)
    return sample_loop(_double(problem))()


def _float64_error(network: str, kind: str, reference: Fisher, device: str) -> float:
    problem = make_problem(network, kind, samples=_ERROR_SAMPLES, device=device)
    return relative_error(ENGINES[OURS].prepare(_double(problem))(), reference)


def _try(
    engine: Engine, network: str, kind: str, settings: FisherSpeedSettings, reference: Fisher
) -> tuple[str, str, float | None]:
    """Status, note and relative error of an engine on a few samples."""
    if engine.version() is None:
        return "absent", f"pip install {engine.package}", None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other libraries' own
            problem = make_problem(network, kind, samples=_ERROR_SAMPLES, device=settings.device)
            result = engine.prepare(problem)()
    except NotOfferedError as error:
        return "not offered", f"only {error}", None
    except Exception as error:  # whatever a library raises on a network that it can't do
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", None
    if engine is ENGINES[UNIT]:
        return "ok", "", None
    difference = relative_error(result, reference)
    if not engine.exact:
        return "approximation", "", difference
    return ("ok" if difference < WRONG else "wrong values"), "", difference


def _time(
    timed: dict[str, tuple[Callable[[], Fisher], int]],
    rows: dict[str, dict[str, object]],
    settings: FisherSpeedSettings,
) -> None:
    """Add to each row the median time and the multiple of the gradient passes around it."""

    def per_sample(name: str) -> float:
        call, samples = timed[name]
        return _seconds(call, settings) / samples

    order, shuffle = list(timed), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in timed}
    ratios: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(settings.rounds + 1):
        shuffle.shuffle(order)
        before = per_sample(UNIT)
        for name in order:
            times[name].append(per_sample(name))
            after = per_sample(UNIT)
            ratios[name].append(2 * times[name][-1] / (before + after))
            before = after
    for name in timed:
        multiples = pd.Series(ratios[name][1:])  # the first warms up
        rows[name] |= {
            "seconds_per_sample": statistics.median(times[name][1:]),
            "multiple_of_gradient_pass": multiples.median(),
            "multiple_q1": multiples.quantile(0.25),
            "multiple_q3": multiples.quantile(0.75),
            "multiple_min": multiples.min(),
            "multiple_max": multiples.max(),
        }


def _seconds(call: Callable[[], Fisher], settings: FisherSpeedSettings) -> float:
    on_cpu = settings.device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    if not on_cpu:
        torch.cuda.synchronize()
    start = clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    if not on_cpu:
        torch.cuda.synchronize()
    return clock() - start


def _peak(network: str, kind: str, engine: str, device: str) -> float:
    """MiB that one call adds to a fresh process with the network and its data in memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "avalanche", "torchvision", "transformers"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        peaks = [pool.apply(_peak_here, (network, kind, engine, device)) for _ in range(_PEAKS)]
    return statistics.median(peaks)


def _peak_here(network: str, kind: str, engine: str, device: str) -> float:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    spec = NETWORKS[network]
    samples = spec.slow_samples if ENGINES[engine].slow else spec.samples
    problem = make_problem(network, kind, samples=samples, device=device)
    few = replace(problem, x=problem.x[:1], y=problem.y[:1])
    ENGINES[engine].prepare(few)()  # imports, and whatever is allocated once per process
    call = ENGINES[engine].prepare(problem)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self")
    if not status.exists():
        return float("nan")  # only Linux tells a process its own high-water mark
    _give_back()
    (status / "clear_refs").write_text("5")  # resets the mark to what is resident now
    before = _high_water()
    call()
    return _high_water() - before


def _give_back() -> None:
    """Return freed memory to the system, so that reusing it shows in the measurement."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _high_water() -> float:
    """Largest resident MiB since the mark was reset; `ru_maxrss` would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    raise RuntimeError("/proc/self/status has no VmHWM.")


def draw_speeds(table: pd.DataFrame) -> Figure:
    """Rows of panels for each label type, a panel per network, a line per engine."""
    table = table[(table["engine"] != UNIT) & table["multiple_of_gradient_pass"].notna()]
    rows = []  # of panels: label type, its engines, networks
    for kind, part in table.groupby("kind", sort=False):
        networks = list(dict.fromkeys(part["network"]))
        for i in range(0, len(networks), MOST_PANELS):
            rows.append((kind, _engines_by_speed(part), networks[i : i + MOST_PANELS]))
    heights = [len(engines) + 3 for _, engines, _ in rows]
    wide = max(len(networks) for *_, networks in rows)
    figure, axes = plt.subplots(
        *(len(rows), wide),
        figsize=(1.9 + 1.85 * wide, 0.7 + 0.24 * sum(heights)),
        height_ratios=heights,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for panels, (kind, engines, networks) in zip(axes, rows, strict=True):
        of_kind = table[table["kind"] == kind]
        for axis, network in zip(panels, networks, strict=False):
            _draw_network(axis, of_kind[of_kind["network"] == network], engines)
            axis.set_title(network)
        for axis in panels[len(networks) :]:
            axis.set_axis_off()
        panels[0].set_yticks(range(len(engines)), engines)
        panels[0].set_ylim(len(engines) - 0.5, -0.5)
        words = "all classes (exact)" if kind == "exact" else kind
        panels[0].set_ylabel(f"labels: {words}")
    counts = sorted({int(n) for n in table["rounds"].dropna()})
    rounds = " or ".join(map(str, counts))
    title = "Time of the diagonal Fisher as a multiple of one gradient pass"
    note = f"median of {rounds} rounds, bar: quartiles; hollow: another quantity or wrong values"
    style.title(figure, title, note)
    return figure


def _engines_by_speed(rows: pd.DataFrame) -> list[str]:
    """Ours first, then by the median over the networks."""
    medians = rows.groupby("engine")["multiple_of_gradient_pass"].median().sort_values()
    return sorted(medians.index, key=lambda name: (name != OURS, medians[name]))


def _draw_network(axis: Axes, rows: pd.DataFrame, engines: list[str]) -> None:
    for row in rows.to_dict("records"):
        place, at = engines.index(row["engine"]), row["multiple_of_gradient_pass"]
        colour = ENGINE_COLOURS.get(row["engine"], style.PALETTE["grey"][0])
        axis.hlines(place, row["multiple_q1"], row["multiple_q3"], color=colour, lw=2.5, alpha=0.5)
        fill = colour if row["status"] == "ok" else "white"
        axis.plot(at, place, "o", color=colour, markerfacecolor=fill, markersize=5)
        text = f"{at:.2f}" if at < 10 else f"{at:.0f}"
        axis.annotate(text, (at, place), (6, 0), textcoords="offset points", va="center", size=7)
    axis.axvline(1, color=style.INK, linewidth=0.8)
    style.log_axis(axis, "x", (1, 10, 100))
    axis.set_xlim(0.5, 1500)


ENGINE_COLOURS = {
    OURS: style.METHOD_COLOURS["ewc"],
    "Avalanche EWC": style.METHOD_COLOURS["avalanche-ewc"],
}

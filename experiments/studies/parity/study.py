"""Parity with Avalanche's EWC: the same numbers where definitions agree, or how far apart.

Numerical checks over whole runs; paired seeds with an equivalence verdict, each method at its own
lambda, chosen on validation images with seeds that are not reported; curves over lambda.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pandas as pd
from rich.console import Console

from experiments.data.sources import DataSource, find_data
from experiments.reporting.figures.folder import plot_all
from experiments.reporting.terminal import print_checks, print_comparisons
from experiments.results import schemas, tables
from experiments.results.provenance import provenance
from experiments.results.statistics import chosen_lambdas, paired_differences
from experiments.results.store import PLOTS, read_results
from experiments.settings.grids import Job, PermutedMnist, SplitMnist
from experiments.settings.run import PENALISED, Dataset, RunSettings
from experiments.settings.tuned import check_unseen
from experiments.settings.values import Count, Seed
from experiments.studies.parity.curves import Curves, run_curves
from experiments.sweeps.jobs import completed_runs, show_plan

Part = Literal["numerical", "behaviour", "curves"]
BENCHMARKS = (("permuted", "domain"), ("split", "task"), ("split", "domain"), ("split", "class"))
# Two hidden layers and more steps than the main job has, which must be done while one waits.
BATCH_SIZE = {"mnist": 256, "digits": 128, "fashion-mnist": 256}
# A network that fits its training data has little predicted-label Fisher left, hence the digits'.
TUNING_GRIDS: dict[tuple[str, str, str, str], tuple[float, ...]] = {
    ("split", "mnist", "task", "ewc"): (1e2, 1e3, 1e4, 1e5, 1e6),
    ("split", "mnist", "task", "avalanche-ewc"): (1e3, 1e4, 1e5, 1e6, 1e7),
    ("permuted", "mnist", "domain", "ewc"): (3.0, 10.0, 30.0, 100.0, 300.0),
    ("permuted", "mnist", "domain", "avalanche-ewc"): (30.0, 100.0, 300.0, 1000.0, 3000.0),
    ("split", "digits", "task", "ewc"): (1e5, 1e6, 1e7, 1e8, 1e9),
    ("split", "digits", "task", "avalanche-ewc"): (1e3, 1e4, 1e5, 1e6, 1e7),
    ("permuted", "digits", "domain", "ewc"): (30.0, 100.0, 300.0, 1e3, 3e3),
    ("permuted", "digits", "domain", "avalanche-ewc"): (300.0, 1e3, 3e3, 1e4, 3e4),
}
# The other streams' is a coarse one of split MNIST, task-incremental.
COARSE = {"ewc": (1e3, 1e4, 1e5), "avalanche-ewc": (1e4, 1e5, 1e6)}


@dataclass(frozen=True)
class Parity(Job):
    """Compare ours with Avalanche's EWC, number by number and result by result."""

    parts: tuple[Part, ...] = ("numerical", "behaviour", "curves")
    """What to do; what is not named is kept as it is in the output folder."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Reported: paired, the same for both methods."""
    tuning_seeds: tuple[Seed, ...] = (100,)
    """Not reported: each method's lambda is chosen with them."""
    curve_seeds: tuple[Seed, ...] = (0, 1, 2)
    """Of the curves over lambda."""
    hidden_size: Count = 100
    """Units per hidden layer in the numerical checks and the curves."""
    tables_only: bool = False
    """Run nothing: write tables and pictures of what is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unseen(self.seeds, self.tuning_seeds)

    name = "parity"

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The paired runs, each method at its own lambda; seed by seed, for complete pairs."""
        chosen = self.chosen(dataset)
        for seed in self.seeds:
            for benchmark, scenario in BENCHMARKS:
                for method in PENALISED:
                    ewc_lambda = chosen[benchmark, scenario, method]
                    yield from _grid(benchmark, scenario, method, (ewc_lambda,), (seed,), dataset)

    def chosen(self, dataset: Dataset) -> dict[tuple[str, str, str], float]:
        """The lambda that were best on validation images."""
        summary = tables.read(self.folder / "tuning", schemas.SUMMARY)
        rows = chosen_lambdas(summary[summary["dataset"] == dataset])
        return {(r.benchmark, r.scenario, r.method): r.ewc_lambda for r in rows.itertuples()}


@dataclass(frozen=True)
class _Tuning(Job):
    seeds: tuple[int, ...] = (100,)

    name = "parity/tuning"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        for benchmark, scenario in BENCHMARKS:
            for method in PENALISED:
                lambdas = TUNING_GRIDS.get((benchmark, dataset, scenario, method), COARSE[method])
                for cell in _grid(benchmark, scenario, method, lambdas, self.seeds, dataset):
                    yield replace(cell, validation=True)


def _grid(
    benchmark: str,
    scenario: str,
    method: str,
    lambdas: tuple[float, ...],
    seeds: tuple[int, ...],
    dataset: Dataset,
) -> Iterator[RunSettings]:
    grid = SplitMnist if benchmark == "split" else PermutedMnist
    options: dict[str, Any] = {"methods": (method,), "ewc_lambda": lambdas, "seeds": seeds}
    options |= {"hidden_layers": (2,), "learning_rate": (1e-3,)}
    options |= {"batch_size": (BATCH_SIZE[dataset],)}
    yield from grid(scenario=(scenario,), **options).cells(dataset)


def run(settings: Parity) -> pd.DataFrame:
    """Make what is missing; write comparisons, checks, the run tables and the figures."""
    console = Console(quiet=settings.quiet)
    folder = settings.folder
    source = find_data(settings.dataset, settings.data_root)
    make = not settings.tables_only
    curves = Curves(
        **_shared(settings, "curves"), seeds=settings.curve_seeds, hidden_size=settings.hidden_size
    )
    tuning = _Tuning(**_shared(settings, "tuning"), seeds=settings.tuning_seeds)
    if settings.dry_run:
        _show_plans(settings, curves, tuning, source.name, console)
        raise SystemExit(0)
    rows = _numerical(settings, source, console)
    if "curves" in settings.parts:
        run_curves(curves, make=make)
    if "behaviour" in settings.parts:
        completed_runs(tuning, console, make=make)
        runs, _ = completed_runs(settings, console, make=make)
        plot_all(tables.read(folder, schemas.ACCURACY), runs, folder / PLOTS)
    comparisons = paired_differences(tables.read(folder, schemas.RUNS))
    if len(comparisons):
        tables.write(comparisons, folder, schemas.COMPARISONS)
        print_comparisons(comparisons, console)
    if rows:
        print_checks(tables.write_rows(rows, folder, schemas.CHECKS), console)
    return comparisons


def _show_plans(
    settings: Parity, curves: Curves, tuning: _Tuning, dataset: Dataset, console: Console
) -> None:
    """Print the runs of each part."""
    if "curves" in settings.parts:
        show_plan(curves, list(curves.cells(dataset)), console)
    if "behaviour" in settings.parts:
        cells = list(tuning.cells(dataset))
        show_plan(tuning, cells, console)
        found = read_results(settings.folder / "tuning")[1]
        if {cell.run_id for cell in cells} <= set(found["run_id"]):
            show_plan(settings, list(settings.cells(dataset)), console)
        else:
            n = len(settings.seeds) * len(BENCHMARKS) * len(PENALISED)
            line = f"Then {n} paired runs, with the lambdas that those find best."
            console.print(line, highlight=False)
    if "numerical" in settings.parts:
        console.print("The numerical checks that are not there yet come first.")


def _numerical(settings: Parity, source: DataSource, console: Console) -> list[dict[str, Any]]:
    """Rows of the numerical checks; each check is kept when it is done."""
    from experiments.studies.parity.numerical import checks  # and with it Avalanche

    kept = settings.folder / "numerical"
    kept.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, make in checks(source, hidden_size=settings.hidden_size, seed=0).items():
        file = kept / f"{name}.json"
        wanted = "numerical" in settings.parts and not settings.tables_only
        if wanted and (settings.force or not file.exists()):
            tables.replace_file(file, json.dumps([{**row, **provenance()} for row in make()]))
            console.print(f"{name}: done", highlight=False)
        if file.exists():
            rows += json.loads(file.read_text(encoding="utf-8"))
    return rows


def _shared(settings: Parity, part: str) -> dict[str, Any]:
    shared = {field.name: getattr(settings, field.name) for field in fields(Job)}
    return {**shared, "out": str(settings.folder / part)}

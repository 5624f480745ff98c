"""Does a lambda that was found for Avalanche's EWC serve `DiagonalEWC`, the drop-in?

For each stream and mini-batch, Avalanche's lambda is chosen on validation images with seeds that
are not reported. Then both methods take it, paired by seed; ours with `normalize="avalanche"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import pandas as pd
from rich.console import Console

from experiments.data.sources import find_data
from experiments.reporting.figures.folder import plot_all
from experiments.reporting.terminal import print_comparisons
from experiments.results import schemas, tables
from experiments.results.statistics import paired_differences
from experiments.settings.grids import Grid, Job, PermutedMnist, SplitMnist
from experiments.settings.run import PENALISED, Dataset, Method, RunSettings
from experiments.settings.values import Count, Seed
from experiments.sweeps.jobs import completed_runs, show_plan

# The grid of a stream, its number of experiences, and lambdas to choose from.
STREAMS: tuple[tuple[type[Grid], int, tuple[float, ...]], ...] = (
    (PermutedMnist, 5, (10.0, 30.0, 100.0, 300.0, 1e3)),
    (PermutedMnist, 10, (10.0, 30.0, 100.0, 300.0, 1e3)),
    (SplitMnist, 5, (1e4, 1e5, 1e6, 1e7)),
)
CELL = ["benchmark", "n_experiences", "batch_size"]
Cell = tuple[str, int, int]


@dataclass(frozen=True)
class DropIn(Job):
    """Compare DiagonalEWC with Avalanche's EWC at the lambda that was found for the latter."""

    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Reported: paired, the same for both methods."""
    tuning_seeds: tuple[Seed, ...] = (100,)
    """Not reported: Avalanche's lambda is chosen with them."""
    batch_size: tuple[Count, ...] = (32, 128, 512)
    """Samples per mini-batch, in training and in Avalanche's F, which depends on it."""

    name = "drop-in"

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Both methods at Avalanche's lambda; seed by seed, for complete pairs."""
        chosen = chosen_by_cell(tables.read(self.folder / "tuning", schemas.SUMMARY))
        for seed in self.seeds:
            for run in _runs(self.batch_size, PENALISED, (seed,), dataset):
                if run.ewc_lambda == chosen[run.benchmark, run.n_experiences, run.batch_size]:
                    yield run


@dataclass(frozen=True)
class _Tuning(Job):
    seeds: tuple[Seed, ...] = (100,)
    batch_size: tuple[Count, ...] = (32, 128, 512)

    name = "drop-in/tuning"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        for run in _runs(self.batch_size, ("avalanche-ewc",), self.seeds, dataset):
            yield replace(run, validation=True)


def _runs(
    batch_sizes: Sequence[int], methods: tuple[Method, ...], seeds: Sequence[int], dataset: Dataset
) -> Iterator[RunSettings]:
    for grid, n_experiences, lambdas in STREAMS:
        yield from grid(
            methods=methods,
            normalize=("avalanche",),
            ewc_lambda=lambdas,
            experiences=(n_experiences,),
            batch_size=tuple(batch_sizes),
            seeds=tuple(seeds),
        ).cells(dataset)


def chosen_by_cell(summary: pd.DataFrame) -> dict[Cell, float]:
    """The lambda with the best accuracy for each stream and mini-batch.

    Args:
        summary: Rows of the tuning's `summary.csv`.

    Returns:
        By benchmark, number of experiences and mini-batch; of equals the smallest lambda.
    """
    rows = summary[summary["metric"] == "average_accuracy"]
    rows = rows.sort_values(["mean", "ewc_lambda"], ascending=[False, True])
    best = rows.groupby(CELL, as_index=False).first()
    return {(r.benchmark, r.n_experiences, r.batch_size): r.ewc_lambda for r in best.itertuples()}


def run(settings: DropIn) -> pd.DataFrame:
    """Make what is missing; write the run tables, the comparisons and the figures.

    Args:
        settings: What to compare.

    Returns:
        Rows of `comparisons.csv`; `difference` is the drop-in's accuracy less Avalanche's.
    """
    console = Console(quiet=settings.quiet)
    shared = {field.name: getattr(settings, field.name) for field in fields(Job)}
    tuning = _Tuning(
        **{**shared, "out": str(settings.folder / "tuning")},
        seeds=settings.tuning_seeds,
        batch_size=settings.batch_size,
    )
    if settings.dry_run:
        source = find_data(settings.dataset, settings.data_root)
        show_plan(tuning, list(tuning.cells(source.name)), console)
        n = len(settings.seeds) * len(STREAMS) * len(settings.batch_size) * len(PENALISED)
        console.print(f"Then {n} paired runs, at the lambdas that those find.", highlight=False)
        raise SystemExit(0)
    completed_runs(tuning, console)
    runs, folder = completed_runs(settings, console)
    plot_all(tables.read(folder, schemas.ACCURACY), runs, folder / "plots")
    comparisons = paired_differences(runs)
    tables.write(comparisons, folder, schemas.COMPARISONS)
    print_comparisons(comparisons, console)
    return comparisons

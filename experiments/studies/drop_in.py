"""Does a lambda that was found for Avalanche's EWC serve `DiagonalEWC`, the drop-in?

For each stream and mini-batch, Avalanche's lambda is chosen on validation images with seeds that
are not reported. Then both methods take it, paired by seed; ours with `normalize="avalanche"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from rich.console import Console

from experiments.reporting.figures.folder import plot_all
from experiments.reporting.terminal import print_comparisons
from experiments.results import schemas, tables
from experiments.results.statistics import paired_differences
from experiments.results.store import PLOTS
from experiments.settings.run import Dataset, RunSettings
from experiments.settings.values import Count, Seed
from experiments.studies.tuned_first import TunedFirst, search_lambdas
from experiments.sweeps.jobs import completed_runs

STREAMS: tuple[tuple[str, tuple[int, ...]], ...] = (("permuted", (5, 10)), ("split", (5,)))

FISHER_TYPES = ("predicted", "class_mean", "class_mean_empirical")


@dataclass(frozen=True)
class DropIn(TunedFirst):
    """Compare DiagonalEWC with Avalanche's EWC at the lambda that was found for the latter."""

    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Reported: paired, the same for both methods."""
    tuning_seeds: tuple[Seed, ...] = (100,)
    """Avalanche's lambda is chosen with them, on validation images; none of them is reported."""
    batch_size: tuple[Count, ...] = (32, 128, 512)
    """Samples per mini-batch, in training and in Avalanche's F, which depends on it."""

    name = "drop-in"

    @property
    def grids(self) -> list[dict[str, Any]]:
        """Avalanche's EWC on every stream."""
        theirs = {"methods": ("avalanche-ewc",), "batch_size": self.batch_size}
        return [{"benchmark": (name,), "experiences": n, **theirs} for name, n in STREAMS]

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """All arms at Avalanche's lambda; seed by seed, for complete pairs."""
        for run in super().cells(dataset):
            yield run
            for fisher_type in FISHER_TYPES:
                yield replace(run, method="ewc", fisher_type=fisher_type, normalize="avalanche")


def run(settings: DropIn) -> pd.DataFrame:
    """Make what is missing; write the run tables, the comparisons and the figures."""
    console = Console(quiet=settings.quiet)
    search_lambdas(settings, console)
    runs, folder = completed_runs(settings, console)
    plot_all(tables.read(folder, schemas.ACCURACY), runs, folder / PLOTS)
    comparisons = paired_differences(runs)
    tables.write(comparisons, folder, schemas.COMPARISONS)
    print_comparisons(comparisons, console)
    return comparisons

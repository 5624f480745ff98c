"""Does one lambda serve when each experience's Fisher is divided by its mean?

Split (task-incremental) and permuted MNIST, PREDICTED and EXACT Fisher, as it is and divided by its
mean. Everything is measured on held-out training images: this is where a default is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from rich.console import Console

from ewc_plugin.fisher.scores import FisherType
from experiments.reporting.figures.over_lambda import draw_curve
from experiments.reporting.figures.style import DPI
from experiments.results.statistics import by_lambda
from experiments.results.tables import replace_file
from experiments.settings.grids import DEFAULT_EPOCHS, Job
from experiments.settings.run import Benchmark, Dataset, RunSettings, Scenario
from experiments.sweeps.jobs import completed_runs

BENCHMARKS: tuple[tuple[Benchmark, Scenario], ...] = (("permuted", "domain"), ("split", "task"))
KEY = ["benchmark", "fisher_type", "normalize"]
COLOURS = {"predicted": "#009E73", "exact": "#CC79A7"}
AS_IT_IS = "none"


@dataclass(frozen=True)
class NormalizedLambda(Job):
    """Accuracy over lambda with F as it is and with F divided by its mean, on validation images."""

    normalized_lambda: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Penalty strengths for F divided by its mean."""
    plain_lambda: tuple[float, ...] = (10.0, 100.0, 1e3, 1e4)
    """Penalty strengths for F as it is, with the first Fisher type alone."""
    fisher_type: tuple[FisherType, ...] = (FisherType.PREDICTED, FisherType.EXACT)
    """Labels that the Fisher averages over, where it is divided by its mean."""
    permutations: int = 3
    """Experiences of permuted MNIST; split MNIST has five."""
    hidden_size: int = 100
    """Units in each of the two hidden layers: small, since the sweep has many runs."""
    seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    """Each seeds the stream, the initial weights and the order; none of them is reported elsewhere.
    """

    name = "normalized-lambda"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Seed by seed, so that a sweep that is cut short has complete seeds."""
        scales = {"mean": self.normalized_lambda, None: self.plain_lambda}
        for seed in self.seeds:
            for benchmark, scenario in BENCHMARKS:
                for normalize, lambdas in scales.items():
                    for fisher_type in self.fisher_type if normalize else self.fisher_type[:1]:
                        for ewc_lambda in lambdas:
                            yield RunSettings(
                                benchmark,
                                dataset,
                                scenario,
                                "ewc",
                                seed,
                                fisher_type=FisherType(fisher_type).value,
                                ewc_lambda=ewc_lambda,
                                mode="separate",
                                epochs=DEFAULT_EPOCHS[benchmark, dataset],
                                validation=True,
                                data_path=self.data_path,
                                device=self.device,
                                normalize=normalize,
                                n_experiences=self.permutations if benchmark == "permuted" else 5,
                                hidden_size=self.hidden_size,
                            )


def run(settings: NormalizedLambda) -> pd.DataFrame:
    """Runs the sweep; writes `normalized_lambda.csv` and `normalized_lambda.png`.

    Args:
        settings: The sweep.

    Returns:
        Average accuracy per benchmark, Fisher type, normalisation and lambda.
    """
    console = Console(quiet=settings.quiet)
    runs, folder = completed_runs(settings, console)
    runs = runs.assign(normalize=runs["normalize"].fillna(AS_IT_IS))
    parts = [
        by_lambda(part, "average_accuracy").assign(**dict(zip(KEY, key, strict=True)))
        for key, part in runs.groupby(KEY)
    ]
    table = pd.concat(parts, ignore_index=True)
    table = table[[*KEY, *(c for c in table.columns if c not in KEY)]]
    replace_file(folder / "normalized_lambda.csv", table.to_csv(index=False))
    plot(table).savefig(folder / "normalized_lambda.png", dpi=DPI, metadata={"Software": None})
    console.print(table.to_string(index=False), highlight=False)
    return table


def plot(table: pd.DataFrame) -> plt.Figure:
    """A row per benchmark; F as it is on the left, divided by its mean on the right."""
    figure, axes = plt.subplots(
        len(BENCHMARKS), 2, figsize=(9, 6.5), sharex="col", sharey="row", layout="constrained"
    )
    titles = {AS_IT_IS: "F as it is", "mean": "F divided by its mean"}
    for (benchmark, fisher_type, normalize), curve in table.groupby(KEY):
        row = [name for name, _ in BENCHMARKS].index(benchmark)
        axis = axes[row, list(titles).index(normalize)]
        axis.set_xscale("log")
        draw_curve(axis, curve, fisher_type, COLOURS[fisher_type])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        axis.set_title(f"{benchmark} MNIST, {titles[normalize]}", fontsize=10)
        axis.set_ylabel("average accuracy (validation)" if normalize == AS_IT_IS else "")
        axis.set_xlabel("ewc_lambda")
    figure.suptitle(f"mean over {int(table['n'].max())} seeds, 95 % interval")
    return figure

"""Does one lambda serve when each experience's Fisher is divided by its mean?

Split (task-incremental) and permuted MNIST, PREDICTED and EXACT Fisher, as it is and divided by its
mean. Everything is measured on held-out training images: this is where a default is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
import pandera.pandas as pa
from matplotlib.figure import Figure

from ewc_plugin.fisher.scores import FisherType
from experiments.reporting.figures import style
from experiments.reporting.labels import BENCHMARKS as BENCHMARK_WORDS
from experiments.reporting.study_output import CURVE_COLUMNS, columns
from experiments.results.statistics import by_lambda
from experiments.settings.grids import DEFAULT_EPOCHS, Job
from experiments.settings.run import Benchmark, Dataset, RunSettings, Scenario
from experiments.settings.unset import UNSET
from experiments.settings.values import Count, Lambda, Seed
from experiments.studies.completed import completed_study

BENCHMARKS: tuple[tuple[Benchmark, Scenario], ...] = (("permuted", "domain"), ("split", "task"))
KEY = ["benchmark", "fisher_type", "normalize"]
AS_IT_IS = UNSET["normalize"]
SMALL = 0.005  # accuracy that is lost against the best lambda
RECOMMENDED = 0.01
NORMALIZED_LAMBDA = pa.DataFrameSchema(
    {**columns(str, *KEY), **CURVE_COLUMNS},
    unique=[*KEY, "ewc_lambda"],
    strict=True,
    name="normalized_lambda.csv",
)


@dataclass(frozen=True)
class NormalizedLambda(Job):
    """Accuracy over lambda with F as it is and with F divided by its mean, on validation images."""

    ewc_lambda: tuple[Lambda, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Penalty strengths for F divided by its mean."""
    plain_ewc_lambda: tuple[Lambda, ...] = (10.0, 100.0, 1e3, 1e4)
    """Penalty strengths for F as it is, with the first Fisher type alone."""
    fisher_type: tuple[FisherType, ...] = (FisherType.PREDICTED, FisherType.EXACT)
    """Labels that the Fisher averages over, where it is divided by its mean."""
    permutations: Count = 3
    """Experiences of permuted MNIST; split MNIST has five."""
    hidden_size: Count = 100
    """Units in each of the two hidden layers: small, since the sweep has many runs."""
    seeds: tuple[Seed, ...] = (100, 101, 102, 103, 104)
    """Each seeds the stream, the initial weights and the order; none of them is reported elsewhere.
    """

    name = "normalized-lambda"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Seed by seed, so that a sweep that is cut short has complete seeds."""
        scales = [
            *product(("mean",), self.fisher_type, self.ewc_lambda),
            *product((None,), self.fisher_type[:1], self.plain_ewc_lambda),
        ]
        for seed, (benchmark, scenario), scale in product(self.seeds, BENCHMARKS, scales):
            normalize, fisher_type, ewc_lambda = scale
            yield RunSettings(
                *(benchmark, dataset, scenario, "ewc", seed),
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
    """Run the sweep; write `normalized_lambda.csv` and `normalized_lambda.png`."""
    runs, output = completed_study(settings)
    parts = [
        by_lambda(part, "average_accuracy").assign(**dict(zip(KEY, key, strict=True)))
        for key, part in runs.groupby(KEY)
    ]
    table = output.table(pd.concat(parts, ignore_index=True), NORMALIZED_LAMBDA)
    output.figure(draw_losses(table), "normalized_lambda")
    output.show(table, "%.4f", index=False)
    return table


def draw_losses(table: pd.DataFrame) -> Figure:
    """Accuracy lost against the best lambda of the same line: as it is, and divided by its mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4), sharey=True, layout="constrained")
    titles = {AS_IT_IS: "F as it is", "mean": "F divided by its mean"}
    for axis, (normalize, words) in zip(axes, titles.items(), strict=True):
        part = table[table["normalize"] == normalize]
        ends = []
        for (benchmark, fisher_type), curve in part.groupby(["benchmark", "fisher_type"]):
            lost = 100 * (curve["mean"].max() - curve["mean"])
            colour = style.FISHER_COLOURS[fisher_type]
            line = "-o" if benchmark == "permuted" else "--s"
            axis.plot(curve["ewc_lambda"], lost, line, color=colour, markersize=4)
            name = f"{BENCHMARK_WORDS[benchmark]}, {fisher_type}"
            ends.append(style.EndLabel(name, float(lost.iloc[-1]), colour))
        style.log_axis(axis, "x", part["ewc_lambda"])
        types = " and ".join(sorted(part["fisher_type"].unique()))
        axis.set(title=f"{words} ({types})", xlabel="λ (weight of the penalty)")
        axis.axhspan(-1, 100 * SMALL, color=style.INK, alpha=0.06, lw=0)
        axis.set_ylim(9, -0.4)
        style.label_ends(axis, ends)
    axes[1].axvline(RECOMMENDED, color=style.INK, linestyle=":", lw=1)
    axes[0].set_ylabel("accuracy lost against the best λ\nof the same line (percentage points)")
    n = int(table["n"].max())
    note = f"validation images, mean of n = {n} seeds; grey: within {100 * SMALL:g} points of the "
    note += f"best; dotted: λ = {RECOMMENDED:g}"
    style.title(figure, "Does one λ serve for every stream and Fisher type?", note)
    return figure

"""Convert lambda between Fisher types by the ratio of their traces, relative to Avalanche's.

The penalty is linear in F, so that lambda * trace(F) is its strength on average, and lambda * max F
decides what step size it bears. A lambda for one F is turned into one for another by the ratio of
their traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.pandas as pa
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ewc_plugin.avalanche.metrics import fisher_trace
from ewc_plugin.fisher.scores import FisherType
from experiments.data.sources import DataSource
from experiments.reporting.figures import style
from experiments.reporting.labels import number
from experiments.reporting.study_output import OnImages, columns, study_on_images
from experiments.results.schemas import PROVENANCE
from experiments.settings.grids import DEFAULT_EPOCHS
from experiments.settings.run import Benchmark, RunSettings, Scenario
from experiments.settings.values import Count, Lambda, Seed
from experiments.training.trained import Trained, train

STREAMS: tuple[tuple[Benchmark, Scenario, int], ...] = (
    ("permuted", "domain", 1),
    ("split", "task", 5),
)
PER_SAMPLE = [
    FisherType.PREDICTED,
    FisherType.EMPIRICAL,
    FisherType.SAMPLED,
    FisherType.EXACT,
]
MARKERS = {"permuted": "o", "split": "s"}
LAMBDA_TRANSLATION = pa.DataFrameSchema(
    {
        **columns(str, "benchmark", "dataset"),
        **columns(int, "seed"),
        **columns(float, "test_accuracy", check=pa.Check.in_range(0, 1)),
        **columns(str, "fisher"),
        **columns(float, "trace", "mean", "max", "trace_of_exact", check=pa.Check.ge(0)),
        **columns(
            float,
            "same_strength_lambda",
            "same_strength_lambda_of_f_by_its_mean",
            check=pa.Check.ge(0),
        ),
        **PROVENANCE,
    },
    unique=["benchmark", "dataset", "seed", "fisher"],
    strict=True,
    name="lambda_translation.csv",
)


@dataclass(frozen=True)
class LambdaTranslation(OnImages):
    """Traces and maxima of F by label type, and the lambdas that make their penalties as strong."""

    ewc_lambda: Lambda = 100.0
    """Avalanche's lambda, at `batch_size`, to be translated."""
    batch_size: Count = 128
    """Mini-batch of Avalanche's F, which depends on it."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Each trains a network of its own."""
    hidden_size: Count = 256
    """Units in each of the two hidden layers."""
    out: str = "runs/lambda-translation"
    """Folder of the table and the plot."""


def run(settings: LambdaTranslation) -> pd.DataFrame:
    """Train without a penalty; write every F of the last task to `lambda_translation.csv`."""
    source, output = study_on_images(settings)
    rows: list[dict[str, Any]] = []
    for seed in settings.seeds:
        for benchmark, scenario, n_experiences in STREAMS:
            cell = RunSettings(
                *(benchmark, source.name, scenario, "naive", seed),
                n_experiences=n_experiences,
                epochs=DEFAULT_EPOCHS[benchmark, source.name],
                hidden_size=settings.hidden_size,
            )
            rows += output.cell(cell.run_id, partial(_measure, cell, source, settings))
    table = output.table(rows, LAMBDA_TRANSLATION)
    output.figure(draw_translation(table, settings), "lambda_translation")
    shown = table.groupby(["benchmark", "fisher"], sort=False).mean(numeric_only=True)
    output.show(shown.drop(columns="seed"))
    return table


def _measure(
    cell: RunSettings, source: DataSource, settings: LambdaTranslation
) -> Iterator[dict[str, Any]]:
    return translate(cell, train(cell, source), settings)


def translate(
    cell: RunSettings, trained: Trained, settings: LambdaTranslation
) -> Iterator[dict[str, Any]]:
    """A row for every Fisher of the last experience."""
    last = cell.n_experiences - 1
    builtin = statistics(trained.fisher(last, "batched", batch_size=settings.batch_size))
    found = {"avalanche": builtin}
    found |= {t.value: statistics(trained.fisher(last, t)) for t in PER_SAMPLE}
    for name, values in found.items():
        same = settings.ewc_lambda * builtin["trace"] / values["trace"]
        yield {
            "benchmark": cell.benchmark,
            "dataset": cell.dataset,
            "seed": cell.seed,
            "test_accuracy": trained.accuracy,
            "fisher": name,
            **values,
            "trace_of_exact": values["trace"] / found["exact"]["trace"],
            "same_strength_lambda": same,
            "same_strength_lambda_of_f_by_its_mean": same * values["mean"],
        }


def statistics(fisher: dict[str, Tensor]) -> dict[str, float]:
    """Trace, mean and maximum of F. Unit: nats / theta^2."""
    trace = fisher_trace(fisher)
    return {
        "trace": trace,
        "mean": trace / sum(f.numel() for f in fisher.values()),
        "max": max(float(f.max()) for f in fisher.values()),
    }


def draw_translation(table: pd.DataFrame, settings: LambdaTranslation) -> Figure:
    """Trace relative to EXACT, and the lambda that is as strong: a row per Fisher."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True, layout="constrained")
    names = list(dict.fromkeys(table["fisher"]))
    shown = {
        "trace_of_exact": "trace of F relative to that of exact labels",
        "same_strength_lambda": "λ that makes the penalty as strong",
    }
    for axis, (column, label) in zip(axes, shown.items(), strict=True):
        for (benchmark, fisher), rows in table.groupby(["benchmark", "fisher"], sort=False):
            place = names.index(fisher) + (0.18 if benchmark == "split" else -0.18)
            colour = style.colour_of("avalanche-ewc" if fisher == "avalanche" else "ewc", fisher)
            look = {"marker": MARKERS[benchmark], "color": colour}
            axis.scatter(rows[column], np.full(len(rows), place), s=20, **look)
            middle = rows[column].median()
            text = f"{middle:.2g}" if column == "trace_of_exact" else number(float(f"{middle:.2g}"))
            at = (rows[column].max(), place)
            axis.annotate(text, at, (6, 0), textcoords="offset points", va="center", fontsize=7.5)
        style.log_axis(axis, "x")
        low, high = table[column].min(), table[column].max()
        axis.set(xlabel=label, xlim=(low / 2, high * 4))
    words = [
        f"Avalanche's, batch of {settings.batch_size}" if n == "avalanche" else n for n in names
    ]
    axes[0].set_yticks(range(len(names)), words)
    axes[0].invert_yaxis()
    handles = [
        Line2D([], [], color="0.4", marker=MARKERS[name], linestyle="", label=words)
        for name, words in (("permuted", "permuted MNIST, one task"), ("split", "split MNIST"))
    ]
    figure.legend(handles=handles, fontsize=8, ncols=2, loc="outside lower center")
    title = f"Avalanche's λ = {number(settings.ewc_lambda)} under other Fishers"
    n = table["seed"].nunique()
    style.title(figure, title, f"a point per network, n = {n} each; number: median")
    return figure

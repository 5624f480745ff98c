"""How a lambda reads under another Fisher: traces and maxima of every type beside Avalanche's.

The penalty is linear in F, so that lambda * trace(F) is its strength on average, and lambda * max F
decides what step size it bears. A lambda for one F is turned into one for another by the ratio of
their traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from rich.console import Console
from torch import Tensor

from ewc_plugin.fisher.scores import FisherType
from experiments.data.sources import find_data
from experiments.reporting.figures.style import DPI
from experiments.results.environment import write_environment
from experiments.results.tables import replace_file
from experiments.settings.grids import DEFAULT_EPOCHS
from experiments.settings.run import Benchmark, Dataset, RunSettings, Scenario
from experiments.training.trained import Trained, train

STREAMS: tuple[tuple[Benchmark, Scenario, int], ...] = (
    ("permuted", "domain", 1),
    ("split", "task", 5),
)
PER_SAMPLE = [t for t in FisherType if t is not FisherType.BATCHED]
COLOURS = {"permuted": "#009E73", "split": "#0072B2"}


@dataclass(frozen=True)
class LambdaTranslation:
    """Traces and maxima of F by label type, and the lambdas that make their penalties as strong."""

    ewc_lambda: float = 100.0
    """Avalanche's lambda, at `batch_size`, to be translated."""
    batch_size: int = 128
    """Mini-batch of Avalanche's F, which depends on it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each trains a network of its own."""
    hidden_size: int = 256
    """Units in each of the two hidden layers."""
    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw."""
    out: str = "runs/lambda-translation"
    """Folder of the table and the plot."""


def run(settings: LambdaTranslation) -> pd.DataFrame:
    """Trains without a penalty, then takes every F of the last experience.

    Args:
        settings: What to translate.

    Returns:
        A row per benchmark, seed and Fisher; also in `lambda_translation.csv`.
    """
    console = Console()
    source = find_data(settings.dataset, settings.data_root)
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in settings.seeds:
        for benchmark, scenario, n_experiences in STREAMS:
            cell = RunSettings(
                benchmark,
                source.name,
                scenario,
                "naive",
                seed,
                n_experiences=n_experiences,
                epochs=DEFAULT_EPOCHS[benchmark, source.name],
                hidden_size=settings.hidden_size,
            )
            rows += list(translate(cell, train(cell, source), settings))
    table = pd.DataFrame(rows)
    replace_file(folder / "lambda_translation.csv", table.to_csv(index=False))
    plot(table).savefig(folder / "lambda_translation.png", dpi=DPI, metadata={"Software": None})
    write_environment(folder, source)
    shown = table.groupby(["benchmark", "fisher"], sort=False).mean(numeric_only=True)
    console.print(shown.drop(columns="seed").to_string(float_format="%.3g"), highlight=False)
    return table


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
    trace = sum(float(f.double().sum()) for f in fisher.values())
    return {
        "trace": trace,
        "mean": trace / sum(f.numel() for f in fisher.values()),
        "max": max(float(f.max()) for f in fisher.values()),
    }


def plot(table: pd.DataFrame) -> plt.Figure:
    """Trace relative to EXACT, and the lambda that is as strong, per Fisher and benchmark."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    names = list(dict.fromkeys(table["fisher"]))
    columns = {
        "trace_of_exact": "trace of F, relative to EXACT",
        "same_strength_lambda": "lambda of the same strength",
    }
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for i, (benchmark, rows) in enumerate(table.groupby("benchmark", sort=False)):
            places = [names.index(name) + 0.2 * i - 0.1 for name in rows["fisher"]]
            axis.plot(rows[column], places, "o", color=COLOURS[benchmark], label=benchmark)
        axis.set(xscale="log", xlabel=label)
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle("A point per seed")
    return figure

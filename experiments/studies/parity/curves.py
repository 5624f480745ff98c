"""Accuracy and forgetting over lambda: every Fisher type, and Avalanche's with other mini-batches.

Permuted MNIST with plain SGD, where too large a lambda diverges, in a small network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from rich.console import Console

from experiments.reporting.figures.over_lambda import draw_curve
from experiments.reporting.figures.style import DPI
from experiments.results.statistics import by_lambda
from experiments.results.tables import replace_file
from experiments.settings.grids import Job
from experiments.settings.run import Dataset, RunSettings
from experiments.sweeps.jobs import completed_runs

LAMBDAS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
RANGES = {"average_accuracy": (0.6, 1.0), "forgetting": (-0.02, 0.3)}  # of the axes
METRICS = tuple(RANGES)
NAIVE = "naive"
BATCHES = (32, 128)
TYPES = {
    "predicted": "#009E73",
    "empirical": "#E69F00",
    "sampled": "#CC79A7",
    "exact": "#000000",
}
BUILTIN = {
    (32, None): "#D55E00",
    (32, "shuffled"): "#F0E442",
    (128, None): "#0072B2",
    (128, "shuffled"): "#56B4E9",
}


@dataclass(frozen=True)
class Curves(Job):
    """A grid of lambda for each way to compute F."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds the permutations, the initial weights and the order of the samples."""
    hidden_size: int = 100
    """Units in each of the two hidden layers."""
    experiences: int = 5
    """Number of permutations."""

    name = "parity/curves"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Every way at every lambda, and no protection, seed by seed."""
        for seed in self.seeds:
            base = RunSettings(
                *("permuted", dataset, "domain", NAIVE, seed),
                n_experiences=self.experiences,
                epochs=1 if dataset == "mnist" else 20,
                batch_size=256 if dataset == "mnist" else 32,
                optimizer="sgd",
                learning_rate=0.1,
                hidden_size=self.hidden_size,
                device=self.device,
                data_path=self.data_path,
            )
            yield base
            for ewc_lambda in LAMBDAS:
                for way in WAYS.values():
                    yield replace(base, ewc_lambda=ewc_lambda, mode="separate", **way)


WAYS: dict[str, dict[str, Any]] = {
    **{name: {"method": "ewc", "fisher_type": name} for name in TYPES},
    **{
        f"built-in, batch {size}, {order or 'sorted by class'}": {
            "method": "avalanche-ewc",
            "importance_batch": size,
            "importance_order": order,
        }
        for size, order in BUILTIN
    },
}
COLOURS = dict(zip(WAYS, [*TYPES.values(), *BUILTIN.values()], strict=True))


def run_curves(settings: Curves, console: Console, *, make: bool = True) -> pd.DataFrame:
    """Runs the grid; writes `lambda_curves.csv` and `lambda_curves.png`.

    Args:
        settings: The grid.
        console: Where progress is shown.
        make: Whether to make runs; else those that are there have to do.

    Returns:
        A row per way, metric and lambda; without protection there is no lambda.
    """
    runs, folder = completed_runs(settings, console, make=make)
    table = curves(runs)
    replace_file(folder / "lambda_curves.csv", table.to_csv(index=False))
    figure = plot(table)
    figure.savefig(folder / "lambda_curves.png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return table


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval of both metrics over lambda, for each way."""
    first = runs.iloc[0]
    setting = (
        f"{first['n_experiences']} experiences, {first['hidden_layers']}x{first['hidden_size']}, "
        f"{first['optimizer']} {first['learning_rate']:g}, batch {first['batch_size']}"
    )
    parts = []
    for name, way in {**WAYS, NAIVE: {"method": NAIVE}}.items():
        rows = runs
        for column, value in way.items():
            rows = rows[rows[column].isna() if value is None else rows[column].eq(value)]
        for metric in METRICS if len(rows) else ():
            labels = {"setting": setting, "fisher": name, "metric": metric}
            parts.append(by_lambda(rows, metric).assign(**labels))
    table = pd.concat(parts, ignore_index=True)
    return table[
        ["setting", "fisher", "metric", *table.columns.drop(["setting", "fisher", "metric"])]
    ]


def plot(table: pd.DataFrame) -> plt.Figure:
    """Ours on the left, the built-in on the right; grey from the lambda at which one diverged."""
    figure, axes = plt.subplots(
        len(METRICS), 2, figsize=(11, 7), sharex=True, sharey="row", layout="constrained"
    )
    for metric, row in zip(METRICS, axes, strict=True):
        row[0].set(xscale="log", ylim=RANGES[metric], ylabel=metric.replace("_", " "))
    for (fisher, metric), curve in table.groupby(["fisher", "metric"], sort=False):
        row = axes[METRICS.index(metric)]
        if fisher == NAIVE:
            for axis in row:
                axis.axhline(curve["mean"].item(), color="grey", linestyle=":", label=NAIVE)
            continue
        axis = row[int(fisher not in TYPES)]
        draw_curve(axis, curve, fisher, COLOURS[fisher])
        lost = curve[curve["diverged"] > 0]
        if len(lost):
            axis.axvspan(lost["ewc_lambda"].min(), max(LAMBDAS), color="grey", alpha=0.08)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[0]:
        axis.legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("ewc_lambda")
    n = int(table["n"].max())
    figure.suptitle(f"Permuted MNIST, {table['setting'].iloc[0]}; n = {n}; grey: diverges")
    return figure

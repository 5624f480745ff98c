"""Pictures of whole runs: over lambda, forgetting against learning, accuracy against time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.reporting.figures.accuracy import COLOURS, LABELS, MARKERS, cell_labels
from experiments.results.tables import interval

# Where a folder has several Fisher types, colours tell those apart, not the methods.
FISHER_COLOURS = {
    "predicted": "#009E73",
    "empirical": "#E69F00",
    "sampled": "#56B4E9",
    "exact": "#CC79A7",
    "batched": "#8C6D31",
}
LINES = ("-", "--", ":", "-.")
LONG_NAME = 30  # letters; longer ones stand below each other in a legend
OVER_LAMBDA = ("average_accuracy", "forgetting")


@dataclass(frozen=True)
class Family:
    """Cells that differ in lambda alone.

    Attributes:
        label: Method and settings.
        colour: Of all that is drawn of it.
        line: Tells families of one colour apart.
        marker: Likewise.
        runs: Rows of `runs.csv`, whatever their status.
    """

    label: str
    colour: str
    line: str
    marker: str
    runs: pd.DataFrame


def families(runs: pd.DataFrame) -> list[Family]:
    """The runs of one benchmark by all settings but lambda and seed, in the methods' order."""
    labels = runs["config_hash"].map(cell_labels(runs, with_lambda=False))
    several = runs["fisher_type"].nunique() > 1
    found: list[Family] = []
    order = {method: i for i, method in enumerate(LABELS)}
    for label, rows in sorted(
        runs.groupby(labels), key=lambda item: (order[item[1]["method"].iloc[0]], item[0])
    ):
        first = rows.iloc[0]
        by_type = several and pd.notna(first["fisher_type"])
        colour = FISHER_COLOURS[first["fisher_type"]] if by_type else COLOURS[first["method"]]
        i = sum(family.colour == colour for family in found)
        line, marker = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        found.append(Family(str(label), colour, line, marker, rows))
    return found


def draw_over_lambda(runs: pd.DataFrame, title: str) -> plt.Figure | None:
    """Average accuracy and forgetting over lambda, with bands; None where no lambda varies.

    Methods without lambda are levels; a lambda at which runs diverged or failed is crossed.
    """
    shown = families(runs)
    if not any(family.runs["ewc_lambda"].nunique() > 1 for family in shown):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained")
    for axis, metric in zip(axes, OVER_LAMBDA, strict=True):
        for i, family in enumerate(shown):
            _over_lambda(axis, family, metric, cross_height=0.02 + 0.035 * i)
        _scale(axis, runs["ewc_lambda"].dropna())
        axis.set(xlabel="λ", ylabel=metric.replace("_", " "))
        axis.grid(alpha=0.12)
    handles, names = axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, names)) > LONG_NAME else min(len(names), 4)
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=columns)
    figure.suptitle(
        f"{title}\nmean over seeds, band: 95 % interval; ×: diverged or failed", fontsize=10
    )
    return figure


def _scale(axis: Axes, lambdas: pd.Series[float]) -> None:
    """Logarithmic, as wide as all that was tried, diverged or not; with a place for zero."""
    positive = lambdas[lambdas > 0]
    if (lambdas == 0).any():
        axis.set_xscale("symlog", linthresh=positive.min())
        axis.set_xlim(-0.2 * positive.min(), 1.6 * positive.max())
    else:
        axis.set_xscale("log")
        axis.set_xlim(positive.min() / 1.6, 1.6 * positive.max())


def _over_lambda(axis: Axes, family: Family, metric: str, *, cross_height: float) -> None:
    done = family.runs[family.runs["status"] == "ok"]
    if family.runs["ewc_lambda"].isna().all():
        level = done[metric].mean()
        if np.isfinite(level):
            axis.axhline(level, color=family.colour, linestyle=family.line, label=family.label)
        return
    rows = [
        {"ewc_lambda": value, **interval(cell[metric].to_numpy(float))}
        for value, cell in done.dropna(subset=[metric]).groupby("ewc_lambda")
    ]
    if rows:
        table = pd.DataFrame(rows)
        style = {"color": family.colour, "linestyle": family.line, "marker": family.marker}
        x = table["ewc_lambda"]
        axis.plot(x, table["mean"], label=family.label, markersize=4, **style)
        low, high = table["ci_low"], table["ci_high"]
        axis.fill_between(x, low, high, color=family.colour, alpha=0.12, linewidth=0)
    lost = family.runs.loc[family.runs["status"] != "ok", "ewc_lambda"].dropna().unique()
    place = axis.get_xaxis_transform()  # lambda by the data, height by the frame
    height = np.full(len(lost), cross_height)
    axis.scatter(lost, height, s=22, marker="x", color=family.colour, transform=place)


def draw_trade_off(runs: pd.DataFrame, title: str) -> plt.Figure | None:
    """Forgetting against learning accuracy: a point per run, a large one per cell's mean."""
    return _draw_scatter(
        runs.assign(learning=runs["learning_accuracy"]),
        ("learning", "learning accuracy (just after each experience)"),
        ("forgetting", "forgetting"),
        title,
    )


def draw_time(runs: pd.DataFrame, title: str) -> plt.Figure | None:
    """Average accuracy against the seconds of training and Fisher: points as above."""
    return _draw_scatter(
        runs.assign(seconds=runs["train_s"] + runs["fisher_s"]),
        ("seconds", "seconds of training and Fisher"),
        ("average_accuracy", "average accuracy"),
        title,
    )


def _draw_scatter(
    runs: pd.DataFrame, x: tuple[str, str], y: tuple[str, str], title: str
) -> plt.Figure | None:
    done = runs[(runs["status"] == "ok") & runs[x[0]].notna() & runs[y[0]].notna()]
    if done.empty:
        return None
    figure, axis = plt.subplots(figsize=(5.4, 4.5), layout="constrained")
    for family in families(done):
        style: dict[str, Any] = {"color": family.colour, "marker": family.marker, "linewidths": 0}
        for i, (_, cell) in enumerate(family.runs.groupby("config_hash")):
            a, b = cell[x[0]], cell[y[0]]
            axis.scatter(a, b, s=14, alpha=0.45, **style)
            label = family.label if i == 0 else None
            axis.scatter(a.mean(), b.mean(), s=60, label=label, **style)
        _name_lambdas(axis, family, x[0], y[0])
    axis.set(xlabel=x[1], ylabel=y[1])
    axis.grid(alpha=0.12)
    axis.set_title(f"{title}\nsmall: a run, large: mean over seeds", fontsize=10)
    _, names = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, names)) > LONG_NAME else 2
    figure.legend(fontsize=8, loc="outside lower center", ncols=columns)
    return figure


def _name_lambdas(axis: Axes, family: Family, x: str, y: str) -> None:
    """Writes lambda beside the means where a family has several."""
    if family.runs["ewc_lambda"].nunique() > 1:
        for value, cell in family.runs.groupby("ewc_lambda"):
            at = (cell[x].mean(), cell[y].mean())
            style: dict[str, Any] = {"fontsize": 6.5, "color": family.colour}
            axis.annotate(f"{value:g}", at, (5, 4), textcoords="offset points", **style)


def figures(runs: pd.DataFrame, title: str) -> Iterator[tuple[str, plt.Figure]]:
    """Every picture that the runs of one benchmark allow, with its name."""
    for name, draw in (
        ("lambda", draw_over_lambda),
        ("trade-off", draw_trade_off),
        ("time", draw_time),
    ):
        figure = draw(runs, title)
        if figure is not None:
            yield name, figure

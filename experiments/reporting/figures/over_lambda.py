"""Metrics over the strength of the penalty."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.reporting.figures.style import COLOURS, FISHER_COLOURS, LINES, LONG_NAME, MARKERS
from experiments.reporting.labels import LABELS, cell_labels
from experiments.results.statistics import interval


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


def draw_curve(axis: Axes, curve: pd.DataFrame, label: str, colour: str, line: str = "-") -> None:
    """One curve of `by_lambda` with its band; crosses on the floor where all runs diverged."""
    axis.plot(curve["ewc_lambda"], curve["mean"], line, color=colour, marker="o", label=label)
    axis.fill_between(
        curve["ewc_lambda"], curve["ci_low"], curve["ci_high"], color=colour, alpha=0.15, lw=0
    )
    lost = curve[curve["n"] == 0]
    if len(lost):
        floor = np.full(len(lost), axis.get_ylim()[0])
        axis.plot(lost["ewc_lambda"], floor, "x", color=colour, label=f"{label}: diverged")


OVER_LAMBDA = ("average_accuracy", "forgetting")


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

"""Pictures of whole runs: over lambda, forgetting against learning, accuracy against time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments.reporting.figures.over_lambda import Family, draw_over_lambda, families
from experiments.reporting.figures.style import LONG_NAME


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

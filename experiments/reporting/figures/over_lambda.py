"""Metrics over the strength of the penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.figures import style
from experiments.reporting.labels import (
    cell_labels,
    in_words,
    method_place,
    without_common,
    wrapped,
)
from experiments.results.statistics import by_lambda, interval

METRICS = ("average_accuracy", "forgetting")
BOUNDS = {"forgetting": (-1.0, 1.0)}  # of the other metrics: 0 and 1
MOST_BANDS = 2  # more curves in a panel have bars instead
FEWEST = 3  # seeds of a drawn interval; of two it reaches six times their distance to either side
LINES = ("-", "--", ":", "-.")
MARKERS = "os^Dv<>P"


@dataclass(frozen=True, eq=False)
class Line:
    """Cells that differ in lambda alone; without a lambda, a level.

    Attributes:
        label: Method and settings.
        colour: Of all that is drawn of it.
        runs: Rows of `runs.csv`, whatever their status.
        line: Line style, to distinguish lines of one colour.
        marker: Likewise.
    """

    label: str
    colour: str
    runs: pd.DataFrame
    line: str = "-"
    marker: str = "o"

    @property
    def is_level(self) -> bool:
        """Whether the method has no lambda."""
        return bool(self.runs["ewc_lambda"].isna().all())


def lines_of(runs: pd.DataFrame) -> list[Line]:
    """The runs of one stream by all settings but lambda and seed, in the methods' order."""
    labels = runs["config_hash"].map(cell_labels(runs, with_lambda=False))
    found: list[Line] = []
    groups = sorted(
        runs.groupby(labels), key=lambda item: (method_place(item[1]["method"].iloc[0]), item[0])
    )
    for label, rows in groups:
        first = rows.iloc[0]
        colour = style.colour_of(first["method"], first["fisher_type"])
        i = sum(line.colour == colour for line in found)
        found.append(
            Line(str(label), colour, rows, LINES[i % len(LINES)], MARKERS[i % len(MARKERS)])
        )
    return found


def shaded(lines: Sequence[Line]) -> list[Line]:
    """The lines of one panel; those of one colour in its shades."""
    colours = [line.colour for line in lines]
    left = {colour: style.shades(colour, colours.count(colour)) for colour in colours}
    return [replace(line, colour=left[line.colour].pop(0)) for line in lines]


def draw_over_lambda(runs: pd.DataFrame, title: str) -> Figure | None:
    """Average accuracy and forgetting over lambda; None where no line has three of them."""
    lines = lines_of(runs)
    lines = [line for line in lines if line.is_level or line.runs["ewc_lambda"].nunique() > 2]
    if all(line.is_level for line in lines):
        return None
    if len(lines) > style.MOST_LINES:
        lines = best_lines(lines)
    return over_lambda({"": shaded(lines)}, title)


def best_lines(lines: Sequence[Line]) -> list[Line]:
    """At most `MOST_LINES` lines: of more, those with the highest accuracy at any lambda."""

    def best(line: Line) -> float:
        done = line.runs[line.runs["status"] == "ok"]
        return float(done.groupby("config_hash")["average_accuracy"].mean().max())

    kept = sorted(range(len(lines)), key=lambda i: -best(lines[i]))[: style.MOST_LINES]
    return [lines[i] for i in sorted(kept)]


def over_lambda(
    panels: Mapping[str, Sequence[Line]], title: str, metrics: Sequence[str] = METRICS
) -> Figure:
    """A row per metric, a column per panel; rows share their axis. One metric takes rows of two."""
    columns = len(panels) if len(metrics) > 1 or len(panels) < 3 else 2
    rows = len(metrics) * -(-len(panels) // columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(1.2 + 4.6 * columns, 0.9 + 2.7 * rows),
        squeeze=False,
        sharex="col" if len(metrics) > 1 else "none",
        layout="constrained",
    )
    for axis in axes.flat[len(metrics) * len(panels) :]:
        axis.remove()
    places = axes if len(metrics) > 1 else [axes.flat[: len(panels)]]
    for metric, row in zip(metrics, places, strict=True):
        means = [m for lines in panels.values() for line in lines for m in _means(line, metric)]
        low, high = style.limits(means, bounds=BOUNDS.get(metric, (0.0, 1.0)))
        for axis, (name, lines) in zip(row, panels.items(), strict=True):
            strip = 0.05 * sum(len(_lost(line)) > 0 for line in lines)  # below the data
            axis.set_ylim(low - strip * (high - low), high)
            draw_lines(axis, lines, metric)
            if metric == metrics[0]:
                axis.set_title(wrapped(name or common_label(lines), 48))
            if metric == metrics[-1]:
                axis.set_xlabel("λ (weight of the penalty)")
        for axis in row[::columns]:
            axis.set_ylabel(in_words(metric))
    runs = pd.concat([line.runs for lines in panels.values() for line in lines])
    many = any(sum(not line.is_level for line in lines) > MOST_BANDS for lines in panels.values())
    n = runs["seed"].nunique()
    note = f"mean over seeds ({seeds_text(runs)})" if n > 1 else "one seed"
    if n >= FEWEST:
        levels = any(line.is_level for lines in panels.values() for line in lines)
        shown = "bars" if many else "band, and bar of a level" if levels else "band"
        note += f", {shown}: 95 % interval"
    if (runs["status"] != "ok").any():
        note += "; ×: a run diverged or failed"
    style.title(figure, title, note)
    return figure


def draw_lines(axis: Axes, lines: Sequence[Line], metric: str) -> None:
    """Curves and levels with their intervals, their names, and crosses where a run was lost.

    Args:
        axis: Whose limits in y are set.
        lines: What to draw.
        metric: A column of `runs.csv`.
    """
    curves = [line for line in lines if not line.is_level]
    lambdas = pd.concat([line.runs["ewc_lambda"] for line in curves]).dropna()
    _scale(axis, lambdas)
    labels, lost_so_far = [], 0
    _, rest = without_common([line.label for line in curves])
    names = dict(zip([line.label for line in curves], rest, strict=True))
    for line in lines:
        if line.is_level:
            height = _draw_level(axis, line, metric)
        else:
            i = curves.index(line)
            dodge = 1.05 ** (i - (len(curves) - 1) / 2) if len(curves) > MOST_BANDS else 1.0
            height = _draw_curve(axis, line, metric, dodge, band=len(curves) <= MOST_BANDS)
            if len(lost := _lost(line)):
                lost_so_far += 1
                style_of = {"color": line.colour, "transform": axis.get_xaxis_transform()}
                at = np.full(len(lost), 0.045 * lost_so_far - 0.015)
                axis.plot(lost * dodge, at, "x", markersize=4.5, **style_of)
        labels.append(style.EndLabel(names.get(line.label, line.label), height, line.colour))
    style.label_ends(axis, labels)


def common_label(lines: Sequence[Line]) -> str:
    """Return the common part of the curves' labels."""
    return without_common([line.label for line in lines if not line.is_level])[0]


def _means(line: Line, metric: str) -> list[float]:
    done = line.runs[line.runs["status"] == "ok"]
    if line.is_level:
        return [float(done[metric].mean())]
    return list(_complete(line, metric)["mean"])


def _complete(line: Line, metric: str) -> pd.DataFrame:
    """The curve where no run was lost."""
    curve = by_lambda(line.runs.dropna(subset=["ewc_lambda"]), metric)
    return curve[~curve["ewc_lambda"].isin(_lost(line)) & (curve["n"] > 0)]


def _lost(line: Line) -> np.ndarray:
    """The lambdas at which a run did not end well."""
    return np.sort(line.runs.loc[line.runs["status"] != "ok", "ewc_lambda"].dropna().unique())


def _draw_level(axis: Axes, line: Line, metric: str) -> float:
    values = line.runs.loc[line.runs["status"] == "ok", metric].dropna().to_numpy(float)
    if not len(values):
        return float("nan")
    found = interval(values)
    axis.axhline(found["mean"], color=line.colour, linestyle="--", linewidth=1.2)
    if len(values) >= FEWEST:
        ends, place = [found["ci_low"], found["ci_high"]], axis.get_yaxis_transform()
        axis.plot([0.99] * 2, ends, color=line.colour, transform=place, lw=1.5)
    return found["mean"]


def _draw_curve(axis: Axes, line: Line, metric: str, dodge: float, *, band: bool) -> float:
    curve = _complete(line, metric)
    if curve.empty:
        return float("nan")
    ends = curve[["ci_low", "ci_high"]].where(curve["n"] >= FEWEST)
    x = curve["ewc_lambda"] * dodge
    look = {"color": line.colour, "linestyle": line.line, "marker": line.marker, "markersize": 4}
    axis.plot(x, curve["mean"], **look)
    if band:
        axis.fill_between(x, ends["ci_low"], ends["ci_high"], color=line.colour, alpha=0.13, lw=0)
    else:
        axis.vlines(x, ends["ci_low"], ends["ci_high"], color=line.colour, lw=0.9, alpha=0.45)
    return float(curve["mean"].iloc[-1])


def _scale(axis: Axes, lambdas: pd.Series[float]) -> None:
    """Logarithmic, as wide as all that was tried, diverged or not; with a place for zero."""
    positive = lambdas[lambdas > 0]
    if (lambdas == 0).any():
        axis.set_xscale("symlog", linthresh=positive.min())
        axis.set_xlim(-0.2 * positive.min(), 1.6 * positive.max())
    else:
        style.log_axis(axis, "x", positive)
        axis.set_xlim(positive.min() / 1.6, 1.6 * positive.max())


def seeds_text(runs: pd.DataFrame) -> str:
    """How many seeds the cells have: `n = 3`, or `n = 3 to 15`."""
    counts = runs.groupby("config_hash")["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"

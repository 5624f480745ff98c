"""Figures of whole runs: forgetting against learning, paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.reporting import comparison
from experiments.reporting.figures import style
from experiments.reporting.figures.over_lambda import (
    Line,
    best_lines,
    draw_over_lambda,
    lines_of,
    seeds_text,
    shaded,
)
from experiments.reporting.labels import cell_labels, number, wrapped
from experiments.results.statistics import MARGIN, interval
from experiments.settings.unset import UNSET


def draw_trade_off(runs: pd.DataFrame, title: str) -> Figure | None:
    """Forgetting against learning accuracy: a point per run, a large one per cell's mean."""
    x, y = "learning_accuracy", "forgetting"
    done = runs[(runs["status"] == "ok") & runs[x].notna() & runs[y].notna()]
    if done.empty:
        return None
    shown = shaded(best_lines(lines_of(done)))
    figure, axis = plt.subplots(figsize=(6.6, 4.0), layout="constrained")
    for line in shown:
        look: dict[str, Any] = {"color": line.colour, "marker": line.marker, "linewidths": 0}
        axis.scatter(line.runs[x], line.runs[y], s=12, alpha=0.4, **look)
        means = line.runs.groupby("config_hash")[[x, y]].mean()
        axis.scatter(means[x], means[y], s=55, **look)
        _name_lambdas(axis, line, x, y)
    axis.set_xlim(style.limits(done[x]))
    axis.set_ylim(style.limits(done[y], bounds=(-1, 1)))
    axis.set(xlabel="accuracy just after each experience", ylabel="forgetting")
    handles = [Line2D([], [], color=m.colour, marker=m.marker, linestyle="") for m in shown]
    names = [wrapped(line.label, 26) for line in shown]
    figure.legend(handles, names, fontsize=8, loc="outside right center")
    note = f"small: a run; large: mean over seeds ({seeds_text(done)})"
    style.title(figure, f"What learning costs: {title}", note)
    return figure


def _name_lambdas(axis: Axes, line: Line, x: str, y: str) -> None:
    """Write lambda beside the first and the last mean where a line has several."""
    values = sorted(line.runs["ewc_lambda"].dropna().unique())
    if len(values) > 1:
        means = line.runs.groupby("ewc_lambda")[[x, y]].mean()
        axis.plot(means[x], means[y], color=line.colour, lw=0.7, alpha=0.6)
        for value in (values[0], values[-1]):
            look: dict[str, Any] = {"fontsize": 6.5, "color": line.colour}
            text = f"λ = {number(value)}"
            axis.annotate(text, means.loc[value], (5, 4), textcoords="offset points", **look)


def draw_methods(runs: pd.DataFrame, title: str) -> Figure | None:
    """Average accuracy of every method with its interval, a panel per loss, the best on top.

    For streams with more methods than can be told apart as lines.

    Args:
        runs: Rows of `runs.csv` of one stream.
        title: What they are of.

    Returns:
        The figure; None where the methods are few, or one has several lambdas.
    """
    done = runs[runs["status"] == "ok"]
    losses = done["loss_classes"].fillna(UNSET["loss_classes"])
    panels = {str(loss): part for loss, part in done.groupby(losses)}
    cells = [_method_cells(part) for part in panels.values()]
    if not cells or max(map(len, cells)) <= style.MOST_LINES:
        return None
    if any(not part.index.is_unique for part in cells):
        return None
    best_first = pd.concat(cells).sort_values("mean", ascending=False)
    places = {label: y for y, label in enumerate(dict.fromkeys(best_first.index))}
    size = (4.2 + 2.8 * len(panels), 1.3 + 0.24 * len(places))
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, loss, part in zip(axes[0], panels, cells, strict=True):
        for label, cell in part.iterrows():
            y, colour = places[label], cell["colour"]
            axis.plot([cell["ci_low"], cell["ci_high"]], [y, y], color=colour, lw=2)
            axis.plot(cell["mean"], y, "o", color=colour, markersize=5)
        axis.set_xlabel("average accuracy")
        if len(panels) > 1:
            axis.set_title(f"loss over {loss} classes", fontsize=9)
    axes[0, 0].set_yticks(list(places.values()), list(places), fontsize=8)
    axes[0, 0].set_ylim(len(places) - 0.5, -0.5)
    style.title(figure, title, f"mean and 95 % interval over seeds ({seeds_text(done)})")
    return figure


def _method_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, interval and colour of each cell, by its label without lambda."""
    labels = cell_labels(runs, with_lambda=False)
    found = []
    for config_hash, cell in runs.groupby("config_hash", sort=False):
        first = cell.iloc[0]
        found.append({
            "label": labels[str(config_hash)],
            "colour": style.colour_of(first["method"], first["fisher_type"]),
            **interval(cell["average_accuracy"].to_numpy(float)),
        })
    return pd.DataFrame(found).set_index("label")


def draw_differences(comparisons: pd.DataFrame) -> Figure | None:
    """Paired differences of average accuracy, a row each; those from Naive have their own axis.

    Args:
        comparisons: Rows of `comparisons.csv`.

    Returns:
        The figure; None where there is nothing to compare, or only methods at many lambdas each.
    """
    all_rows = comparisons[(comparisons["metric"] == "average_accuracy") & (comparisons["n"] > 1)]
    all_rows = all_rows[~comparison.has_several_lambdas(all_rows)]
    if all_rows.empty:
        return None
    rows = comparison.main_pairs(all_rows, MOST_ROWS).iloc[:MOST_ROWS]
    labels = comparison.sides(rows)
    streams = {comparison.stream_of(row) for row in rows.to_dict("records")}
    naive = rows["other_method"] == "naive"
    parts = [part.to_dict("records") for part in (rows[~naive], rows[naive]) if len(part)]
    names = [[_pair_name(row, labels, len(streams) > 1) for row in part] for part in parts]
    heights = [0.4 + sum(0.16 + 0.13 * (name.count("\n") + 1) for name in own) for own in names]
    figure, axes = plt.subplots(
        *(len(parts), 1),
        figsize=(8.6, sum(heights) + 1.0),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, part, own in zip(axes[:, 0], parts, names, strict=True):
        _draw_part(axis, part, own)
    axes[-1, 0].set_xlabel("average accuracy of the first less that of the second, seed by seed")
    note = f"mean and 95 % interval; grey: a difference below the margin of {MARGIN:g}"
    if len(rows) < len(all_rows):
        is_ours = rows[["method", "other_method"]].eq(["ewc", "avalanche-ewc"]).all(axis=None)
        which = "ours beside Avalanche's EWC" if is_ours else "the first"
        note += f"\n{which}: {len(rows)} of {len(all_rows)} pairs"
    where = f": {streams.pop()}" if len(streams) == 1 else ""
    style.title(figure, f"Paired differences of average accuracy{where}", note)
    return figure


def _pair_name(row: dict[str, Any], labels: Mapping[str, str], with_stream: bool) -> str:
    """The pair in short lines: the stream and what both sides share, one side, the other."""
    first, second, common = comparison.pair_of(row, labels)
    shared = ", ".join(filter(None, (comparison.stream_of(row) * with_stream, common)))
    pair = f"{first} − {second}"
    lines = [pair] if len(pair) <= MOST_LETTERS else [first, f"− {second}"]
    return "\n".join([*([shared] if shared else []), *lines])


def _draw_part(axis: Axes, rows: list[dict[str, Any]], names: list[str]) -> None:
    axis.axvspan(-MARGIN, MARGIN, color=style.INK, alpha=0.07, lw=0)
    axis.axvline(0, color=style.INK, lw=0.8)
    for place, row in enumerate(rows):
        colour = style.colour_of(row["method"], row["fisher_type"])
        axis.hlines(place, row["ci_low"], row["ci_high"], color=colour, lw=2)
        axis.plot(row["difference"], place, "o", markersize=4.5, color=colour)
        text = comparison.difference_text(row["difference"], row["ci_low"], row["ci_high"])
        text = f"{text}\nn = {row['n']}: {row['verdict']}"
        at = axis.get_yaxis_transform()
        axis.text(1.02, place, text, transform=at, va="center", fontsize=7.5)
    axis.set_yticks(range(len(rows)), names, fontsize=7.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    bounds = [[row[name] for name in ("ci_low", "ci_high", "difference")] for row in rows]
    reach = np.abs(np.array(bounds, float))
    reach = reach[np.isfinite(reach)].max(initial=1.5 * MARGIN)
    axis.set_xlim(-1.1 * min(reach, 1.0), 1.1 * min(reach, 1.0))
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(axis="y", visible=False)


MOST_ROWS = 30
MOST_LETTERS = 60  # in a line of a name


def figures(runs: pd.DataFrame, title: str) -> Iterator[tuple[str, Figure]]:
    """Every figure that the runs of one stream allow, with its name."""
    for name, draw in (("lambda", draw_over_lambda), ("trade-off", draw_trade_off)):
        figure = draw(runs, title)
        if figure is not None:
            yield name, figure

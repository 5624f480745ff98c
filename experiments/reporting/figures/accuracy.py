"""Accuracy matrices, and average accuracy as experiences come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from experiments.reporting.figures import style
from experiments.reporting.labels import cell_labels, method_place, without_common, wrapped
from experiments.results.metrics import accuracy_matrix, seen_accuracy
from experiments.results.statistics import interval

MOST_BANDS = 4  # more curves in a panel have none
MOST_MATRICES = 8
MOST_DECIMALS = 6  # experiences; a larger matrix has percent
MOST_NUMBERS = 12  # experiences; a larger matrix has colours alone


@dataclass(frozen=True)
class CellMatrices:
    """The accuracies of a cell of the grid.

    Attributes:
        label: Method and settings.
        family: The same without lambda.
        kind: Fisher type, or the method where it has none.
        panel: Of `style.panel_of`.
        colour: In every figure.
        ewc_lambda: NaN where the method has none.
        matrices: R of every seed, [n, T + 1, T].
    """

    label: str
    family: str
    kind: str
    panel: tuple[bool, str]
    colour: str
    ewc_lambda: float
    matrices: np.ndarray

    @property
    def last(self) -> float:
        """Average accuracy at the end, mean over seeds."""
        return float(np.nanmean(self.matrices[:, -1]))


def matrices_of(accuracy: pd.DataFrame, runs: pd.DataFrame) -> list[CellMatrices]:
    """The cells of one stream in the methods' usual order, lambda ascending.

    Args:
        accuracy: Rows of `accuracy.csv`.
        runs: Rows of `runs.csv` of one stream; those with status `ok` are folded.

    Returns:
        A cell per `config_hash`.
    """
    labels, families = cell_labels(runs), cell_labels(runs, with_lambda=False)
    by_run = dict(tuple(accuracy.groupby("run_id", sort=False)))
    found = []
    for config_hash, cell in runs[runs["status"] == "ok"].groupby("config_hash"):
        first = cell.iloc[0]
        rows = [by_run[run_id] for run_id in cell["run_id"] if run_id in by_run]
        if rows:
            known = pd.notna(first["fisher_type"])
            found.append((
                (method_place(first["method"]), families[config_hash], first["ewc_lambda"]),
                CellMatrices(
                    label=labels[config_hash],
                    family=families[config_hash],
                    kind=first["fisher_type"] if known else first["method"],
                    panel=style.panel_of(first.to_dict()),
                    colour=style.colour_of(first["method"], first["fisher_type"]),
                    ewc_lambda=first["ewc_lambda"],
                    matrices=np.stack([
                        accuracy_matrix(r["train_exp"], r["eval_exp"], r["accuracy"]) for r in rows
                    ]),
                ),
            ))
    return [cell for _, cell in sorted(found, key=lambda entry: entry[0])]


def best_of_each_family(cells: Sequence[CellMatrices]) -> list[CellMatrices]:
    """Of cells that differ in lambda alone the best; of these the `MOST_MATRICES` best."""
    best: dict[str, CellMatrices] = {}
    for cell in cells:
        if cell.family not in best or cell.last > best[cell.family].last:
            best[cell.family] = cell
    kept = sorted(best.values(), key=lambda cell: -cell.last)[:MOST_MATRICES]
    return [cell for cell in cells if any(cell is one for one in kept)]


def draw_matrices(cells: Sequence[CellMatrices], title: str) -> Figure:
    """R of every cell, the mean over seeds, beside each other; of many cells, the best."""
    shown = best_of_each_family(cells)
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    names = [f"{wrapped(cell.label, 30)}\nn = {len(cell.matrices)}" for cell in shown]
    words = 0.16 * max(name.count("\n") for name in names)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(2.9 * columns + 0.9, (3.1 + words) * rows + 0.6),
        squeeze=False,
        layout=ConstrainedLayoutEngine(compress=True, h_pad=0.12),
    )
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    image = None
    for i, (axis, cell) in enumerate(zip(axes.flat, shown, strict=False)):
        image = draw_matrix(axis, cell)
        axis.set_title(names[i], fontsize=8.5)
        axis.set_ylabel("trained through" if i % columns == 0 else "")
        axis.set_xlabel("tested on experience" if i + columns >= len(shown) else "")
    assert image is not None
    figure.colorbar(image, ax=list(axes.flat[: len(shown)]), shrink=0.7, label="accuracy")
    note = "mean over seeds"
    if shown[0].matrices.shape[2] in range(MOST_DECIMALS + 1, MOST_NUMBERS + 1):
        note += ", numbers in percent"
    if len(shown) < len({cell.family for cell in cells}):
        note += f"; the best {len(shown)} of {len(cells)} cells"
    elif len(shown) < len(cells):
        note += f"; {len(shown)} of {len(cells)} cells: each method and type at its best λ"
    style.title(figure, f"Accuracy after each experience: {title}", note)
    return figure


def draw_matrix(axis: Axes, cell: CellMatrices) -> Any:
    """The mean of R over seeds, its numbers written into it; returns the image."""
    mean = cell.matrices.mean(axis=0)
    n = mean.shape[1]
    image = axis.imshow(mean, vmin=0, vmax=1, cmap="viridis")
    size = 7 if n <= MOST_DECIMALS else 4.6
    for (row, column), value in np.ndenumerate(mean):
        if np.isfinite(value) and n <= MOST_NUMBERS:
            colour = "white" if value < 0.6 else "black"
            text = f"{value:.2f}" if n <= MOST_DECIMALS else f"{100 * value:.0f}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    ticks = range(n) if n <= MOST_NUMBERS else range(0, n, -(-n // 10))
    axis.set_xticks(ticks, [str(j + 1) for j in ticks])
    axis.set_yticks([0, *(j + 1 for j in ticks)], ["none", *(str(j + 1) for j in ticks)])
    axis.spines[:].set_visible(False)
    axis.grid(False)
    return image


def draw_curves(cells: Sequence[CellMatrices], title: str) -> Figure:
    """Average accuracy on the experiences seen, as they come."""
    panels = panels_of(cells)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(5.6 if columns == 1 else 4.4 * columns, 3.4 * rows + 0.7),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    means = [m for panel in panels for cell in panel for m in _curves(cell)[1].mean(axis=0)]
    for i, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        axis.set_ylim(style.limits(means))
        _draw_panel(axis, panel)
        axis.set_xlabel("experiences trained on")
        if i % columns == 0:
            axis.set_ylabel("average accuracy on those seen")
    few = max(map(len, panels)) <= MOST_BANDS
    counts = sorted({len(cell.matrices) for cell in cells})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    note = f"mean over seeds ({n}){', band: 95 % interval' if few else ''}"
    shown = len({id(cell) for panel in panels for cell in panel})
    if shown < len(cells):
        note += f"; the best {shown} of {len(cells)} cells"
    style.title(figure, f"Average accuracy as experiences come: {title}", note)
    return figure


def panels_of(cells: Sequence[CellMatrices]) -> list[list[CellMatrices]]:
    """All cells in one panel if it can hold them, else one per kind, each with the levels.

    Args:
        cells: Of one stream.

    Returns:
        At most `MOST_LINES` cells a panel. Where there are more families than that, a panel for
        ours and one for the others, per loss; where that does not do, the best cell of each of
        the best.
    """
    if len({cell.family for cell in cells}) > style.MOST_LINES:
        by_loss: dict[tuple[bool, str], list[CellMatrices]] = {}
        for cell in cells:
            by_loss.setdefault(cell.panel, []).append(cell)
        if max(map(len, by_loss.values())) <= style.MOST_LINES:
            return [by_loss[key] for key in sorted(by_loss)]
        cells = best_of_each_family(cells)
    if len(cells) <= style.MOST_LINES:
        return [list(cells)]
    levels = [cell for cell in cells if math.isnan(cell.ewc_lambda)][: style.MOST_LINES // 2]
    room = style.MOST_LINES - len(levels)
    kinds: dict[str, list[CellMatrices]] = {}
    for cell in cells:
        if not any(cell is level for level in levels):
            kinds.setdefault(cell.kind, []).append(cell)
    panels = []
    for own in kinds.values():
        n = -(-len(own) // room)
        size = -(-len(own) // n)
        panels += [[*levels, *own[i : i + size]] for i in range(0, len(own), size)]
    return panels


def _draw_panel(axis: Axes, cells: Sequence[CellMatrices]) -> None:
    band = len(cells) <= MOST_BANDS
    own: dict[str, list[str]] = {}
    for cell in cells:
        own.setdefault(cell.colour, []).append(cell.label)
    labels = []
    n_experiences = 1
    tried = [cell.label for cell in cells if not math.isnan(cell.ewc_lambda)]
    common, _ = without_common(tried)
    shared = set(common.split(", "))
    axis.set_title(wrapped(common, 40))
    for cell in cells:
        mates = own[cell.colour]
        colour = style.shades(cell.colour, len(mates))[mates.index(cell.label)]
        x, curves = _curves(cell)
        n_experiences = max(n_experiences, cell.matrices.shape[2])
        bands = [interval(values) for values in curves.T]
        means, low, high = ([b[k] for b in bands] for k in ("mean", "ci_low", "ci_high"))
        level = len(x) == 1  # trained on everything at once
        if level:
            x = np.array([1, n_experiences])
            means, low, high = (2 * values for values in (means, low, high))
        look = {"linestyle": "--"} if level else {"marker": "o", "markersize": 3.5}
        axis.plot(x, means, color=colour, **look)
        if band and len(curves) > 1:
            axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        name = ", ".join(part for part in cell.label.split(", ") if part not in shared)
        labels.append(style.EndLabel(name, means[-1], colour))
    axis.set_xlim(0.9, n_experiences + 0.1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.label_ends(axis, labels)


def _curves(cell: CellMatrices) -> tuple[np.ndarray, np.ndarray]:
    """Experiences trained on where all were evaluated, [E]; the average accuracies, [n, E]."""
    curves = np.stack([seen_accuracy(matrix) for matrix in cell.matrices])
    measured = np.isfinite(curves).all(axis=0)
    return np.flatnonzero(measured) + 1, curves[:, measured]

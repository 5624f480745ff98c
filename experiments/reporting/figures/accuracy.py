"""The pictures: accuracy matrices, and average accuracy as experiences come."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.reporting.figures.style import COLOURS, DPI, MARKERS, MOST_BANDS, STYLE
from experiments.reporting.labels import LABELS, cell_labels
from experiments.results.metrics import Matrix, seen_accuracy
from experiments.results.statistics import interval

GROUP = ["benchmark", "dataset", "scenario"]


CELL_OF_GROUP = ["method", "fisher_type", "ewc_lambda", "config_hash"]


TITLE_WIDTH = 32  # letters above a matrix


Cells = dict[str, tuple[str, np.ndarray]]  # label -> method, R of every seed [n, T + 1, T]


def plot_all(accuracy: pd.DataFrame, runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws both pictures of every benchmark and scenario in the tables.

    Args:
        accuracy: Rows of `accuracy.csv`.
        runs: Rows of `runs.csv`; only complete runs are drawn.
        folder: Where the PNG files go; made if it isn't there.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = runs.loc[runs["status"] == "ok", ["run_id", "config_hash"]]
    rows = accuracy.merge(done, on="run_id")
    files = []
    labels = cell_labels(runs)
    for key, group in rows.groupby(GROUP, sort=False):
        name, title = "-".join(map(str, key)), f"{key[0]} {key[1]}, {key[2]}-incremental"
        cells = matrices_of(group, labels)
        for kind, draw in (("matrix", draw_matrices), ("accuracy", draw_curves)):
            with plt.rc_context(STYLE):
                figure = draw(cells, title)
                files.append(folder / f"{kind}-{name}.png")
                figure.savefig(files[-1], dpi=DPI, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
    return files


def matrices_of(group: pd.DataFrame, labels: dict[str, str]) -> Cells:
    """Per label of a cell its method and its matrices over seeds."""
    cells = {}
    order = sorted(
        group.groupby(CELL_OF_GROUP, dropna=False), key=lambda kv: list(LABELS).index(kv[0][0])
    )
    for (method, _, _, config_hash), cell in order:
        matrices = np.stack([_matrix(run) for _, run in cell.groupby("run_id")])
        cells[labels[config_hash]] = (method, matrices)
    return cells


def _matrix(run: pd.DataFrame) -> Matrix:
    n = int(run["eval_exp"].max()) + 1
    matrix = np.full((n + 1, n), np.nan)
    matrix[run["train_exp"] + 1, run["eval_exp"]] = run["accuracy"]
    return matrix


def draw_matrices(cells: Cells, title: str) -> plt.Figure:
    """R of every cell, the mean over seeds, beside each other."""
    columns = min(len(cells), 4)
    rows = -(-len(cells) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.0 * columns + 0.8, 3.3 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    image = None
    for i, (axis, (label, (_, matrices))) in enumerate(zip(axes.flat, cells.items(), strict=False)):
        image = draw_matrix(axis, label, matrices)
        if i % columns == 0:
            axis.set_ylabel("trained through experience")
        axis.set_xlabel("tested on experience")
    assert image is not None
    figure.colorbar(image, ax=axes, shrink=0.8, label="accuracy (mean over seeds)")
    figure.suptitle(title)
    return figure


def draw_matrix(axis: Axes, label: str, matrices: np.ndarray) -> Any:
    """The mean of R over seeds [n, T + 1, T], every number written into it; returns the image."""
    mean = matrices.mean(axis=0)
    image = axis.imshow(mean, vmin=0, vmax=1, cmap="viridis")
    for (row, column), value in np.ndenumerate(mean):
        if np.isfinite(value):
            colour = "white" if value < 0.6 else "black"
            axis.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7
            )
    n = mean.shape[1]
    axis.set_title(f"{textwrap.fill(label, TITLE_WIDTH)}\nn = {len(matrices)}", fontsize=9)
    axis.set_xticks(range(n), [str(j + 1) for j in range(n)])
    axis.set_yticks(range(n + 1), ["none", *(str(j + 1) for j in range(n))])
    axis.spines[:].set_visible(False)
    return image


def draw_curves(cells: Cells, title: str) -> plt.Figure:
    """Average accuracy on the experiences seen, as they come."""
    per_method = pd.Series([method for method, _ in cells.values()]).value_counts()
    many = len(cells) > MOST_BANDS
    figure, axis = plt.subplots(figsize=(9.8 if many else 5.4, 4.2), layout="constrained")
    drawn: dict[str, int] = {}
    for label, (method, matrices) in cells.items():
        i = drawn[method] = drawn.get(method, -1) + 1
        shade = 1.0 - 0.7 * i / per_method[method]
        style = {"color": COLOURS[method], "alpha": shade, "marker": MARKERS[i % len(MARKERS)]}
        _draw_curve(axis, label, matrices, style, band=not many)
    axis.set_xlabel("experiences trained on")
    axis.set_ylabel("average accuracy on those seen")
    axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axis.grid(alpha=0.12)
    if many:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axis.set_title(f"{title}\nmean over seeds", fontsize=10)
    else:
        axis.legend(fontsize=8)
        axis.set_title(f"{title}\nmean over seeds, band: 95 % interval", fontsize=10)
    return figure


def _draw_curve(
    axis: Axes, label: str, matrices: np.ndarray, style: dict[str, Any], *, band: bool
) -> None:
    curves = np.stack([seen_accuracy(matrix) for matrix in matrices])  # [n, T]
    n_experiences = curves.shape[1]
    label = f"{label} (n = {len(curves)})"
    if np.isnan(curves[:, :-1]).all():  # trained on everything at once: a level, not a curve
        axis.axhline(curves[:, -1].mean(), color=style["color"], linestyle="--", label=label)
        return
    bands = [interval(curves[:, i]) for i in range(n_experiences)]
    x = np.arange(1, n_experiences + 1)
    axis.plot(x, [b["mean"] for b in bands], label=label, **style)
    if band and len(curves) > 1:
        low, high = ([b[k] for b in bands] for k in ("ci_low", "ci_high"))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)

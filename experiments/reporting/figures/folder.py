"""The figures that a results folder keeps beside its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments.reporting.figures import runs as of_runs
from experiments.reporting.figures.accuracy import draw_curves, draw_matrices, matrices_of
from experiments.reporting.figures.over_lambda import draw_over_lambda
from experiments.reporting.figures.style import save
from experiments.reporting.labels import stream_title
from experiments.results.statistics import paired_differences
from experiments.settings.run import STREAM, in_file_name


def plot_all(accuracy: pd.DataFrame, runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the figures of every stream in the tables, and the paired differences of all."""
    return [save(figure, folder / f"{name}.png") for name, figure in _figures(accuracy, runs)]


def _figures(accuracy: pd.DataFrame, runs: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    for stream, group in runs.groupby(list(STREAM), sort=False):
        name = "-".join(map(in_file_name, stream))
        title = stream_title(*stream) + (", validation images" if group["validation"].all() else "")
        if cells := matrices_of(accuracy, group):
            yield f"accuracy-{name}", draw_curves(cells, title)
            yield f"matrix-{name}", draw_matrices(cells, title)
        if (figure := of_runs.draw_methods(group, f"Every method: {title}")) is not None:
            yield f"methods-{name}", figure
        if (figure := draw_over_lambda(group, f"Accuracy over λ: {title}")) is not None:
            yield f"lambda-{name}", figure
    if (figure := of_runs.draw_differences(paired_differences(runs))) is not None:
        yield "differences", figure

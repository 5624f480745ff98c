"""Results of a search for lambda: on the terminal, and as a figure per stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from experiments.reporting.figures.over_lambda import (
    Line,
    common_label,
    lines_of,
    over_lambda,
    shaded,
)
from experiments.reporting.figures.style import MOST_LINES, panel_of
from experiments.reporting.labels import cell_labels, method_of, number, stream_title
from experiments.reporting.terminal import print_table
from experiments.settings.run import STREAM, in_file_name


def draw_tuned(runs: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Validation accuracy over lambda, a figure per stream, at most `MOST_LINES` arms in a panel.

    Many have a panel for ours and one for the others, per loss.

    Args:
        runs: Rows of `runs.csv`, of all values that were tried.

    Yields:
        A name and the figure.
    """
    for stream, part in runs.groupby(list(STREAM)):
        names: Any = stream
        title = f"Accuracy over λ: {stream_title(*names)}, validation images"
        yield (
            f"lambda-{'-'.join(map(in_file_name, names))}",
            over_lambda(_panels(lines_of(part)), title, ("average_accuracy",)),
        )


def _panels(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines by the title of their panel."""
    by_loss: dict[tuple[bool, str], list[Line]] = {}
    for line in lines:
        by_loss.setdefault(panel_of(line.runs.iloc[0].to_dict()), []).append(line)
    groups = [own for _, own in sorted(by_loss.items())] if len(lines) > MOST_LINES else [lines]
    panels = {}
    for own in groups:
        parts = [list(own[i : i + MOST_LINES]) for i in range(0, len(own), MOST_LINES)]
        for i, part in enumerate(parts):
            place = f" ({i + 1} of {len(parts)})" if len(parts) > 1 else ""
            panels[common_label(own) + place] = shaded(part)
    return panels


def print_tuned(table: pd.DataFrame, runs: pd.DataFrame, console: Console) -> None:
    """Print what was chosen, a table per stream."""
    labels = cell_labels(runs, with_lambda=False)
    for stream, part in table.groupby(list(STREAM), sort=False):
        names: Any = stream
        rows = [
            {
                "method": labels[row.config_hash],
                "λ": number(row.ewc_lambda),
                "accuracy": f"{row.mean:.4f}",
                "as good": f"{number(row.lowest_as_good)} to {number(row.highest_as_good)}",
                "tried": f"{number(row.smallest_tried)} to {number(row.largest_tried)}",
                "edge": "" if row.place == "inside" else str(row.place).upper(),
            }
            for row in part.itertuples()
        ]
        title = (
            f"{stream_title(*names)}: chosen on validation images, mean of n = {part['n'].max()}"
        )
        margin = f"; as good: not worse by more than {part['margin'].max():g}"
        print_table(title + margin, rows, console)


def print_edges(table: pd.DataFrame, console: Console) -> None:
    """Say which lambdas are at the edge of what was tried."""
    for row in table[table["place"] != "inside"].to_dict("records"):
        line = (
            f"AT THE EDGE: {method_of(row, with_type=True)} ({row['config_hash']}) is best at the "
            f"{row['place']} of {row['n_values']} values, {row['ewc_lambda']:g}: its best may lie "
            f"beyond; start there by --ewc-lambda {row['ewc_lambda']:g}."
        )
        console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)

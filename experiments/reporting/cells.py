"""The summary of each cell of a grid, which the terminal, text tables and the page render."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.reporting.labels import (
    cell_labels,
    in_words,
    method_of,
    method_place,
    number,
    setting_text,
    stream_title,
)
from experiments.results import statistics
from experiments.results.schemas import UNITS
from experiments.settings.run import STREAM

SHOWN = ("average_accuracy", "forgetting", "learning_accuracy")  # the best of each is bold


@dataclass(frozen=True)
class Cell:
    """The summary of one cell of a grid.

    Attributes:
        method: In words.
        label: Method, Fisher type and settings, in words.
        fisher_type: Empty where the method has none.
        ewc_lambda: NaN where it has none.
        settings: In which it differs from other cells of its method, in words.
        intervals: Of `statistics.interval` by metric; a metric that is not defined is missing.
        best: Metrics of which it is the best of its stream.
        n: Runs that ended well.
        lost: Runs that diverged or failed.
        seconds: Of a run, mean; NaN without runs.
        config_hash: Of its settings.
    """

    method: str
    label: str
    fisher_type: str
    ewc_lambda: float
    settings: Mapping[str, str]
    intervals: Mapping[str, Mapping[str, float]]
    best: frozenset[str]
    n: int
    lost: int
    seconds: float
    config_hash: str

    def interval(self, metric: str) -> str:
        """`0.9412 ± 0.0031`; the mean alone for one seed, a dash where it is not defined.

        Args:
            metric: A column of `runs.csv`.

        Returns:
            The text, with the number of runs where not all that ended well have the metric.
        """
        if metric not in self.intervals:
            return "–"
        found = self.intervals[metric]
        fewer = f" (n = {found['n']:.0f})" if found["n"] < self.n else ""
        return interval_text(found["mean"], found["ci_high"]) + fewer

    @property
    def lambda_text(self) -> str:
        """Lambda, or nothing."""
        return "" if np.isnan(self.ewc_lambda) else number(self.ewc_lambda)


def summary_cells(runs: pd.DataFrame) -> dict[str, list[Cell]]:
    """The cells of each stream, in the methods' usual order, lambda ascending.

    Args:
        runs: Rows of `runs.csv`; a cell without a run that ended well has n = 0.

    Returns:
        Cells by the stream's title.
    """
    best = {metric: statistics.best_cells(runs, metric) for metric in SHOWN}
    found: dict[str, list[Cell]] = {}
    streams = sorted(
        runs.groupby([*STREAM, "validation"]), key=lambda item: (item[0][0] != "split", item[0])
    )
    for (*stream, validation), group in streams:
        varied = statistics.varied_settings(group)
        labels = cell_labels(group, with_lambda=False, with_type=True)
        cells = sorted(
            (cell for _, cell in group.groupby("config_hash")),
            key=lambda c: (
                method_place(c["method"].iloc[0]),
                labels[str(c["config_hash"].iloc[0])],
                c["ewc_lambda"].iloc[0],
            ),
        )
        title = stream_title(*stream) + (", validation images" if validation else "")
        found[title] = [_cell(cell, varied, best, labels) for cell in cells]
    return found


def _cell(
    rows: pd.DataFrame,
    varied: Sequence[str],
    best: Mapping[str, set[str]],
    labels: Mapping[str, str],
) -> Cell:
    first, done = rows.iloc[0], rows[rows["status"] == "ok"]
    values = {m: done[m].dropna().to_numpy(float) for m in UNITS}
    config_hash = str(first["config_hash"])
    return Cell(
        method=method_of(first),
        label=labels[config_hash],
        fisher_type=in_words(setting_text(first["fisher_type"])),
        ewc_lambda=float("nan") if pd.isna(first["ewc_lambda"]) else float(first["ewc_lambda"]),
        settings={in_words(name): setting_text(first[name]) for name in varied},
        intervals={m: statistics.interval(v) for m, v in values.items() if len(v)},
        best=frozenset(m for m, cells in best.items() if config_hash in cells),
        n=len(done),
        lost=len(rows) - len(done),
        seconds=float((done["train_s"] + done["fisher_s"] + done["eval_s"]).mean()),
        config_hash=config_hash,
    )


def interval_text(mean: float, ci_high: float) -> str:
    """`0.9412 ± 0.0031`; the mean alone where there is no interval."""
    half = ci_high - mean
    return f"{mean:.4f}" + (f" ± {half:.4f}" if pd.notna(half) else "")

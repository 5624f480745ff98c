"""The summary of one cell of a grid, and its numbers as text."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.reporting.labels import LABELS


@dataclass(frozen=True)
class Cell:
    """The summary of one cell of a grid, ready to be shown.

    Attributes:
        metrics: Its rows of `summary.csv` by metric.
        n: Seeds.
        config_hash: Of its settings.
    """

    benchmark: str
    dataset: str
    scenario: str
    label: str
    fisher_type: str
    ewc_lambda: str
    metrics: pd.DataFrame
    n: int
    config_hash: str


def by_cell(summary: pd.DataFrame) -> list[Cell]:
    """The cells of a summary by benchmark, in the methods' usual order, lambda ascending."""
    cells = []
    for config_hash, rows in summary.groupby("config_hash", sort=False):
        first = rows.iloc[0]
        by_metric = rows.set_index("metric")
        cells.append((
            first["benchmark"] == "permuted",
            *(first["dataset"], first["scenario"], list(LABELS).index(first["method"])),
            first["ewc_lambda"],
            Cell(  # type: ignore[misc]  # the three that come as one
                *(first[name] for name in ("benchmark", "dataset", "scenario")),
                label=LABELS[first["method"]],
                fisher_type=first["fisher_type"] if pd.notna(first["fisher_type"]) else "",
                ewc_lambda=f"{first['ewc_lambda']:g}" if pd.notna(first["ewc_lambda"]) else "",
                metrics=by_metric,
                n=int(by_metric["n"].get("average_accuracy", 0)),
                config_hash=str(config_hash),
            ),
        ))
    return [cell for *_, cell in sorted(cells, key=lambda entry: entry[:-1])]


def format_interval(by_metric: pd.DataFrame, metric: str) -> str:
    """`0.9412 ± 0.0031`; the mean alone for one seed, a dash where the metric is undefined."""
    if metric not in by_metric.index:
        return "-"
    row = by_metric.loc[metric]
    return interval_text(row["mean"], row["ci_high"])


def interval_text(mean: float, ci_high: float) -> str:
    """`0.9412 ± 0.0031`; the mean alone where there is no interval."""
    half = ci_high - mean
    return f"{mean:.4f}" + (f" ± {half:.4f}" if pd.notna(half) else "")

"""Paper-ready tables from a results folder: mean ± half-width of the 95 % interval, and n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd
import tyro

from experiments import tables
from experiments.report import SHOWN, by_cell, format_interval


@dataclass(frozen=True)
class Table:
    """Print the summary of a results folder."""

    folder: Annotated[str, tyro.conf.Positional] = "results/main"
    """Folder that holds summary.csv."""
    format: Literal["markdown", "latex", "csv"] = "markdown"
    """Notation of the table."""


def run(settings: Table) -> pd.DataFrame:
    """Prints the table and returns it.

    Args:
        settings: Which folder, and how.

    Returns:
        One row per benchmark and method, as text.
    """
    table = summary_table(tables.load(settings.folder)["summary"])
    print(render(table, settings.format), end="")
    return table


def summary_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The main metrics of each cell as text, methods in their usual order."""
    rows = []
    for cell in by_cell(summary):
        rows.append({
            "benchmark": f"{cell.benchmark} {cell.dataset}, {cell.scenario}-incremental",
            "method": cell.label,
            "Fisher": cell.fisher_type,
            "λ": cell.ewc_lambda,
            **{m.replace("_", " "): format_interval(cell.metrics, m) for m in SHOWN},
            "n": str(cell.n),
        })
    return pd.DataFrame(rows)


def render(table: pd.DataFrame, notation: str) -> str:
    """The table as markdown, LaTeX or CSV."""
    if notation == "csv":
        return table.to_csv(index=False)
    if notation == "latex":
        return table.to_latex(index=False)
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

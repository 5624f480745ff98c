"""Result tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments.reporting.cells import by_cell, format_interval
from experiments.results.statistics import chosen_lambdas

SHOWN = ("average_accuracy", "forgetting", "learning_accuracy")


def print_summary(
    summary: pd.DataFrame, console: Console, told: Mapping[str, str] | None = None
) -> None:
    """Prints mean and 95 % interval of the main metrics, a table per benchmark.

    Args:
        summary: Rows of `summary.csv`.
        console: Where to print.
        told: Of `statistics.distinctions`.
    """
    tables_by_title: dict[str, Table] = {}
    for cell in by_cell(summary):
        title = f"{cell.benchmark} {cell.dataset}, {cell.scenario}-incremental"
        if title not in tables_by_title:
            table = tables_by_title[title] = Table(title=f"{title}: mean ± 95 % interval")
            for column in ("method", "Fisher", "λ", *SHOWN, "n"):
                justify = "left" if column == "method" else "right"
                table.add_column(column.replace("_", " "), justify=justify)
        more = (told or {}).get(cell.config_hash)
        tables_by_title[title].add_row(
            f"{cell.label}, {more}" if more else cell.label,
            cell.fisher_type,
            cell.ewc_lambda,
            *(format_interval(cell.metrics, metric) for metric in SHOWN),
            str(cell.n),
        )
    for table in tables_by_title.values():
        console.print(table)


def print_chosen(summary: pd.DataFrame, console: Console) -> None:
    """Prints what `CHOSEN_LAMBDA` in the settings should say."""
    console.print("Chosen on validation data, for CHOSEN_LAMBDA in experiments/settings/tuned.py:")
    for row in chosen_lambdas(summary).itertuples():
        key = (row.benchmark, row.dataset, row.scenario, row.method)
        console.print(f"    {key}: {row.ewc_lambda:g},  # {row.mean:.4f}", highlight=False)


def print_parity(parity: pd.DataFrame, console: Console) -> None:
    """Prints one line per comparison with the built-in."""
    for row in parity.itertuples():
        interval = ""
        if pd.notna(row.ci_low):
            interval = f" [{row.ci_low:+.4f}, {row.ci_high:+.4f}], n = {row.n}"
        console.print(
            f"  {row.benchmark} {row.scenario}: {row.check}: {row.quantity}: "
            f"{row.difference:+.3g}{interval}: {row.verdict}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def print_troubles(runs: pd.DataFrame, console: Console) -> None:
    """Prints the runs that did not end well, with their reasons."""
    for row in runs[runs["status"] != "ok"].itertuples():
        line = f"  {row.run_id} {row.status}: {row.reason}"
        console.print(line, style="red", markup=False, soft_wrap=True)

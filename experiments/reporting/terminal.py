"""Result tables on the terminal, none wider than it or broken inside a word."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.reporting import comparison
from experiments.reporting.cells import SHOWN, summary_cells
from experiments.reporting.labels import in_words

NO_BREAK = "\N{NO-BREAK SPACE}"
MAY_WRAP = ("method", "compared", "what", "beside", "verdict")  # between words; others are short


def print_table(title: str, rows: Sequence[dict[str, str]], console: Console) -> None:
    """Print rows of text as a table.

    Args:
        title: Above it.
        rows: Entries by column; all have the same columns.
        console: Where to print.
    """
    if not rows:
        return
    # The terminal breaks lines at no-break spaces too: `λ=30` stays whole.
    rows = [{column: text.replace(NO_BREAK, "") for column, text in row.items()} for row in rows]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows[0]:
        wraps = column in MAY_WRAP
        longest = max(len(word) for row in rows for word in (*row[column].split(), *column.split()))
        table.add_column(
            column,
            justify="left" if wraps or column in ("metric", "Fisher") else "right",
            no_wrap=not wraps,
            min_width=longest if wraps else None,
        )
    for row in rows:
        table.add_row(*row.values())
    console.print(table, highlight=False, markup=False)


def print_summary(runs: pd.DataFrame, console: Console) -> None:
    """Print mean and 95 % interval of the main metrics, a table per stream.

    Args:
        runs: Rows of `runs.csv`.
        console: Where to print.
    """
    for title, cells in summary_cells(runs).items():
        rows = []
        for cell in cells:
            varied = "".join(f", {name} {value or 'none'}" for name, value in cell.settings.items())
            rows.append({
                "method": cell.method + varied,
                "Fisher": cell.fisher_type,
                "λ": cell.lambda_text,
                **{in_words(metric): cell.interval(metric) for metric in SHOWN},
                "n": str(cell.n),
            })
        print_table(f"{title}: mean ± 95 % interval", rows, console)


def print_comparisons(comparisons: pd.DataFrame, console: Console) -> None:
    """Print a sentence per stream, then the paired differences, a table per stream.

    Args:
        comparisons: Rows of `comparisons.csv`.
        console: Where to print.
    """
    for sentence in comparison.answers(comparisons):
        words = sentence.replace(NO_BREAK, "")
        console.print(words, highlight=False, markup=False, style="bold")
    rows = pd.DataFrame(comparison.comparison_rows(comparisons))
    for stream, part in rows.groupby("stream", sort=False) if len(rows) else ():
        shown = part.drop(columns="stream").to_dict("records")
        print_table(f"{stream}: difference [95 % interval], seed by seed", shown, console)


def print_checks(checks: pd.DataFrame, console: Console, *, all_of_them: bool = False) -> None:
    """Print how many checks hold, and those that do not; or all.

    Args:
        checks: Rows of `checks.csv`.
        console: Where to print.
        all_of_them: Whether the table is printed too.
    """
    console.print(f"{comparison.checks_text(checks)}.", highlight=False)
    shown = checks if all_of_them else checks[checks["verdict"] == "different"]
    rows = pd.DataFrame(comparison.check_rows(shown))
    for stream, part in rows.groupby("stream", sort=False) if len(rows) else ():
        print_table(f"{stream}: checks", part.drop(columns="stream").to_dict("records"), console)


def print_troubles(runs: pd.DataFrame, console: Console) -> None:
    """Print the runs that did not end well, with their reasons."""
    for row in runs[runs["status"] != "ok"].itertuples():
        line = f"  {row.run_id} {row.status}: {row.reason}"
        console.print(line, style="red", markup=False, soft_wrap=True)

"""Result tables on the terminal, none wider than it or broken inside a word."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial

import pandas as pd
from rich.console import Console

from experiments.reporting import comparison
from experiments.reporting.cells import SHOWN, summary_cells
from experiments.reporting.labels import in_words, wrapped
from experiments.results.statistics import MARGIN

NO_BREAK = "\N{NO-BREAK SPACE}"
LEFT = ("method", "compared", "metric", "Fisher", "verdict", "what", "beside")  # else to the right
GAP, INDENT = "  ", "  "
MOST_ROWS = 60  # of a stream's comparisons: about a screen


def print_table(title: str, rows: Sequence[dict[str, str]], console: Console) -> None:
    """Print rows of text as a table.

    Where it is too wide, the first column's entries become lines above their rows; where that is
    not enough, each row becomes a sentence.
    """
    if not rows:
        return
    show = partial(_show, console=console)
    show(f"\n{wrapped(title, console.width)}", style="italic")
    first, *others = rows[0]
    header, *lines = _aligned(rows, [first, *others])
    if len(header) <= console.width:
        show(header, style="bold")
        show("\n".join(["─" * len(header), *lines]))
        return
    header, *lines = _aligned(rows, others)
    if fits := len(INDENT + header) <= console.width:
        show(INDENT + header, style="bold")
    above = ""
    for row, line in zip(rows, lines, strict=True):
        if row[first] != above:
            above = row[first]
            show(wrapped(above, console.width))
        if not fits:
            line = ", ".join(f"{name} {row[name]}" for name in others if row[name])
        show(textwrap.indent(wrapped(line, console.width - 2) if not fits else line, INDENT))


def _show(text: str, console: Console, style: str | None = None) -> None:
    """Print lines that were broken at other spaces than those of `λ = 30`, which stay whole."""
    text = text.replace(NO_BREAK, " ")
    console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)


def _aligned(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> list[str]:
    """The header and the rows, each as wide as the widest; trailing spaces are cut off the rows."""
    lines = [{column: column for column in columns}, *rows]
    widths = {column: max(len(line[column]) for line in lines) for column in columns}
    header, *rest = (
        GAP.join(f"{line[c]:{'<' if c in LEFT else '>'}{widths[c]}}" for c in columns)
        for line in lines
    )
    return [header, *(line.rstrip() for line in rest)]


def print_summary(runs: pd.DataFrame, console: Console) -> None:
    """Print mean and 95 % interval of the main metrics, a table per stream."""
    for title, cells in summary_cells(runs).items():
        rows = [
            {
                "method": cell.label,
                "λ": cell.lambda_text,
                **{in_words(metric): cell.interval(metric) for metric in SHOWN},
                "n": str(cell.n),
            }
            for cell in cells
        ]
        print_table(f"{title}: mean ± 95 % interval", rows, console)


def print_comparisons(
    comparisons: pd.DataFrame, console: Console, *, all_pairs: bool = False
) -> None:
    """Print a sentence per stream, or per pair, then a table of paired differences per stream."""
    for sentence in comparison.answers(comparisons, all_pairs=all_pairs):
        _show(wrapped(sentence, console.width), console, style="bold")
    streams = comparisons.groupby([*comparison.STREAM, "validation"], sort=False)
    for _, rows in streams if len(comparisons) else ():
        stream, shown = comparison.stream_of(rows.iloc[0]), comparison.main_pairs(rows, MOST_ROWS)
        if len(rows) > MOST_ROWS:
            all_of_them = "all are in comparisons.csv, or beside one arm: `compare --against ARM`"
            line = f"{stream}: {len(rows)} differences; {all_of_them}."
            _show(f"\n{wrapped(line, console.width)}", console)
        if len(shown) > MOST_ROWS:
            continue
        found = pd.DataFrame(comparison.comparison_rows(shown))
        found["verdict"] = found["verdict"].str.replace("within the margin", "< margin")
        title = f"{stream}: difference [95 % interval], seed by seed; margin {MARGIN:g}"
        print_table(title, found.drop(columns="stream").to_dict("records"), console)


def print_checks(checks: pd.DataFrame, console: Console, *, all_of_them: bool = False) -> None:
    """Print how many checks hold, and those that do not; or all."""
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

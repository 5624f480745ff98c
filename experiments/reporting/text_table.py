"""Paper-ready tables from a results folder: mean ± half-width of the 95 % interval, and n.

The best of a benchmark is bold only where its interval against each other method allows it. What
`compare` and `reproduce` find is printed likewise, with the interval of each paired difference.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tyro

from experiments.reporting import comparison
from experiments.reporting.cells import SHOWN, interval_text, summary_cells
from experiments.reporting.folders import given_or_newest, notes
from experiments.reporting.labels import in_words, setting_text
from experiments.results import statistics
from experiments.results.logged import load_results

POWER_OF_TEN = re.compile(r"(?:(\d(?:\.\d+)?))e(-?\d+)")


@dataclass(frozen=True)
class Table:
    """Print the summary of a results folder, or its comparison with Avalanche or a paper."""

    folder: Annotated[str | None, tyro.conf.Positional] = None
    """Folder of results, or file of `TidyCSVLogger`. Unset: your newest below runs/."""
    of: Literal["summary", "comparisons", "checks", "reproduce"] = "summary"
    """What to print: methods side by side; paired differences; equalities with Avalanche's EWC; a
    published experiment beside its number."""
    format: Literal["markdown", "latex", "csv"] = "markdown"
    """Notation of the table; LaTeX needs the package booktabs."""


@dataclass(frozen=True)
class SummaryTable:
    """A table to be shown.

    Attributes:
        text: One row per benchmark and method.
        best: Which entries are bold, in the same shape.
    """

    text: pd.DataFrame
    best: pd.DataFrame


def run(settings: Table) -> SummaryTable:
    """Print the table and return it.

    Raises:
        ValueError: The folder does not hold it.
    """
    names, _ = MADE_FROM[settings.of]
    table = table_of(given_or_newest(settings.folder, *names), settings.of)
    print(render(table, settings.format), end="")
    return table


def table_of(folder: str | Path, of: str) -> SummaryTable:
    """Return the table that `run` prints.

    Raises:
        ValueError: The folder does not hold it.
    """
    names, make = MADE_FROM[of]
    found = load_results(folder)
    if missing := set(names) - set(found):
        files = " and ".join(f"{name}.csv" for name in names)
        raise ValueError(
            f"`folder` must hold {files}, got {folder} without {', '.join(sorted(missing))}."
        )
    if "runs" in names and (note := notes(folder, found["runs"])):
        print(f"NOTE: {note}", file=sys.stderr)  # the table itself may go into a file
    return make(*(found[name] for name in names))


def summary_table(runs: pd.DataFrame) -> SummaryTable:
    """The main metrics of each cell as text, methods in their usual order."""
    rows, bold = [], []
    for title, cells in summary_cells(runs).items():
        for cell in cells:
            rows.append({
                "benchmark": title,
                "method": cell.method,
                "Fisher": cell.fisher_type,
                "λ": cell.lambda_text,
                **cell.settings,
                **{in_words(metric): cell.interval(metric) for metric in SHOWN},
                "n": str(cell.n),
            })
            bold.append({in_words(metric): metric in cell.best for metric in SHOWN})
    text = pd.DataFrame(rows)
    order = [name for name in text if name not in (*map(in_words, SHOWN), "n")]
    text = text[[*order, *map(in_words, SHOWN), "n"]].fillna("")
    return SummaryTable(text, pd.DataFrame(bold).reindex(columns=text.columns, fill_value=False))


def _comparisons_table(runs: pd.DataFrame) -> SummaryTable:
    return _plain(comparison.comparison_rows(statistics.paired_differences(runs)))


def _published_table(reproduce: pd.DataFrame) -> SummaryTable:
    """Each arm of a published experiment beside its number."""
    return _plain(
        {
            "experiment": row.protocol,
            "arm": row.arm,
            "published": setting_text(row.reference),
            "average accuracy": "–" if row.n == 0 else interval_text(row.mean, row.ci_high),
            "difference": "–"
            if pd.isna(row.difference)
            else comparison.difference_text(
                row.difference, row.difference_ci_low, row.difference_ci_high
            )
            + f" from {row.against}",
            "n": str(row.n),
            "reproduced": row.reproduced,
        }
        for row in reproduce.itertuples()
    )


def _plain(rows: Iterable[dict[str, str]]) -> SummaryTable:
    text = pd.DataFrame(list(rows))
    return SummaryTable(text, text.map(lambda entry: False))


# What to print -> the tables that it is made from, and how.
MADE_FROM: dict[str, tuple[tuple[str, ...], Callable[..., SummaryTable]]] = {
    "summary": (("runs",), summary_table),
    "comparisons": (("runs",), _comparisons_table),
    "checks": (("checks",), lambda checks: _plain(comparison.check_rows(checks))),
    "reproduce": (("reproduce",), _published_table),
}


def render(table: SummaryTable, notation: str) -> str:
    """The table as markdown, LaTeX (booktabs) or CSV, which knows no bold."""
    if notation == "csv":
        return table.text.to_csv(index=False)
    mark = {"markdown": "**{}**", "latex": r"\textbf{{{}}}"}[notation]
    text = _latex_text(table.text) if notation == "latex" else table.text
    text = text.mask(table.best.to_numpy(dtype=bool), text.map(mark.format))
    if notation == "latex":
        return _latex(text)
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _latex_text(text: pd.DataFrame) -> pd.DataFrame:
    symbols = {"λ": r"$\lambda$", "±": r"$\pm$", "%": r"\%", "−": "$-$", "_": r"\_", "&": r"\&"}

    def escaped(entry: str) -> str:
        if power := POWER_OF_TEN.fullmatch(entry):
            factor = "" if power[1] == "1" else rf"{power[1]} \cdot "
            return f"${factor}10^{{{int(power[2])}}}$"
        return "--" if entry == "–" else "".join(symbols.get(c, c) for c in entry)

    return text.map(escaped).rename(columns=escaped)


def _latex(text: pd.DataFrame) -> str:
    """A booktabs table: numbers to the right; the first column where it changes, after a rule."""
    first = text.columns[0]
    new = text[first].ne(text[first].shift()).to_numpy()
    text = text.assign(**{first: np.where(new, text[first], "")})
    lines = [
        rf"\begin{{tabular}}{{lll{'r' * (text.shape[1] - 3)}}}",
        r"\toprule",
        " & ".join(text.columns) + r" \\",
    ]
    for begins, row in zip(new, text.to_numpy().tolist(), strict=True):
        lines += [r"\midrule"] if begins else []
        lines.append(" & ".join(row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])

"""Paper-ready tables from a results folder: mean ± half-width of the 95 % interval, and n.

The best of a benchmark is bold only where its interval against each other method allows it. What
`parity` and `reproduce` find is printed likewise, with the interval of each paired difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import tyro

from experiments.reporting.cells import by_cell, format_interval, interval_text
from experiments.reporting.terminal import SHOWN
from experiments.results import statistics, tables
from experiments.results.statistics import COMPARED, best_cells

POWER_OF_TEN = re.compile(r"1e([+-]\d+)")


@dataclass(frozen=True)
class Table:
    """Print the summary of a results folder, or what it says beside Avalanche or a paper."""

    folder: Annotated[str, tyro.conf.Positional] = "results/main"
    """Folder of results."""
    of: Literal["summary", "parity", "reproduce"] = "summary"
    """What to print: methods side by side; paired differences from Avalanche's built-in EWC; a
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
    """Prints the table and returns it.

    Args:
        settings: Which folder, and how.

    Returns:
        What was printed.

    Raises:
        ValueError: The folder does not hold it.
    """
    table = table_of(settings.folder, settings.of)
    print(render(table, settings.format), end="")
    return table


def table_of(folder: str | Path, of: str) -> SummaryTable:
    """What `run` prints.

    Args:
        folder: Of results.
        of: One of `MADE_FROM`.

    Returns:
        The table.

    Raises:
        ValueError: The folder does not hold it.
    """
    names, make = MADE_FROM[of]
    found = tables.load(folder)
    if missing := set(names) - set(found):
        files = " and ".join(f"{name}.csv" for name in names)
        raise ValueError(
            f"`folder` must hold {files}, got {folder} without {', '.join(sorted(missing))}."
        )
    return make(*(found[name] for name in names))


def summary_table(summary: pd.DataFrame, runs: pd.DataFrame) -> SummaryTable:
    """The main metrics of each cell as text, methods in their usual order.

    Args:
        summary: Rows of `summary.csv`.
        runs: Rows of `runs.csv`, which say what is best.

    Returns:
        The table.
    """
    best = {metric: best_cells(runs, metric) for metric in SHOWN}
    varied = statistics.varied_settings(runs)
    settings = runs.drop_duplicates("config_hash").set_index("config_hash")[varied]
    rows, bold = [], []
    for cell in by_cell(summary):
        rows.append({
            "benchmark": _stream(cell),
            "method": cell.label,
            "Fisher": cell.fisher_type,
            "λ": cell.ewc_lambda,
            **{k.replace("_", " "): _word(settings.loc[cell.config_hash, k]) for k in varied},
            **{m.replace("_", " "): format_interval(cell.metrics, m) for m in SHOWN},
            "n": str(cell.n),
        })
        bold.append({m.replace("_", " "): cell.config_hash in best[m] for m in SHOWN})
    text = pd.DataFrame(rows)
    return SummaryTable(text, pd.DataFrame(bold).reindex(columns=text.columns, fill_value=False))


def parity_table(parity: pd.DataFrame) -> SummaryTable:
    """Ours less the built-in, seed by seed; the numerical checks stay in the CSV.

    Args:
        parity: Rows of `parity.csv`.

    Returns:
        The table, nothing of it bold.
    """
    paired = parity[parity["quantity"].isin(COMPARED)]
    return _plain(
        {
            "benchmark": _stream(row),
            "compared": row.check.removeprefix("paired seeds, "),
            "metric": row.quantity.replace("_", " "),
            "ours": f"{row.ours:.4f}",
            "built-in": f"{row.builtin:.4f}",
            "difference": _difference(row.difference, row.ci_low, row.ci_high),
            "n": str(row.n),
            "verdict": row.verdict,
        }
        for row in paired.itertuples()
    )


def reproduce_table(reproduce: pd.DataFrame) -> SummaryTable:
    """Each arm of a published experiment beside its number.

    Args:
        reproduce: Rows of `reproduce.csv`.

    Returns:
        The table, nothing of it bold.
    """
    return _plain(
        {
            "experiment": row.protocol,
            "arm": row.arm,
            "published": _word(row.reference),
            "average accuracy": "-" if row.n == 0 else interval_text(row.mean, row.ci_high),
            "difference": "-"
            if pd.isna(row.difference)
            else _difference(row.difference, row.difference_ci_low, row.difference_ci_high)
            + f" from {row.against}",
            "n": str(row.n),
            "reproduced": row.reproduced,
        }
        for row in reproduce.itertuples()
    )


def _plain(rows: Iterable[dict[str, str]]) -> SummaryTable:
    text = pd.DataFrame(list(rows))
    return SummaryTable(text, text.map(lambda entry: False))


def _stream(row: Any) -> str:
    return f"{row.benchmark} {row.dataset}, {row.scenario}-incremental"


def _difference(mean: float, low: float, high: float) -> str:
    return f"{mean:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if pd.notna(low) else "")


# What to print -> the tables that it is made from, and how.
MADE_FROM: dict[str, tuple[tuple[str, ...], Callable[..., SummaryTable]]] = {
    "summary": (("summary", "runs"), summary_table),
    "parity": (("parity",), parity_table),
    "reproduce": (("reproduce",), reproduce_table),
}


def _word(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


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
    symbols = {"λ": r"$\lambda$", "±": r"$\pm$", "%": r"\%", "_": r"\_", "&": r"\&"}

    def escaped(entry: str) -> str:
        if power := POWER_OF_TEN.fullmatch(entry):
            return f"$10^{{{int(power[1])}}}$"
        return "--" if entry == "-" else "".join(symbols.get(c, c) for c in entry)

    return text.map(escaped).rename(columns=escaped)


def _latex(text: pd.DataFrame) -> str:
    """Numbers to the right, a rule between what the first column names, which is said once."""
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

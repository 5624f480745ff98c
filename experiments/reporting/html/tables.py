"""The tables of the report's page: entries, and the keys that sort them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.reporting import comparison
from experiments.reporting.cells import SHOWN, Cell
from experiments.reporting.labels import in_words, lambda_text, number
from experiments.results import schemas
from experiments.results.metrics import METRICS
from experiments.results.statistics import as_given

SUMMARY_METRICS = (*SHOWN, "forward_transfer")
LONG = 30  # letters; a longer text may be broken into lines
MOST_ROWS = 40  # of a CSV; the page says what it leaves out


@dataclass(frozen=True)
class Entry:
    """One entry of a table.

    Attributes:
        text: What is shown.
        key: What it is sorted by; empty entries come last.
        mark: A class for its looks: "best", a verdict or a status.
    """

    text: str
    key: str
    mark: str = ""


@dataclass(frozen=True)
class PageTable:
    """A table that can be sorted by each of its columns.

    Attributes:
        title: Its caption.
        columns: Names.
        numeric: Which columns are numbers.
        rows: The entries.
        note: What is to be said of it, or nothing.
    """

    title: str
    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[Entry]]
    note: str = ""


def summary_table(cells: Sequence[Cell]) -> PageTable:
    """The cells of one stream; one none of whose runs ended well is a row too, with n = 0.

    Args:
        cells: Of `reporting.cells.summary_cells`.

    Returns:
        The table: name and accuracy first, so that a narrow screen shows both.
    """
    settings = list(dict.fromkeys(name for cell in cells for name in cell.settings))
    first, *others = SUMMARY_METRICS
    columns = ["method", first, "n", *others, "λ", "Fisher", *settings, "lost", "seconds"]
    words = {"method", "Fisher", *settings}
    rows = []
    for cell in cells:
        name = cell.label
        if cell.lambda_text:
            name += f", {lambda_text(cell.ewc_lambda)}"
        rows.append([
            Entry(name, name, "name"),
            _interval(cell, first),
            _entry(cell.n),
            *(_interval(cell, metric) for metric in others),
            Entry(cell.lambda_text, _key(cell.ewc_lambda)),
            _entry(cell.fisher_type),
            *(_entry(cell.settings.get(name, "")) for name in settings),
            Entry(str(cell.lost or "–"), str(cell.lost), "bad" if cell.lost else ""),
            Entry("–" if np.isnan(cell.seconds) else f"{cell.seconds:.1f}", _key(cell.seconds)),
        ])
    numeric = [name not in words for name in columns]
    return PageTable("Mean ± 95 % interval", _words(columns), numeric, rows)


def _interval(cell: Cell, metric: str) -> Entry:
    if metric not in cell.intervals:
        return Entry("–", "")
    mark = "best" if metric in cell.best else ""
    return Entry(_signed(cell.interval(metric)), _key(cell.intervals[metric]["mean"]), mark)


def differences_table(comparisons: pd.DataFrame, metric: str) -> PageTable | None:
    """Paired differences of one metric: what is compared, the difference, and what it says.

    Args:
        comparisons: Rows of `comparisons.csv`.
        metric: Of its column `metric`.

    Returns:
        The table; None without rows, or with so many lambdas that it answers nothing.
    """
    all_rows = comparisons[comparisons["metric"] == metric]
    rows = comparison.main_pairs(all_rows, MOST_ROWS)
    if not 0 < len(rows) <= MOST_ROWS:
        return None
    several = rows.groupby([*comparison.STREAM, "validation"]).ngroups > 1
    texts = comparison.comparison_rows(rows)
    entries = []
    for text, row in zip(texts, rows.to_dict("records"), strict=True):
        pair = f"{text['stream']}: {text['compared']}" if several else text["compared"]
        entries.append([
            Entry(pair, pair, "name"),
            Entry(text["difference"], _key(row["difference"]), "pair"),
            Entry(text["verdict"], text["verdict"], text["verdict"].split(",")[0]),
            _entry(row["n"]),
            Entry(text["means"], _key(row["mean"])),
        ])
    columns = ["first − second", "difference", "the first is", "n", "means"]
    title = f"{in_words(metric)}: difference [95 % interval], seed by seed".capitalize()
    left_out = len(all_rows) - len(rows)
    note = f"The {left_out} pairs of other methods are in comparisons.csv." if left_out else ""
    return PageTable(title, columns, [False, True, False, True, True], entries, note)


def trouble_table(runs: pd.DataFrame) -> PageTable | None:
    """The runs that did not end well, and why; None if all did."""
    lost = runs[runs["status"] != "ok"]
    if lost.empty:
        return None
    return from_frame(lost[["run_id", "status", "reason"]], "Runs that did not end well")


def checks_page_table(checks: pd.DataFrame) -> PageTable:
    """The equalities with Avalanche's EWC, with how many hold as the title."""
    frame = pd.DataFrame(comparison.check_rows(checks))
    frame = frame[["what", "error", "tolerance", "verdict", "stream", *CHECK_DETAILS]]
    return from_frame(frame, comparison.checks_text(checks))


CHECK_DETAILS = ("Fisher", "beside", "dtype", "size")


def runs_table(runs: pd.DataFrame) -> PageTable:
    """Every run with what it measured and those settings that are not the same in all."""
    names = [n for n in schemas.SETTING_NAMES if n in runs]
    cells = as_given(runs.drop_duplicates("config_hash"))
    varied = [n for n in names if n == "seed" or cells[n].nunique(dropna=False) > 1]
    measured = [*METRICS, "train_s", "fisher_s", "eval_s", "peak_rss_mb", "penalty_state_mb"]
    return from_frame(runs[["run_id", "status", *varied, *measured]], "All runs")


def from_frame(frame: pd.DataFrame, title: str) -> PageTable:
    """Any table; numbers show four digits and sort by all of theirs."""
    shown = frame.head(MOST_ROWS)
    note = "" if len(shown) == len(frame) else f"The first {MOST_ROWS} of {len(frame)} rows."
    numeric = [
        pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)
        for kind in frame.dtypes
    ]
    names = list(frame.columns)
    rows = [
        [_entry(value, name) for name, value in zip(names, row, strict=True)]
        for row in shown.itertuples(index=False, name=None)
    ]
    return PageTable(title, _words(names), numeric, rows, note)


def constant_settings(runs: pd.DataFrame) -> dict[str, str]:
    """The settings that all runs share."""
    names = [n for n in schemas.SETTING_NAMES if n in runs]
    return {
        in_words(name): _entry(runs[name].iloc[0]).text
        for name in names
        if runs[name].nunique(dropna=False) == 1 and pd.notna(runs[name].iloc[0])
    }


def _words(names: Sequence[str]) -> list[str]:
    return [in_words(name) for name in names]


def _entry(value: Any, column: str = "") -> Entry:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return Entry("", "")
    if isinstance(value, bool | np.bool_):
        return Entry("yes" if value else "no", str(int(value)))
    if isinstance(value, float | np.floating):
        return Entry(_signed(number(float(f"{value:.4g}"))), _key(float(value)))
    text = str(value)
    mark = text if column in ("verdict", "status") else "long" if len(text) > LONG else ""
    return Entry(text, text, mark)


def _signed(number: str) -> str:
    """With a minus sign as printers have it."""
    return re.sub(r"(?<!e)-", "−", number)


def _key(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.7g}"

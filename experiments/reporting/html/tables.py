"""The tables of the report's page: what is shown, and what it is sorted by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.reporting.cells import interval_text
from experiments.reporting.labels import LABELS
from experiments.reporting.terminal import SHOWN
from experiments.results import schemas, statistics
from experiments.results.metrics import METRICS
from experiments.results.statistics import best_cells

SUMMARY_METRICS = (*SHOWN, "forward_transfer")
LONG = 30  # letters; a longer text may be broken into lines
MOST_ROWS = 3000  # of a CSV; the page says what it leaves out


@dataclass(frozen=True)
class Entry:
    """One entry.

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


def summary_tables(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, PageTable]]:
    """Per benchmark its title, its runs, and the summary of its cells.

    A cell none of whose runs ended well is a row too, with n = 0.
    """
    best = {metric: best_cells(runs, metric) for metric in SHOWN}
    order = {method: i for i, method in enumerate(LABELS)}
    for (benchmark, dataset, scenario), group in runs.groupby(schemas.CELL[:3], sort=False):
        varied = statistics.varied_settings(group)
        cells = sorted(
            (cell for _, cell in group.groupby("config_hash")),
            key=lambda cell: (order[cell["method"].iloc[0]], cell["ewc_lambda"].iloc[0]),
        )
        title = f"{benchmark} {dataset}, {scenario}-incremental"
        columns = ["method", "Fisher", "λ", *varied, *SUMMARY_METRICS, "n", "lost", "seconds"]
        numeric = [name not in ("method", "Fisher") and name not in varied for name in columns]
        rows = [_summary_row(cell, varied, best) for cell in cells]
        yield title, group, PageTable("Mean ± 95 % interval", _words(columns), numeric, rows)


def _summary_row(
    cell: pd.DataFrame, varied: Sequence[str], best: dict[str, set[str]]
) -> list[Entry]:
    first, done = cell.iloc[0], cell[cell["status"] == "ok"]
    row = [_entry(LABELS[first["method"]]), _entry(first["fisher_type"])]
    row += [_lambda(first["ewc_lambda"]), *(_entry(first[name]) for name in varied)]
    for metric in SUMMARY_METRICS:
        is_best = first["config_hash"] in best.get(metric, ())
        row.append(_interval(done[metric].dropna().to_numpy(float), is_best))
    lost = len(cell) - len(done)
    seconds = (done["train_s"] + done["fisher_s"] + done["eval_s"]).mean()
    row += [_entry(len(done)), Entry(str(lost or "–"), str(lost), "bad" if lost else "")]
    return [*row, Entry(f"{seconds:.1f}" if pd.notna(seconds) else "–", _key(seconds))]


def _lambda(value: float) -> Entry:
    return Entry("" if pd.isna(value) else f"{value:g}", _key(value))


def _interval(values: np.ndarray[Any, Any], is_best: bool) -> Entry:
    if not len(values):
        return Entry("–", "")
    found = statistics.interval(values)
    text = interval_text(found["mean"], found["ci_high"])
    return Entry(_signed(text), repr(found["mean"]), "best" if is_best else "")


def trouble_table(runs: pd.DataFrame) -> PageTable | None:
    """The runs that did not end well, and why; None if all did."""
    lost = runs[runs["status"] != "ok"]
    if lost.empty:
        return None
    return from_frame(lost[["run_id", "status", "reason"]], "Runs that did not end well")


def parity_page_table(parity: pd.DataFrame) -> PageTable:
    """The comparisons with the built-in, with their verdicts."""
    words = parity[["benchmark", "dataset", "scenario"]].agg(" ".join, axis=1)
    frame = parity.drop(columns=["benchmark", "dataset", "scenario"])
    frame.insert(0, "verdict", frame.pop("verdict"))
    frame.insert(0, "stream", words)
    bounds = zip(frame.pop("ci_low"), frame.pop("ci_high"), strict=True)
    frame["95 % interval"] = [_bounds(low, high) for low, high in bounds]
    return from_frame(frame, "Ours compared with Avalanche's built-in EWC")


def _bounds(low: float, high: float) -> str | None:
    return None if pd.isna(low) else _signed(f"[{low:+.4f}, {high:+.4f}]")


def runs_table(runs: pd.DataFrame) -> PageTable:
    """Every run with what it measured and those settings that are not the same in all."""
    names = [n for n in schemas.SETTING_NAMES if n in runs]
    varied = [name for name in names if runs[name].nunique(dropna=False) > 1]
    measured = [*METRICS, "train_s", "fisher_s", "eval_s", "peak_rss_mb", "penalty_state_mb"]
    return from_frame(runs[["run_id", "status", *varied, *measured]], "All runs")


def from_frame(frame: pd.DataFrame, title: str) -> PageTable:
    """Any table, with four digits shown and all of them sorted by."""
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
        name.replace("_", " "): _entry(runs[name].iloc[0]).text
        for name in names
        if runs[name].nunique(dropna=False) == 1 and pd.notna(runs[name].iloc[0])
    }


def _words(names: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _entry(value: Any, column: str = "") -> Entry:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return Entry("", "")
    if isinstance(value, bool | np.bool_):
        return Entry("yes" if value else "no", str(int(value)))
    if isinstance(value, float | np.floating):
        return Entry(_signed(f"{value:.4g}"), _key(float(value)))
    text = str(value)
    mark = text if column in ("verdict", "status") else "long" if len(text) > LONG else ""
    return Entry(text, text, mark)


def _signed(number: str) -> str:
    """With a minus sign as printers have it."""
    return re.sub(r"(?<!e)-", "−", number)


def _key(value: float) -> str:
    return "" if np.isnan(value) else repr(float(value))

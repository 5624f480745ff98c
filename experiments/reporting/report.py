"""What a job leaves behind when its runs are done: tables, plots, and words on the terminal."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from experiments.data.sources import DataSource
from experiments.reporting.comparison import parity_table
from experiments.reporting.figures.accuracy import LABELS, plot_all
from experiments.results import tables
from experiments.results.store import Store
from experiments.settings.run import Job, RunSettings, Tune

SHOWN = ("average_accuracy", "forgetting", "learning_accuracy")
PACKAGES = ("ewc-plugin", "avalanche-lib", "torch", "torchvision", "numpy", "pandas", "scipy")


def write_report(
    job: Job,
    store: Store,
    cells: Sequence[RunSettings],
    source: DataSource,
    numerical: Sequence[dict[str, Any]],
    console: Console,
) -> None:
    """Writes every table and plot of the folder, and prints the summary and the comparison.

    Args:
        job: The command that was run.
        store: The folder's results.
        cells: What the job consisted of.
        source: Where the images came from.
        numerical: Rows of the numerical checks against the built-in; none if nothing is compared.
        console: Where to print.
    """
    with store.lock:  # another sweep may be writing to the folder as well
        accuracy, runs = store.rebuild()
        summary = tables.summarise(runs)
        tables.write(summary, store.folder, tables.SUMMARY)
        write_environment(store.folder, source)
        files = plot_all(accuracy, runs, store.folder / "plots")
        parity = parity_table(runs, numerical) if numerical else None
        if parity is not None:
            tables.write(parity, store.folder, tables.PARITY)
    mine = {cell.config_hash for cell in cells}
    told = tables.distinctions(runs[runs["config_hash"].isin(mine)])
    print_summary(summary[summary["config_hash"].isin(mine)], console, told)
    if isinstance(job, Tune):
        print_chosen(summary, console)
    if parity is not None:
        console.print("Compared with Avalanche's built-in EWC:")
        print_parity(parity, console)
    troubles = Console(stderr=True) if job.quiet else console
    print_troubles(runs[runs["config_hash"].isin(mine)], troubles)
    console.print(
        f"Tables: {store.folder}/*.csv   Plots: {store.folder}/plots ({len(files)} files)   "
        f"As a page: python -m experiments report {store.folder}",
        highlight=False,
        soft_wrap=True,
    )


def write_environment(folder: Path, source: DataSource | None) -> None:
    """Writes what the numbers were computed with to `environment.json`; None: data were drawn."""
    environment = {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m experiments", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": _git("status", "--porcelain", "--", "ewc_plugin", "experiments")
        != "",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads_per_run": 1,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "dataset": source and source.name,
        "dataset_checksum_md5": source and source.checksum,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    tables.replace_file(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


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
            Cell(
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


def print_summary(
    summary: pd.DataFrame, console: Console, told: Mapping[str, str] | None = None
) -> None:
    """Prints mean and 95 % interval of the main metrics, a table per benchmark.

    Args:
        summary: Rows of `summary.csv`.
        console: Where to print.
        told: Of `tables.distinctions`.
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


def chosen_lambdas(summary: pd.DataFrame) -> pd.DataFrame:
    """Per dataset, benchmark, scenario and method the lambda of the best mean average accuracy.

    Args:
        summary: Rows of the `summary.csv` of a tuning run, measured on validation data.

    Returns:
        The chosen cells' rows of the metric `average_accuracy`; of equals the smallest lambda.
    """
    rows = summary[(summary["metric"] == "average_accuracy") & summary["ewc_lambda"].notna()]
    rows = rows.sort_values(["mean", "ewc_lambda"], ascending=[False, True])
    return rows.groupby(["benchmark", "dataset", "scenario", "method"], as_index=False).first()


def print_chosen(summary: pd.DataFrame, console: Console) -> None:
    """Prints what `CHOSEN_LAMBDA` in the settings should say."""
    console.print("Chosen on validation data, for CHOSEN_LAMBDA in experiments/settings.py:")
    for row in chosen_lambdas(summary).itertuples():
        key = (row.benchmark, row.dataset, row.scenario, row.method)
        console.print(f"    {key}: {row.ewc_lambda:g},  # {row.mean:.4f}", highlight=False)


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


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""The main job: find data, make the runs, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.data.sources import DataSource
from experiments.reporting.figures.folder import plot_all
from experiments.reporting.terminal import (
    print_checks,
    print_comparisons,
    print_summary,
    print_troubles,
)
from experiments.results import schemas, statistics, tables
from experiments.results.provenance import mixed_code, provenance
from experiments.results.store import PLOTS, Store
from experiments.settings.grids import Job
from experiments.settings.run import PENALISED, STREAM, RunSettings
from experiments.sweeps import exit_status
from experiments.sweeps.jobs import make_runs, prepare, write_run_tables
from experiments.sweeps.queue import Task


def run_job(job: Job, console: Console) -> None:
    """Run a job's missing runs, then write its tables, plots and summary."""
    store, cells, source = prepare(job, console)
    checks = [Task(cell, _numerical_checks) for cell in checked_cells(job, cells)]
    numerical = make_runs(job, store, cells, source, console, checks)
    write_report(job, store, cells, source, numerical, console)


def _numerical_checks(cell: RunSettings, source: DataSource) -> list[dict[str, Any]]:
    """Compare our importances and penalties with Avalanche's on a cell's stream."""
    from experiments.studies.parity.importances import numerical_checks  # it imports Avalanche

    return [{**row, **provenance()} for row in numerical_checks(cell, source)]


def checked_cells(job: Job, cells: Sequence[RunSettings]) -> list[RunSettings]:
    """One cell per benchmark, dataset and scenario, if the job compares both EWC methods.

    The checks are of our own networks that the plain loss and head train.
    """
    cells = [cell for cell in cells if _as_checked(cell)]
    if not (job.compares and {cell.method for cell in cells} >= set(PENALISED)):
        return []
    return list({tuple(getattr(cell, name) for name in STREAM): cell for cell in cells}.values())


def _as_checked(cell: RunSettings) -> bool:
    own = cell.benchmark_sha256 or cell.model_sha256
    return cell.loss_classes is None and cell.head is None and not own


def write_report(
    job: Job,
    store: Store,
    cells: Sequence[RunSettings],
    source: DataSource,
    numerical: Sequence[dict[str, Any]],
    console: Console,
) -> None:
    """Write every table and plot of the folder, and print the summary and the comparison."""
    with store.lock:  # another sweep may be writing to the folder as well
        accuracy, runs, summary = write_run_tables(store, source)
        files = plot_all(accuracy, runs, store.folder / PLOTS)
        comparisons = statistics.paired_differences(runs)
        if job.compares and len(comparisons):
            tables.write(comparisons, store.folder, schemas.COMPARISONS)
        if numerical:
            rows = sorted(numerical, key=lambda row: [row[name] for name in STREAM])
            checks = tables.write_rows(rows, store.folder, schemas.CHECKS)
    mine = {cell.config_hash for cell in cells}
    print_summary(runs[runs["config_hash"].isin(mine)], console)
    if job.compares:
        print_comparisons(comparisons[comparisons["config_hash"].isin(mine)], console)
    if numerical:
        print_checks(checks, console)
    exit_status.note(runs[runs["config_hash"].isin(mine)], [cell.run_id for cell in cells])
    if mixed := mixed_code(runs):
        console.print(f"NOTE: {mixed}", style="bold yellow", soft_wrap=True)
    troubles = Console(stderr=True) if job.quiet else console
    print_troubles(runs[runs["config_hash"].isin(mine)], troubles)
    console.print(
        f"Tables: {store.folder}/*.csv   Plots: {store.folder}/plots ({len(files)} files)   "
        f"As a page: python -m experiments report {store.folder}",
        highlight=False,
        soft_wrap=True,
    )

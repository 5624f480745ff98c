"""Find a job's data and execute its missing runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from experiments.data.sources import DataSource, find_data, own_data
from experiments.results import schemas, statistics, tables
from experiments.results.environment import keep_environment
from experiments.results.store import Store, read_results
from experiments.settings.grids import Job
from experiments.settings.run import RunSettings
from experiments.sweeps import exit_status
from experiments.sweeps.dry_run import print_plan
from experiments.sweeps.queue import Task
from experiments.sweeps.sweep import sweep
from experiments.training.loggers import logs_of


def prepare(job: Job, console: Console) -> tuple[Store, list[RunSettings], DataSource]:
    """Find a job's data and open its folder.

    Args:
        job: The command.
        console: Where notes are printed, and the plan of a dry run.

    Returns:
        Where the results go, the settings of the runs, and the data.

    Raises:
        SystemExit: It is a dry run, which is done.
    """
    if job.needs_images:
        source = replace(find_data(job.dataset, job.data_root), files=job.own_files)
    else:
        source = own_data(job.own_files)
    for note in filter(None, (source.note, job.left_out)):
        console.print(f"NOTE: {note}", style="bold yellow", markup=False, soft_wrap=True)
    cells = list(job.cells(source.name))
    if source.files:
        from experiments.training.own_check import check_own  # it imports Avalanche

        check_own(cells, source)
    if job.dry_run:
        show_plan(job, cells, console)
        raise SystemExit(0)
    errors = Console(stderr=True)

    def warn(line: str) -> None:
        errors.print(f"NOTE: {line}", markup=False, highlight=False, soft_wrap=True)

    return Store(job.folder, warn), cells, source


def show_plan(job: Job, cells: Sequence[RunSettings], console: Console) -> None:
    """Print which runs of a job exist and which would run."""
    print_plan(cells, job.folder, job.processes, job.force, console)


def make_runs(
    job: Job,
    store: Store,
    cells: list[RunSettings],
    source: DataSource,
    console: Console,
    checks: Sequence[Task] = (),
) -> list[dict[str, Any]]:
    """Make the missing runs and store them; return the rows of the numerical `checks`."""
    return sweep(
        cells,
        source,
        store,
        processes=job.processes,
        console=console,
        force=job.force,
        checks=checks,
        scheduler=job.scheduler,
        checkpoint=job.checkpoint,
        mix_code=job.mix_code,
        logs=logs_of(store.folder, tensorboard=job.tensorboard, wandb=job.wandb),
    )


def write_run_tables(
    store: Store, source: DataSource
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rewrite a folder's run tables, its summary and its `environment.json`; hold its lock."""
    accuracy, runs = store.write_tables()
    summary = statistics.summarise(runs)
    tables.write(summary, store.folder, schemas.SUMMARY)
    keep_environment(store.folder, source, store.n_added)
    return accuracy, runs, summary


def completed_runs(job: Job, console: Console, *, make: bool = True) -> tuple[pd.DataFrame, Path]:
    """Make the missing runs of a job and rewrite the tables of its folder.

    Args:
        job: Its `cells` are wanted.
        console: Where progress is shown.
        make: Whether to make runs; else the tables are those of the runs that are there.

    Returns:
        The job's rows of `runs.csv`, and the folder.

    Raises:
        ValueError: No run is to be made and the folder has none.
    """
    if not make and read_results(job.folder)[1].empty:
        raise ValueError(f"`tables_only` needs runs, got {job.folder} without any: leave it out.")
    store, cells, source = prepare(job, console)
    if make:
        make_runs(job, store, cells, source, console)
    with store.lock:
        _, runs, _ = write_run_tables(store, source)
    mine = runs[runs["run_id"].isin([cell.run_id for cell in cells])]
    exit_status.note(mine, [cell.run_id for cell in cells] if make else ())
    return mine, store.folder

"""The runs of a job: data found, missing runs made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from experiments.data.sources import DataSource, find_data
from experiments.results import schemas, statistics, tables
from experiments.results.environment import write_environment
from experiments.results.store import Store
from experiments.settings.grids import Job
from experiments.settings.run import RunSettings
from experiments.sweeps.dry_run import print_plan
from experiments.sweeps.queue import Task
from experiments.sweeps.sweep import sweep
from experiments.training.loggers import logs_of


def run_cells(
    job: Job, console: Console, *, make: bool = True
) -> tuple[Store, list[RunSettings], DataSource]:
    """Makes the runs of a job that are not there yet.

    Args:
        job: Whose `cells` are wanted.
        console: Where progress is shown.
        make: Whether to; else what is there has to do.

    Returns:
        Where the results are, the cells, and what they ran on.
    """
    store, cells, source = prepared(job, console)
    if make:
        make_runs(job, store, cells, source, [], console)
    return store, cells, source


def prepared(job: Job, console: Console) -> tuple[Store, list[RunSettings], DataSource]:
    """Where the results go, what to run and on what; after a dry run there is nothing to do."""
    source = find_data(job.dataset, job.data_root)
    if source.note:
        console.print(f"NOTE: {source.note}", style="bold yellow", markup=False, soft_wrap=True)
    if job.left_out:
        console.print(f"NOTE: {job.left_out}", style="bold yellow", soft_wrap=True)
    cells = list(job.cells(source.name))
    if job.dry_run:
        show_plan(job, cells, console)
        raise SystemExit(0)
    return Store(job.folder), cells, source


def show_plan(job: Job, cells: Sequence[RunSettings], console: Console) -> None:
    """What would become of each cell of a job."""
    print_plan(cells, job.folder, job.jobs, job.force, console)


def make_runs(
    job: Job,
    store: Store,
    cells: list[RunSettings],
    source: DataSource,
    checks: Sequence[Task],
    console: Console,
) -> list[dict[str, Any]]:
    """Makes the missing runs and stores them; returns the rows of the numerical `checks`."""
    return sweep(
        cells,
        source,
        store,
        jobs=job.jobs,
        console=console,
        force=job.force,
        checks=checks,
        scheduler=job.scheduler,
        checkpoint=job.checkpoint,
        logs=logs_of(store.folder, tensorboard=job.tensorboard, wandb=job.wandb),
    )


def completed_runs(job: Job, console: Console, *, make: bool = True) -> tuple[pd.DataFrame, Path]:
    """Makes the runs that are not there yet and rewrites the tables of their folder.

    Args:
        job: Whose `cells` are wanted.
        console: Where progress is shown.
        make: Whether to; else the tables are those of the runs that are there.

    Returns:
        The job's rows of `runs.csv`, and the folder.
    """
    store, cells, source = run_cells(job, console, make=make)
    with store.lock:
        _, runs = store.rebuild()
        tables.write(statistics.summarise(runs), store.folder, schemas.SUMMARY)
        write_environment(store.folder, source)
    return runs[runs["run_id"].isin([cell.run_id for cell in cells])], store.folder

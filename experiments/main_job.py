"""A command from data to report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.data.sources import DataSource, find_data
from experiments.reporting.comparison import checked_cells
from experiments.reporting.report import write_report
from experiments.results.store import Store
from experiments.settings.run import Job, RunSettings
from experiments.sweeps.dry_run import print_plan
from experiments.sweeps.sweep import sweep
from experiments.training.loggers import logs_of


def run_job(job: Job, console: Console) -> None:
    """Makes the runs of a job that are not there yet, then its tables, plots and summary."""
    store, cells, source = _prepare(job, console)
    checks = checked_cells(job, cells)
    numerical = _sweep(job, store, cells, source, checks, console)
    write_report(job, store, cells, source, numerical, console)


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
    store, cells, source = _prepare(job, console)
    if make:
        _sweep(job, store, cells, source, [], console)
    return store, cells, source


def _prepare(job: Job, console: Console) -> tuple[Store, list[RunSettings], DataSource]:
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


def _sweep(
    job: Job,
    store: Store,
    cells: list[RunSettings],
    source: DataSource,
    checks: list[RunSettings],
    console: Console,
) -> list[dict[str, Any]]:
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

"""A command from data to report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from experiments.data import DataSource, find_data
from experiments.report import write_report
from experiments.settings import Job, RunSettings
from experiments.store import Store
from experiments.sweep import sweep


def run_job(job: Job, console: Console) -> None:
    """Makes the runs of a job that are not there yet, then its tables, plots and summary."""
    store, cells, source = run_cells(job, console)
    write_report(job, store, cells, source, console)


def run_cells(job: Job, console: Console) -> tuple[Store, list[RunSettings], DataSource]:
    """Makes the runs of a job that are not there yet.

    Args:
        job: Whose `cells` are wanted.
        console: Where progress is shown.

    Returns:
        Where the results are, the cells, and what they ran on.
    """
    source = find_data(job.dataset, job.data_root)
    if source.note:
        console.print(f"NOTE: {source.note}", style="bold yellow", markup=False, soft_wrap=True)
    cells = list(job.cells(source.name))
    store = Store(Path(job.out or f"runs/{job.name}"))
    sweep(cells, source, store, jobs=job.jobs, console=console, force=job.force)
    return store, cells, source

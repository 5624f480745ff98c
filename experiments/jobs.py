"""A command from data to report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from experiments.data import find_data
from experiments.report import write_report
from experiments.settings import Job
from experiments.store import Store
from experiments.sweep import sweep


def run_job(job: Job, console: Console) -> None:
    """Makes the runs of a job that are not there yet, then its tables, plots and summary."""
    source = find_data(job.dataset, job.data_root)
    if source.note:
        console.print(f"NOTE: {source.note}", style="bold yellow", markup=False, soft_wrap=True)
    cells = list(job.cells(source.name))
    store = Store(Path(job.out or f"runs/{job.name}"))
    sweep(cells, source, store, jobs=job.jobs, console=console, force=job.force)
    write_report(job, store, cells, source, console)

"""Helper for studies made of runs: make missing runs, then write their tables."""

from __future__ import annotations

import pandas as pd
from rich.console import Console

from experiments.data.sources import find_data
from experiments.reporting.study_output import StudyOutput
from experiments.settings.grids import Job
from experiments.sweeps.jobs import completed_runs


def completed_study(job: Job, *, make: bool = True) -> tuple[pd.DataFrame, StudyOutput]:
    """Make the runs of a job that are not there yet, and write the tables of their folder.

    Args:
        job: Whose `cells` are wanted.
        make: Whether to make missing runs; if False, use the existing ones.

    Returns:
        The job's rows of `runs.csv`, and the output that the study adds to.
    """
    console = Console(quiet=job.quiet)
    runs, folder = completed_runs(job, console, make=make)
    return runs, StudyOutput(folder, find_data(job.dataset, job.data_root), console)

"""What the sweeps over penalty strengths share: run the cells, keep the tables, draw the curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from rich.console import Console

from experiments import main_job as jobs
from experiments.reporting.report import write_environment
from experiments.results import tables
from experiments.results.tables import interval
from experiments.settings.run import Job


def run_cells(job: Job, console: Console, *, make: bool = True) -> tuple[pd.DataFrame, Path]:
    """Makes the runs that are not there yet and rewrites the tables of their folder.

    Args:
        job: Whose `cells` are wanted.
        console: Where progress is shown.
        make: Whether to; else the tables are those of the runs that are there.

    Returns:
        The job's rows of `runs.csv`, and the folder.
    """
    store, cells, source = jobs.run_cells(job, console, make=make)
    with store.lock:
        _, runs = store.rebuild()
        tables.write(tables.summarise(runs), store.folder, tables.SUMMARY)
        write_environment(store.folder, source)
    return runs[runs["run_id"].isin([cell.run_id for cell in cells])], store.folder


def by_lambda(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean and 95 % interval of `metric` per lambda, and how many of the runs diverged.

    Args:
        runs: Rows of `runs.csv` that differ in lambda and seed alone.
        metric: A column of theirs.

    Returns:
        Columns `ewc_lambda`, `n` (complete runs), `diverged`, `mean`, `std`, `ci_low`, `ci_high`;
        NaN where no run is complete.
    """
    rows = []
    for ewc_lambda, group in runs.groupby("ewc_lambda", dropna=False):
        done = group.loc[group["status"] == "ok", metric].to_numpy(dtype=float)
        nothing = {"n": 0} | dict.fromkeys(("mean", "std", "ci_low", "ci_high"), np.nan)
        rows.append({
            "ewc_lambda": ewc_lambda,
            "diverged": int((group["status"] == "diverged").sum()),
            **(interval(done) if len(done) else nothing),
        })
    return pd.DataFrame(rows)


def draw_curve(axis: Axes, curve: pd.DataFrame, label: str, colour: str, line: str = "-") -> None:
    """One curve of `by_lambda` with its band; crosses on the floor where all runs diverged."""
    axis.plot(curve["ewc_lambda"], curve["mean"], line, color=colour, marker="o", label=label)
    axis.fill_between(
        curve["ewc_lambda"], curve["ci_low"], curve["ci_high"], color=colour, alpha=0.15, lw=0
    )
    lost = curve[curve["n"] == 0]
    if len(lost):
        floor = np.full(len(lost), axis.get_ylim()[0])
        axis.plot(lost["ewc_lambda"], floor, "x", color=colour, label=f"{label}: diverged")

"""The runs of a command, and an estimate of their time, without making them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from experiments.reporting.labels import run_labels
from experiments.results.store import read_results
from experiments.settings.run import RunSettings
from experiments.settings.unset import given
from experiments.sweeps.queue import work

COMMITTED = Path(__file__).parents[2] / "results" / "main"
# A cell's time is that of runs which share these with it, scaled by their work.
ALIKE = (
    ["benchmark", "dataset", "method", "model", "device", "data_path"],
    ["dataset", "model", "device", "data_path"],
)


def print_plan(
    cells: Sequence[RunSettings], folder: Path, processes: int, force: bool, console: Console
) -> None:
    """List the runs: which exist, which would run, and for about how long."""
    _, runs = read_results(folder)
    status = dict(zip(runs["run_id"], runs["status"], strict=True))
    labels = run_labels(cells)
    missing = [c for c in cells if force or status.get(c.run_id) not in ("ok", "diverged")]
    for cell in cells:
        had = status.get(cell.run_id)
        line = f"exists ({had})"
        if cell in missing:
            estimate = estimated_seconds(cell, runs)
            line = "would run" + (f", about {estimate:.0f} s" if estimate else "")
            line += f" (was {had})" if had else ""
        text = f"{labels[cell.run_id]} ({cell.run_id}): {line}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    known = expected_time(missing, runs, processes) if missing else "none"
    console.print(
        f"{len(missing)} of {len(cells)} runs would run, {len(cells) - len(missing)} exist. "
        f"Time: {known or 'unknown, since no finished run is like these'}.",
        highlight=False,
        soft_wrap=True,
    )


def expected_time(cells: Sequence[RunSettings], runs: pd.DataFrame, processes: int) -> str:
    """How long runs will take, in words, from those of the folder or else the committed ones.

    Args:
        cells: That will run.
        runs: Rows of the folder's `runs.csv`.
        processes: Runs at the same time.

    Returns:
        Empty where no run is like any of them.
    """
    for known, whose in ((runs, ""), (read_results(COMMITTED)[1], " on the machine of results/")):
        seconds = [s for cell in cells if (s := estimated_seconds(cell, known)) is not None]
        if seconds:
            total = sum(seconds) / len(seconds) * len(cells) / min(processes, len(cells))
            return f"about {total:.0f} s of training{whose}, {processes} at a time, plus start-up"
    return ""


def estimated_seconds(cell: RunSettings, runs: pd.DataFrame) -> float | None:
    """From the complete runs that are like it; None if there are none."""
    done = runs[runs["status"] == "ok"]
    seconds = done[["train_s", "fisher_s", "eval_s"]].sum(axis=1)
    same = done["config_hash"] == cell.config_hash
    if same.any():
        return float(seconds[same].mean())
    for names in ALIKE:
        alike = done[names].eq([getattr(cell, name) for name in names]).all(axis=1)
        if alike.any():
            works = [_work(row) for row in done[alike].to_dict("records")]
            return float(seconds[alike].sum()) / sum(works) * work(cell)
    return None


def _work(record: dict[str, object]) -> float:
    return work(RunSettings(**given(record)))

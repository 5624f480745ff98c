"""What a command would run, and about how long that would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from experiments.results.store import read_results
from experiments.settings.run import RunSettings
from experiments.sweeps.queue import work

# A cell's time is that of runs which share these with it, scaled by their work.
ALIKE = (
    ["benchmark", "dataset", "method", "model", "device", "data_path"],
    ["dataset", "model", "device", "data_path"],
)


def print_plan(
    cells: Sequence[RunSettings], folder: Path, processes: int, force: bool, console: Console
) -> None:
    """Lists the cells with what would become of each.

    Args:
        cells: Of the command.
        folder: Where its results are, or would be; it is only read.
        processes: Runs at the same time.
        force: Whether what exists is repeated.
        console: Where to print.
    """
    _, runs = read_results(folder)
    status = dict(zip(runs["run_id"], runs["status"], strict=True))
    seconds: list[float | None] = []
    n_kept = 0
    for cell in cells:
        had = status.get(cell.run_id)
        if had in ("ok", "diverged") and not force:
            n_kept += 1
            line = f"exists ({had})"
        else:
            estimate = estimated_seconds(cell, runs)
            seconds.append(estimate)
            line = "would run" + (f", about {estimate:.0f} s" if estimate else "")
            line += f" (was {had})" if had else ""
        console.print(f"{cell.run_id}  {line}", markup=False, highlight=False, soft_wrap=True)
    known = [s for s in seconds if s is not None]
    duration = "an unknown time: no such run is in the folder yet"
    if known:
        total = sum(known) / len(known) * len(seconds) / min(processes, len(seconds))
        duration = f"about {total:.0f} s of training, {processes} at a time, start-up not counted"
    if not seconds:
        duration = "no time"
    console.print(
        f"{len(seconds)} of {len(cells)} runs would run, {n_kept} exist: {duration}.",
        highlight=False,
        soft_wrap=True,
    )


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
    names = RunSettings.__dataclass_fields__
    known = {k: None if pd.isna(v) else v for k, v in record.items() if k in names}  # type: ignore[call-overload]
    return work(RunSettings(**known))  # type: ignore[arg-type]

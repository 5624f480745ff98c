"""Seconds per run and per sweep: ours through both data paths, Avalanche's EWC, and a plain loop.

The runs are interleaved in one process with one thread; ours must have the same accuracies, to the
last bit, on every path. Then the same grid of runs is swept with one process and with several.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from experiments.data import DataSource, find_data
from experiments.jobs import run_cells
from experiments.plain_loop import Accuracies, Timed, run_plainly
from experiments.report import write_environment
from experiments.run import run as run_once
from experiments.settings import Dataset, PermutedMnist, RunSettings
from experiments.tables import replace_file

OURS_FAST, BUILTIN, PLAIN = "ours, fast path", "built-in, classic path", "plain PyTorch loop"


@dataclass(frozen=True)
class SweepSpeed:
    """Permuted MNIST with EWC, timed as single runs and as a grid."""

    rounds: int = 2
    """Times each run is made, in turn."""
    experiences: int = 5
    """Experiences per run."""
    epochs: int = 1
    """Passes over the data of each."""
    batch_size: int | None = None
    """Samples per training mini-batch. Unset: 256 on MNIST, 128 on the digits."""
    jobs: tuple[int, ...] = (1, 2)
    """Numbers of processes that the grid is swept with, each compared with the first."""
    seeds: int = 4
    """Runs in that grid. 0: no grid."""
    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw. Unset: $EWC_DATA_ROOT, else the cache folder."""
    out: str = "runs/sweep-speed"
    """Folder of the tables."""

    def __post_init__(self) -> None:
        for name in ("rounds", "experiences", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.seeds < 0 or not self.jobs or min(self.jobs) < 1:
            raise ValueError(
                "`seeds` must be >= 0 and `jobs` one or more numbers >= 1, "
                f"got {self.seeds} and {self.jobs}."
            )


def run(settings: SweepSpeed) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Makes the runs and writes `sweep_speed.csv` and `sweep_scaling.csv`.

    Args:
        settings: What to run.

    Returns:
        A row per way of making the run, and a row per number of processes.
    """
    source, folder = find_data(settings.dataset, settings.data_root), Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console()
    runs = time_runs(settings, source)
    replace_file(folder / "sweep_speed.csv", runs.to_csv(index=False))
    console.print(runs.to_string(index=False, float_format="%.4g"), highlight=False, soft_wrap=True)
    scaling = time_sweeps(settings, source, console) if settings.seeds else pd.DataFrame()
    if len(scaling):
        replace_file(folder / "sweep_scaling.csv", scaling.to_csv(index=False))
        console.print(
            scaling.to_string(index=False, float_format="%.4g"), highlight=False, soft_wrap=True
        )
    write_environment(folder, source)
    return runs, scaling


def _grid(settings: SweepSpeed, **options: object) -> PermutedMnist:
    fields = {
        "experiences": settings.experiences,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "data_root": settings.data_root,
        **options,
    }
    return PermutedMnist(**fields)  # type: ignore[arg-type]


def time_runs(settings: SweepSpeed, source: DataSource) -> pd.DataFrame:
    """The same run in each way, in turn.

    Args:
        settings: Sizes.
        source: Where the images are.

    Returns:
        Per way the median seconds of a run with their smallest and largest; the median, smallest
        and largest of the rounds' ratios to ours through the fast path; and whether its accuracies
        are all those of ours, which is no question of the built-in, another EWC.
    """
    theirs, ours = _grid(settings, methods=("avalanche-ewc", "ewc"), seeds=(0,)).cells(source.name)
    ways: dict[str, Callable[[int], Timed]] = {
        OURS_FAST: lambda epochs: _through_avalanche(replace(ours, epochs=epochs), source),
        PLAIN: lambda epochs: run_plainly(replace(ours, epochs=epochs), source),
        "ours, classic path": lambda epochs: _through_avalanche(
            replace(ours, epochs=epochs, data_path="classic"), source
        ),
        BUILTIN: lambda epochs: _through_avalanche(
            replace(theirs, epochs=epochs, data_path="classic"), source
        ),
    }
    ways[OURS_FAST](1)  # warms up, and reads the images once for all
    measured: dict[str, list[Timed]] = {name: [] for name in ways}
    for _ in range(settings.rounds):
        for name, make in ways.items():
            measured[name].append(make(settings.epochs))
    reference = measured[OURS_FAST]
    return pd.DataFrame([
        {
            "run": name,
            "dataset": source.name,
            "n_experiences": settings.experiences,
            "epochs": settings.epochs,
            "batch_size": ours.batch_size,
            "rounds": settings.rounds,
            **_spread("seconds", [timed.seconds for timed in found]),
            **_spread(
                "ratio", [a.seconds / b.seconds for a, b in zip(found, reference, strict=True)]
            ),
            "average_accuracy": float(np.mean(found[0].accuracies[-1])),
            "same_accuracies": None
            if name == BUILTIN
            else all(timed.accuracies == reference[0].accuracies for timed in found),
        }
        for name, found in measured.items()
    ])


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {
        name: float(np.median(values)),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def _through_avalanche(cell: RunSettings, source: DataSource) -> Timed:
    result = run_once(cell, source)
    record = result.record
    if record["status"] != "ok":
        raise ValueError(f"a run to be timed {record['status']}: {record['reason']}")
    accuracies: Accuracies = [[] for _ in range(cell.n_experiences + 1)]
    for row in result.rows:  # tested on experience 0, 1, ... after each
        accuracies[row["train_exp"] + 1].append(row["accuracy"])
    return Timed(sum(record[part] for part in ("train_s", "fisher_s", "eval_s")), accuracies)


def time_sweeps(settings: SweepSpeed, source: DataSource, console: Console) -> pd.DataFrame:
    """The same grid with every number of processes, from nothing to its tables.

    Args:
        settings: Sizes.
        source: Where the images are.
        console: Where progress is shown.

    Returns:
        Per number of processes the seconds of the sweep, the start of the processes included; the
        efficiency, first jobs · first seconds / (jobs · seconds); and whether the accuracies are
        those of the first.
    """
    rows: list[dict[str, object]] = []
    first: tuple[float, pd.DataFrame] | None = None
    for jobs in settings.jobs:
        with tempfile.TemporaryDirectory() as out:
            grid = _grid(
                settings,
                methods=("ewc",),
                seeds=tuple(range(settings.seeds)),
                jobs=jobs,
                out=out,
                dataset=source.name,
            )
            start = time.perf_counter()
            store, cells, _ = run_cells(grid, console)
            accuracy, _ = store.rebuild()
            seconds = time.perf_counter() - start
        first = first or (jobs * seconds, accuracy)
        rows.append({
            "jobs": jobs,
            "runs": len(cells),
            "seconds": seconds,
            "seconds_per_run": seconds / len(cells),
            "efficiency": first[0] / (jobs * seconds),
            "same_accuracies": accuracy.equals(first[1]),
        })
    return pd.DataFrame(rows)

"""Seconds per run and per sweep: ours through both data paths, Avalanche's EWC, and a plain loop.

The runs are interleaved in one process with one thread; ours must have the same accuracies, to the
last bit, on every path. Then the same grid of runs is swept with one process and with several, in
turn, each time as a command of its own.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from rich.console import Console

from experiments.data.sources import DataSource
from experiments.reporting.study_output import columns, study_on_images
from experiments.results.metrics import accuracy_matrix
from experiments.results.provenance import provenance, provenance_of
from experiments.results.schemas import PROVENANCE
from experiments.results.tables import replace_file
from experiments.settings.grids import PermutedMnist
from experiments.settings.run import Dataset, RunSettings
from experiments.settings.values import Count, CountOrNone, Processes, check_values
from experiments.timing.plain_loop import Accuracies, Timed, run_plainly
from experiments.training.run import run as run_once

# Arguments of the grid's command.
_GIVEN = (
    *("methods", "seeds", "experiences", "epochs", "batch_size"),
    *("dataset", "data_root", "processes"),
)
OURS_FAST, OURS_CLASSIC = "ours, fast path", "ours, classic path"
BUILTIN, PLAIN = "avalanche-ewc, classic path", "plain PyTorch loop"


_SIZES = {
    **columns(str, "dataset"),
    **columns(
        *(int, "n_experiences", "epochs", "batch_size", "hidden_layers", "hidden_size"),
        check=pa.Check.ge(1),
    ),
}
_SECONDS = columns(float, "seconds", "seconds_min", "seconds_max", check=pa.Check.gt(0))
SWEEP_SPEED = pa.DataFrameSchema(
    {
        **columns(str, "run", unique=True),
        **_SIZES,
        **columns(int, "rounds", check=pa.Check.ge(1)),
        **_SECONDS,
        **columns(float, "ratio", "ratio_min", "ratio_max", check=pa.Check.gt(0)),
        **columns(float, "average_accuracy", check=pa.Check.in_range(0, 1)),
        **columns(object, "same_accuracies", nullable=True),
        **PROVENANCE,
    },
    strict=True,
    name="sweep_speed.csv",
)
SWEEP_SCALING = pa.DataFrameSchema(
    {
        **_SIZES,
        **columns(int, "runs", "processes", "commands", "rounds", check=pa.Check.ge(1)),
        **_SECONDS,
        **columns(float, "efficiency", "efficiency_min", "efficiency_max", check=pa.Check.gt(0)),
        **columns(bool, "same_accuracies"),
        **PROVENANCE,
    },
    unique=["processes", "commands"],
    strict=True,
    name="sweep_scaling.csv",
)


@dataclass(frozen=True)
class SweepSpeed:
    """Permuted MNIST with EWC, timed as single runs and as a grid."""

    rounds: Count = 2
    """Times each run, and each grid, is made, in turn."""
    experiences: Count = 5
    """Experiences per run."""
    epochs: Count = 1
    """Passes over the data of each."""
    batch_size: Count | None = None
    """Samples per training mini-batch. Unset: 512 on MNIST, 128 on the digits."""
    processes: tuple[Processes, ...] = (1, 2)
    """Numbers of processes that the grid is swept with, each compared with the fewest."""
    seeds: CountOrNone = 12
    """Runs in that grid. 0: no grid."""
    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw. Unset: $EWC_DATA_ROOT, else the cache folder."""
    out: str = "runs/sweep-speed"
    """Folder of the tables."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.seeds < max(self.processes) and self.seeds:
            raise ValueError(
                "`seeds` must be 0 (no grid), or enough for every process to have a run, got "
                f"{self.seeds} with `processes` {self.processes}."
            )


def run(settings: SweepSpeed) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the measurements missing from the folder; rewrite the tables after each.

    Args:
        settings: What to run.

    Returns:
        A row per way of making the run, and a row per number of processes.
    """
    torch.set_num_threads(1)
    source, output = study_on_images(settings)
    rounds = time_rounds(settings, source, output.folder / "sweep_speed_rounds.csv", output.console)
    runs = output.table(summarise_rounds(rounds), SWEEP_SPEED)
    output.show(runs, "%.4g", index=False)
    sweeps = time_sweeps(
        settings, source, output.folder / "sweep_scaling_rounds.csv", output.console
    )
    scaling = summarise_sweeps(sweeps)
    if len(scaling):
        scaling = output.table(scaling, SWEEP_SCALING)
        output.show(scaling, "%.4g", index=False)
    return runs, scaling


def _grid(settings: SweepSpeed, **options: object) -> PermutedMnist:
    fields = {
        "experiences": (settings.experiences,),
        "epochs": (settings.epochs,),
        "batch_size": (settings.batch_size,) if settings.batch_size else (),
        "data_root": settings.data_root,
        **options,
    }
    return PermutedMnist(**fields)  # type: ignore[arg-type]


def time_rounds(
    settings: SweepSpeed, source: DataSource, path: Path, console: Console
) -> pd.DataFrame:
    """The same run in each way, in turn, round by round; whole rounds are kept in `path`.

    Args:
        settings: Sizes.
        source: Where the images are.
        path: Table of the rounds; those of the same sizes that it holds are not repeated.
        console: Where progress is shown.

    Returns:
        A row per round and way: the seconds of the run, and what it came to.
    """
    theirs, ours = _grid(settings, methods=("avalanche-ewc", "ewc"), seeds=(0,)).cells(source.name)
    ways: dict[str, Callable[[], Timed]] = {
        OURS_FAST: lambda: _through_avalanche(ours, source),
        PLAIN: lambda: run_plainly(ours, source),
        OURS_CLASSIC: lambda: _through_avalanche(replace(ours, data_path="classic"), source),
        BUILTIN: lambda: _through_avalanche(replace(theirs, data_path="classic"), source),
    }
    sizes = _sizes(settings, source, ours)
    others, held = _held(path, sizes)
    if len(held) < settings.rounds * len(ways):
        _through_avalanche(replace(ours, epochs=1), source)  # warms up; reads the images for all
    for i in range(len(held) // len(ways), settings.rounds):
        rows = []
        for name, make in ways.items():
            timed = make()
            console.print(f"round {i + 1}, {name}: {timed.seconds:.1f} s", highlight=False)
            rows.append({
                **sizes,
                "round": i,
                "run": name,
                "seconds": timed.seconds,
                "average_accuracy": float(np.mean(timed.accuracies[-1])),
                "accuracies": _digest(repr(timed.accuracies).encode()),
                **provenance(Path(__file__)),
            })
        held = pd.concat([held, pd.DataFrame(rows)], ignore_index=True)
        _write(path, others, held)
    return held


def _sizes(settings: SweepSpeed, source: DataSource, cell: RunSettings) -> dict[str, object]:
    """Return the settings that must be equal for measurements to be comparable."""
    return {
        "dataset": source.name,
        "n_experiences": settings.experiences,
        "epochs": settings.epochs,
        "batch_size": cell.batch_size,
        "hidden_layers": cell.hidden_layers,
        "hidden_size": cell.hidden_size,
    }


def _held(path: Path, sizes: dict[str, object]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split a stored table's rows: those of other sizes, and those of the current sizes."""
    if not path.exists():
        return pd.DataFrame(), pd.DataFrame()
    table = pd.read_csv(path, dtype={"accuracies": str})
    same = np.logical_and.reduce([table[name] == value for name, value in sizes.items()])
    return table[~same], table[same].reset_index(drop=True)


def _write(path: Path, *parts: pd.DataFrame) -> None:
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    replace_file(path, table.to_csv(index=False))


def _digest(accuracies: bytes) -> str:
    """Ten hex digits that are the same for the same bits."""
    return hashlib.sha256(accuracies).hexdigest()[:10]


def summarise_rounds(rounds: pd.DataFrame) -> pd.DataFrame:
    """A row per way of making the run.

    Args:
        rounds: What `time_rounds` returns.

    Returns:
        The median seconds with their smallest and largest; the median, smallest and largest of the
        rounds' ratios to ours through the fast path; and whether the accuracies of every round are
        all those of ours, which is no question of Avalanche's EWC, another EWC.
    """
    unequal = ["run", "seconds", "average_accuracy", "accuracies"]
    ours = rounds[rounds["run"] == OURS_FAST].set_index("round")
    table = []
    for name, found in rounds.groupby("run", sort=False):
        found = found.set_index("round")
        table.append({
            "run": name,
            **found.drop(columns=unequal).iloc[0],
            **provenance_of(found),
            "rounds": len(found),
            **_spread("seconds", found["seconds"]),
            **_spread("ratio", found["seconds"] / ours["seconds"]),
            "average_accuracy": found["average_accuracy"].iloc[0],
            "same_accuracies": None
            if name == BUILTIN
            else bool((found["accuracies"] == ours["accuracies"].iloc[0]).all()),
        })
    return pd.DataFrame(table)


def _spread(name: str, values: pd.Series[float]) -> dict[str, float]:
    return {name: values.median(), f"{name}_min": values.min(), f"{name}_max": values.max()}


def _through_avalanche(cell: RunSettings, source: DataSource) -> Timed:
    result = run_once(cell, source)
    record = result.record
    if record["status"] != "ok":
        raise ValueError(f"a run to be timed {record['status']}: {record['reason']}")
    names = ("train_exp", "eval_exp", "accuracy")
    matrix = accuracy_matrix(*([row[name] for row in result.rows] for name in names))
    accuracies: Accuracies = matrix.tolist()
    return Timed(sum(record[part] for part in ("train_s", "fisher_s", "eval_s")), accuracies)


def time_sweeps(
    settings: SweepSpeed, source: DataSource, path: Path, console: Console
) -> pd.DataFrame:
    """The same grid with every number of processes, in turn, from nothing to its tables.

    Args:
        settings: Sizes.
        source: Where the images are.
        path: Table of the sweeps; those of the same sizes that it holds are not repeated.
        console: Where progress is shown.

    Returns:
        A row per round and way: the number of `processes`, started by one command or by as many
        `commands` that share the seeds, which is what the machine itself allows; the seconds
        from the start to the last end, imports, tables and pictures included; and the accuracies.
    """
    if not settings.seeds:
        return pd.DataFrame()
    options = {"methods": ("ewc",), "seeds": tuple(range(settings.seeds)), "dataset": source.name}
    grid = _grid(settings, **options)
    cells = list(grid.cells(source.name))
    sizes = {**_sizes(settings, source, cells[0]), "runs": len(cells)}
    others, held = _held(path, sizes)
    ways = list(dict.fromkeys(way for n in settings.processes for way in ((n, 1), (n, n))))
    for i in range(settings.rounds):
        for processes, commands in ways:
            key = {"round": i, "processes": processes, "commands": commands}
            if len(held) and held[list(key)].eq(pd.Series(key)).all(axis=1).any():
                continue
            parts = [
                replace(grid, processes=processes // commands, seeds=grid.seeds[part::commands])
                for part in range(commands)
            ]
            seconds, accuracies = _sweep(parts)
            line = f"round {i + 1}, {processes} processes of {commands} commands: {seconds:.1f} s"
            console.print(line, highlight=False)
            row = {**sizes, **key, "seconds": seconds, "accuracies": accuracies}
            row |= provenance(Path(__file__))
            held = pd.concat([held, pd.DataFrame([row])], ignore_index=True)
            _write(path, others, held)
    return held


def _sweep(grids: Sequence[PermutedMnist]) -> tuple[float, str]:
    """The seconds of commands that make these grids from nothing, at once; a digest of all R."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(part) for part in range(len(grids))]
        start = time.perf_counter()
        running = [
            subprocess.Popen([sys.executable, "-m", "experiments", *_flags(grid, out)])
            for grid, out in zip(grids, outs, strict=True)
        ]
        codes = [command.wait() for command in running]
        seconds = time.perf_counter() - start
        if any(codes):
            raise ChildProcessError(
                f"a grid to be timed ended with code {max(codes, key=abs)}; it says why above"
            )
        rows = [line for out in outs for line in (out / "accuracy.csv").read_bytes().splitlines()]
        return seconds, _digest(b"\n".join(sorted(set(rows))))


def _flags(grid: PermutedMnist, out: Path) -> list[str]:
    """What the command line of a grid says."""
    flags = ["permuted-mnist", "--out", str(out)]
    for name in _GIVEN:
        value = getattr(grid, name)
        values = value if isinstance(value, tuple) else (value,)
        if values not in ((), (None,)):
            flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def summarise_sweeps(rounds: pd.DataFrame) -> pd.DataFrame:
    """A row per way.

    Args:
        rounds: What `time_sweeps` returns.

    Returns:
        The median seconds with their smallest and largest; likewise the efficiency, round by round:
        fewest processes * their seconds / (processes * seconds); and whether the accuracies of
        every round are the same.
    """
    if not len(rounds):
        return rounds
    ways = {
        way: found.set_index("round") for way, found in rounds.groupby(["processes", "commands"])
    }
    (fewest, _), one = min(ways.items(), key=lambda item: item[0])
    return pd.DataFrame([
        {
            **found.drop(columns=["seconds", "accuracies"]).iloc[0],
            **provenance_of(found),
            "rounds": len(found),
            **_spread("seconds", found["seconds"]),
            **_spread("efficiency", fewest * one["seconds"] / (processes * found["seconds"])),
            "same_accuracies": bool((found["accuracies"] == one["accuracies"].iloc[0]).all()),
        }
        for (processes, _), found in ways.items()
    ])

"""Seconds per run: ours through both data paths, Avalanche's EWC, and a plain loop.

The runs are interleaved in one process with one thread; ours must have the same accuracies, to the
last bit, on every path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch

from experiments.data.sources import DataSource
from experiments.reporting.study_output import columns, study_on_images
from experiments.results.metrics import accuracy_matrix
from experiments.results.provenance import provenance_of
from experiments.results.schemas import PROVENANCE
from experiments.settings.grids import PermutedMnist
from experiments.settings.run import Dataset, RunSettings
from experiments.settings.values import Count, check_values
from experiments.timing.plain_loop import Accuracies, Timed, run_plainly
from experiments.training.run import run as run_once

OURS_FAST, OURS_CLASSIC = "ours, fast path", "ours, classic path"
BUILTIN, PLAIN = "avalanche-ewc, classic path", "plain PyTorch loop"


SWEEP_SPEED = pa.DataFrameSchema(
    {
        **columns(str, "run", unique=True),
        **columns(str, "dataset"),
        **columns(
            *(int, "n_experiences", "epochs", "batch_size", "hidden_layers", "hidden_size"),
            check=pa.Check.ge(1),
        ),
        **columns(int, "rounds", check=pa.Check.ge(1)),
        **columns(float, "seconds", "seconds_min", "seconds_max", check=pa.Check.gt(0)),
        **columns(float, "ratio", "ratio_min", "ratio_max", check=pa.Check.gt(0)),
        **columns(float, "average_accuracy", check=pa.Check.in_range(0, 1)),
        **columns(object, "same_accuracies", nullable=True),
        **PROVENANCE,
    },
    strict=True,
    name="sweep_speed.csv",
)


@dataclass(frozen=True)
class SweepSpeed:
    """Permuted MNIST with EWC, timed run by run."""

    rounds: Count = 2
    """Times each run is made, in turn."""
    experiences: Count = 5
    """Experiences per run."""
    epochs: Count = 1
    """Passes over the data of each."""
    batch_size: Count | None = None
    """Samples per training mini-batch. Unset: 512 on MNIST, 128 on the digits."""
    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw. Unset: $EWC_DATA_ROOT, else the cache folder."""
    out: str = "runs/sweep-speed"
    """Folder of the table."""

    def __post_init__(self) -> None:
        check_values(self)


def run(settings: SweepSpeed) -> pd.DataFrame:
    """Make the same run in each way, in turn, round by round, and write the table."""
    torch.set_num_threads(1)
    source, output = study_on_images(settings)
    theirs, ours = PermutedMnist(
        methods=("avalanche-ewc", "ewc"),
        seeds=(0,),
        experiences=(settings.experiences,),
        epochs=(settings.epochs,),
        batch_size=(settings.batch_size,) if settings.batch_size else (),
    ).cells(source.name)
    ways: dict[str, Callable[[], Timed]] = {
        OURS_FAST: lambda: _through_avalanche(ours, source),
        PLAIN: lambda: run_plainly(ours, source),
        OURS_CLASSIC: lambda: _through_avalanche(replace(ours, data_path="classic"), source),
        BUILTIN: lambda: _through_avalanche(replace(theirs, data_path="classic"), source),
    }
    _through_avalanche(replace(ours, epochs=1), source)  # warms up; reads the images for all
    rounds = []
    for i in range(settings.rounds):
        for name, make in ways.items():
            (row,) = output.cell(f"round {i}, {name}", partial(_row, make))
            output.console.print(f"round {i + 1}, {name}: {row['seconds']:.1f} s", highlight=False)
            rounds.append({"round": i, "run": name, **row})
    sizes = {
        "dataset": source.name,
        **{
            name: getattr(ours, name)
            for name in ("n_experiences", "epochs", "batch_size", "hidden_layers", "hidden_size")
        },
    }
    table = output.table(summarise(pd.DataFrame(rounds)).assign(**sizes), SWEEP_SPEED)
    output.show(table, "%.4g", index=False)
    return table


def summarise(rounds: pd.DataFrame) -> pd.DataFrame:
    """A row per way of making the run.

    Args:
        rounds: A row per round and way: `round`, `run`, `seconds`, the matrix `accuracies`, and
            which code measured it.

    Returns:
        The median seconds with their smallest and largest; the median, smallest and largest of the
        rounds' ratios to ours through the fast path; and whether every round reproduced our
        accuracies to the last bit, which is empty for Avalanche's EWC, another method.
    """
    ours = rounds[rounds["run"] == OURS_FAST].set_index("round")
    expected = ours["accuracies"].iloc[0]
    table = []
    for name, found in rounds.groupby("run", sort=False):
        found = found.set_index("round")
        same = all(accuracies == expected for accuracies in found["accuracies"])
        table.append({
            "run": name,
            "rounds": len(found),
            **_spread("seconds", found["seconds"]),
            **_spread("ratio", found["seconds"] / ours["seconds"]),
            "average_accuracy": float(np.mean(found["accuracies"].iloc[0][-1])),
            "same_accuracies": None if name == BUILTIN else same,
            **provenance_of(found),
        })
    return pd.DataFrame(table)


def _row(make: Callable[[], Timed]) -> list[dict[str, object]]:
    return [vars(make())]


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

"""What the fast data path saves: whole runs through it and through Avalanche's classic stream.

The same runs, interleaved in one process with one thread; their accuracies must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch

from experiments.data.sources import DataSource
from experiments.reporting.study_output import columns, study_on_images
from experiments.results.schemas import PROVENANCE
from experiments.settings.grids import PermutedMnist, SplitMnist
from experiments.settings.run import Dataset, Method, RunSettings
from experiments.settings.values import Count
from experiments.training.run import run as run_once

MEASURED = ("naive", "avalanche-ewc", "ewc")
PATHS = ("classic", "fast")


DATA_SPEED = pa.DataFrameSchema(
    {
        **columns(str, "benchmark", "dataset", "method"),
        **columns(int, "n_experiences", "epochs", "rounds", check=pa.Check.ge(1)),
        **columns(float, "classic_s", "fast_s", "ratio", "ratio_min", "ratio_max"),
        **columns(bool, "same_results"),
        **PROVENANCE,
    },
    unique=["benchmark", "dataset", "method"],
    strict=True,
    name="data_speed.csv",
)


@dataclass(frozen=True)
class DataSpeed:
    """Seconds per run through the classic stream and through the fast data path."""

    rounds: Count = 5
    """Times each run is made on each path, in turn."""
    experiences: Count = 2
    """Experiences of permuted MNIST; split MNIST has five."""
    methods: tuple[Method, ...] = MEASURED  # type: ignore[assignment]
    """Methods to run."""
    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw. Unset: $EWC_DATA_ROOT, else the cache folder."""
    out: str = "runs/data-speed"
    """Folder of the table."""


def run(settings: DataSpeed) -> pd.DataFrame:
    """Make the runs and write `data_speed.csv`.

    Args:
        settings: What to run.

    Returns:
        Per benchmark and method the median seconds of a run on both paths, the median of the
        rounds' ratios with their smallest and largest, and whether every accuracy and loss was
        the same.
    """
    source, output = study_on_images(settings)
    torch.set_num_threads(1)
    grids = (
        SplitMnist(methods=settings.methods, seeds=(0,)),
        PermutedMnist(methods=settings.methods, seeds=(0,), experiences=(settings.experiences,)),
    )
    rows: list[dict[str, object]] = []
    for cell in (cell for grid in grids for cell in grid.cells(source.name)):
        rows.append(_measure(cell, source, settings.rounds))
        output.console.print(rows[-1], highlight=False)
    return output.table(rows, DATA_SPEED)


def _measure(cell: RunSettings, source: DataSource, rounds: int) -> dict[str, object]:
    run_once(replace(cell, epochs=1), source)  # warms up, and makes the stream once for all
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    measured = []
    for _ in range(rounds):
        for path in PATHS:
            result = run_once(replace(cell, data_path=path), source)
            parts = ("train_s", "fisher_s", "eval_s")
            seconds[path].append(sum(result.record[part] for part in parts))
            measured.append([(row["accuracy"], row["loss"]) for row in result.rows])
    ratios = np.divide(seconds["classic"], seconds["fast"])
    return {
        "benchmark": cell.benchmark,
        "dataset": cell.dataset,
        "method": cell.method,
        "n_experiences": cell.n_experiences,
        "epochs": cell.epochs,
        "rounds": rounds,
        "classic_s": float(np.median(seconds["classic"])),
        "fast_s": float(np.median(seconds["fast"])),
        "ratio": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
        "same_results": all(rows == measured[0] for rows in measured),
    }

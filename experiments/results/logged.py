"""Files of `ewc_plugin.TidyCSVLogger` as results: the accuracies of scripts of the user's own.

Such a file has no settings but the method, its Fisher type and lambda. Each run in it becomes a row
like those of `runs.csv`, the columns that it knows nothing of left empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.results import schemas, tables
from experiments.results.metrics import METRICS, continual_metrics
from experiments.results.statistics import is_logged
from experiments.results.store import has_parts, read_results
from experiments.results.tables import TableError
from experiments.settings.run import STREAM

NAMES = [*STREAM, "method", "fisher_type", "ewc_lambda"]
TESTED = "test"  # the stream whose accuracies count


def load_results(path: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a results folder, or those made from a logger's file or a folder of such files.

    Of a sweep that is not done, the runs that are.

    Args:
        path: A folder, or a file of `TidyCSVLogger`.

    Returns:
        Tables by name, as `tables.load` returns them; `accuracy` and `runs` of logged files.

    Raises:
        TableError: There are none, or one of them can't be trusted.
    """
    files = logged_files(Path(path))
    if not files:
        return _of_folder(Path(path))
    accuracy = tables.check(
        pd.concat([tables.read_file(file, schemas.ACCURACY) for file in files], ignore_index=True),
        schemas.ACCURACY,
    )
    accuracy = _tested(accuracy, path)
    return {"accuracy": accuracy, "runs": _runs_of(accuracy, path)}


def _of_folder(folder: Path) -> dict[str, pd.DataFrame]:
    found = {}
    if has_parts(folder):
        found = dict(zip(("accuracy", "runs"), read_results(folder), strict=True))
    if found and not any((folder / name).exists() for name in schemas.SCHEMAS):
        return found
    return {**tables.load(folder), **found}


def logged_files(path: Path) -> Sequence[Path]:
    """The logger's files at a path.

    Args:
        path: A file, which must be one; or a folder.

    Returns:
        The file; or all in the folder, if that has no `runs.csv`.

    Raises:
        TableError: The file is none.
    """
    if path.is_file():
        if not _is_logged(path):
            raise TableError(
                f"`{path}` is not a file of `TidyCSVLogger`, whose columns are "
                f"{', '.join(schemas.ACCURACY.columns)}; of other results, name the folder."
            )
        return [path]
    if (path / str(schemas.RUNS.name)).exists():
        return []
    return [file for file in sorted(path.glob("*.csv")) if _is_logged(file)]


def logged_note(runs: pd.DataFrame) -> str:
    """A sentence on what is not known of runs of a logger's file; "" for others."""
    if not is_logged(runs):
        return ""
    return (
        "These rows are of `TidyCSVLogger`, which has no settings, times or memory of the runs. "
        "Comparisons assume that the runs differ in method, Fisher type and lambda alone."
    )


def _is_logged(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return lines.readline().rstrip("\r\n").split(",") == list(schemas.ACCURACY.columns)


def _tested(accuracy: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """The rows of the test stream, or of the only one."""
    streams = accuracy["stream"].unique().tolist()
    if len(streams) > 1 and TESTED not in streams:
        raise TableError(
            f"`{path}` must have accuracies on one stream, or on one called {TESTED}, got "
            f"{', '.join(map(str, streams))}."
        )
    wanted = TESTED if TESTED in streams else streams[0] if streams else TESTED
    return accuracy[accuracy["stream"] == wanted].reset_index(drop=True)


def _runs_of(accuracy: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """A row like those of `runs.csv` for each run."""
    sizes = accuracy.groupby(list(STREAM))["eval_exp"].max() + 1
    records = []
    for run_id, rows in accuracy.groupby("run_id", sort=False):
        names = rows[[*NAMES, "seed"]].drop_duplicates()
        if len(names) > 1:
            varied = [name for name in names if names[name].nunique(dropna=False) > 1]
            raise TableError(f"`{path}` has several values of {varied[0]} for the run {run_id}.")
        known = names.iloc[0].to_dict()
        n_experiences = int(sizes[tuple(known[name] for name in STREAM)])
        records.append(_record(str(run_id), known, rows, n_experiences))
    runs = pd.DataFrame(records, columns=list(schemas.RUNS.columns))
    twice = runs[runs.duplicated(["config_hash", "seed"], keep=False)]
    if len(twice):
        raise TableError(
            f"`{path}` has the runs {twice['run_id'].iloc[0]} and {twice['run_id'].iloc[1]} of one "
            "method, Fisher type, lambda and seed: name what they differ in by "
            "`TidyCSVLogger(method=...)`."
        )
    return runs


def _record(
    run_id: str, known: dict[str, Any], rows: pd.DataFrame, n_experiences: int
) -> dict[str, Any]:
    matrix = np.full((n_experiences + 1, n_experiences), np.nan)
    last = int(rows["train_exp"].max())
    for i, j, value in zip(rows["train_exp"], rows["eval_exp"], rows["accuracy"], strict=True):
        matrix[min(i, n_experiences - 1) + 1, j] = value
    complete = last == n_experiences - 1 and bool(np.isfinite(matrix[-1]).all())
    metrics = continual_metrics(matrix) if complete else dict.fromkeys(METRICS, np.nan)
    tested = f"trained through {last + 1} experiences, tested on {n_experiences}"
    plain = {name: None if pd.isna(known[name]) else known[name] for name in NAMES}
    content = json.dumps([str(plain[name]) for name in NAMES])
    return {
        "run_id": run_id,
        "status": "ok" if complete else "failed",
        "reason": "" if complete else tested,
        **plain,
        "seed": known["seed"],
        "n_experiences": n_experiences,
        "validation": False,
        **metrics,
        **dict.fromkeys(("train_s", "fisher_s", "eval_s"), np.nan),
        **dict.fromkeys(("peak_rss_mb", "penalty_state_mb"), np.nan),
        "config_hash": hashlib.sha256(content.encode()).hexdigest()[:10],
    }

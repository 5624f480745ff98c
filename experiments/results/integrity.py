"""Check that `runs.csv` and `accuracy.csv` are consistent.

A schema checks single values. This module checks that a run's id matches its settings, its rows
are complete, and its metrics follow from its rows. An edited number is thus detected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.results.metrics import METRICS, accuracy_matrix, continual_metrics
from experiments.results.provenance import NOT_RECORDED, content_digest
from experiments.results.schemas import ACCURACY, SETTING_NAMES
from experiments.results.tables import TableError
from experiments.settings.run import RunSettings
from experiments.settings.unset import given

TOLERANCE = 1e-9  # of metrics that another version of NumPy may have summed in another order
REPEATED = [name for name in SETTING_NAMES if name in ACCURACY.columns]


def check_runs(runs: pd.DataFrame, accuracy: pd.DataFrame) -> None:
    """Check each run against its rows of `accuracy.csv`.

    Raises:
        TableError: Naming the run and what does not fit.
    """
    rows = dict(tuple(accuracy.groupby("run_id", sort=False)))
    if strangers := sorted(rows.keys() - set(runs["run_id"])):
        raise TableError(f"accuracy.csv has rows of {strangers[0]}, which runs.csv lacks")
    for record in runs.to_dict("records"):
        run_id = record["run_id"]
        settings = _settings(record)
        if (settings.run_id, settings.config_hash) != (run_id, record["config_hash"]):
            raise TableError(f"the settings of {run_id} are not those of its id")
        own = rows.get(run_id, accuracy.iloc[:0])
        _check_rows(record, settings, own)
        digest = record.get("digest")
        if pd.isna(digest) and record.get("code_hash", NOT_RECORDED) != NOT_RECORDED:
            raise TableError(f"{run_id} has no digest, which every run with a code hash has")
        if pd.notna(digest) and digest != content_digest(record, own.to_dict("records")):
            raise TableError(f"a value of {run_id} is not the one that was stored (its digest)")


def _settings(record: Mapping[str, Any]) -> RunSettings:
    """The settings in a row of `runs.csv`."""
    try:
        return RunSettings(**given(record))
    except (ValueError, TypeError) as error:
        raise TableError(f"{record['run_id']} can't be a run: {error}") from None


def _check_rows(record: Mapping[str, Any], settings: RunSettings, rows: pd.DataFrame) -> None:
    run_id = record["run_id"]
    for name in REPEATED:
        value = getattr(settings, name)
        same = rows[name].isna() if value is None else rows[name] == value
        if not same.all():
            raise TableError(f"`{name}` of {run_id} is not the same in both tables")
    if record["status"] != "ok":
        return
    n = settings.n_experiences
    trained = [-1, n - 1] if settings.method == "joint" else range(-1, n)
    wanted = [(i, j) for i in trained for j in settings.evaluated_after(i)]
    found = list(zip(rows["train_exp"], rows["eval_exp"], strict=True))
    if sorted(found) != wanted:
        raise TableError(f"{run_id} has {len(rows)} rows of accuracy, not {len(wanted)}")
    matrix = accuracy_matrix(rows["train_exp"], rows["eval_exp"], rows["accuracy"])
    expected = continual_metrics(matrix)
    for name in METRICS:
        if not _close(record[name], expected[name]):
            raise TableError(
                f"`{name}` of {run_id} is {record[name]}, its rows say {expected[name]}"
            )


def _close(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= TOLERANCE

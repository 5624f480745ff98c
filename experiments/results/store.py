"""A folder of results: one file per finished run, and the tables built from them.

A run's file appears by rename when the run is done, so a kill loses at most what was still
running. Tables are rebuilt from the rows already in them and the runs' files; where both have a
run, its file counts. Several processes may use one folder at a time: whoever writes holds its lock.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from experiments.results import schemas, tables
from experiments.results.files import folder_lock, replace_file
from experiments.results.integrity import check_runs
from experiments.results.record import RunResult

PARTS = "parts"


class Store:
    """The results in one folder.

    Args:
        folder: Made if it isn't there.

    Raises:
        ValueError: The folder can't be made or written to.
        TableError: It holds a table that does not fit its schema, or a run that is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
            self.lock: FileLock = folder_lock(folder / PARTS)
            with self.lock:  # so that what is half-written was left by a kill
                for leftover in [*folder.glob("*.csv*.tmp"), *(folder / PARTS).glob("*.tmp")]:
                    leftover.unlink()
                replace_file(folder / PARTS / "writable", "")
                (folder / PARTS / "writable").unlink()
        except OSError as error:
            raise ValueError(
                f"`out` must be a folder that can be written to, got {folder} ({error.strerror})."
            ) from None
        self.rebuild()

    def finished(self) -> set[str]:
        """Ids of the runs that ended well or diverged; failed ones may be tried again."""
        runs = tables.read(self.folder, schemas.RUNS)
        return set(runs.loc[runs["status"] != "failed", "run_id"])

    def add(self, result: RunResult) -> None:
        """Puts a finished run's rows on the disk; its checkpoint is needed no longer."""
        run_id = result.record["run_id"]
        with self.lock:
            replace_file(self.folder / PARTS / f"{run_id}.json", json.dumps(asdict(result)))
            self.checkpoint(run_id).unlink(missing_ok=True)

    def checkpoint(self, run_id: str) -> Path:
        """Where a run may keep its state while it is not finished."""
        return self.folder.resolve() / PARTS / f"{run_id}.checkpoint"

    def rebuild(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Folds the runs' files into `accuracy.csv` and `runs.csv`.

        Returns:
            Both tables, in the order of the run ids.
        """
        with self.lock:
            accuracy, runs = read_results(self.folder)
            if len(runs):
                tables.write(accuracy, self.folder, schemas.ACCURACY)
                tables.write(runs, self.folder, schemas.RUNS)
        return accuracy, runs


def read_results(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows in a folder's tables and runs' files, checked; nothing is written.

    Args:
        folder: May be missing.

    Returns:
        Rows of `accuracy.csv` and of `runs.csv`, in the order of the run ids.

    Raises:
        TableError: A file is not what it should be.
    """
    parts = _read_parts(folder / PARTS)
    records = [part["record"] for part in parts]
    rows = [row for part in parts for row in part["rows"]]
    ids = [record["run_id"] for record in records]
    accuracy = _merge(tables.read(folder, schemas.ACCURACY), rows, ids, schemas.ACCURACY)
    runs = _merge(tables.read(folder, schemas.RUNS), records, ids, schemas.RUNS)
    try:
        check_runs(runs, accuracy)
    except tables.TableError as error:
        raise tables.TableError(
            f"The tables in `{folder}` don't agree: {error}. Restore them, or delete the run's "
            "rows from both and it is repeated."
        ) from None
    return accuracy, runs


def _read_parts(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.json"))
    parts = [_parsed(path) for path in paths]
    try:
        _check_parts(parts)
    except (ValueError, KeyError, TypeError, AttributeError):
        for path, part in zip(paths, parts, strict=True):  # one by one is slow, but says which
            try:
                _check_parts([part])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _damaged(path, error) from None
        raise
    return parts


def _parsed(path: Path) -> dict[str, Any]:
    try:
        part = dict(json.loads(path.read_text(encoding="utf-8")))
        if part["record"]["run_id"] != path.stem:
            raise ValueError(f"it is of {part['record']['run_id']}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    return part


def _check_parts(parts: list[dict[str, Any]]) -> None:
    records = [part["record"] for part in parts]
    rows = [row for part in parts for row in part["rows"]]
    for values, schema in ((records, schemas.RUNS), (rows, schemas.ACCURACY)):
        if unknown := {key for value in values for key in value} - schema.columns.keys():
            raise ValueError(f"{schema.name} has no column {sorted(unknown)[0]}")
    check_runs(tables.frame(records, schemas.RUNS), tables.frame(rows, schemas.ACCURACY))


def _damaged(path: Path, error: Exception) -> tables.TableError:
    reason = f"no {error}" if isinstance(error, KeyError) else error
    return tables.TableError(
        f"`{path}` is not a run's result ({reason}); delete it and that run is repeated."
    )


def _merge(
    table: pd.DataFrame, rows: list[dict[str, Any]], replaced: list[str], schema: schemas.Schema
) -> pd.DataFrame:
    """The table with `rows` put in place of its own of the runs `replaced`."""
    new = tables.frame(rows, schema)
    kept = table[~table["run_id"].isin(replaced)]
    parts = [part for part in (kept, new) if len(part)]
    merged = pd.concat(parts, ignore_index=True) if parts else new
    keys = [k for k in ("run_id", "train_exp", "eval_exp") if k in merged]
    return merged.sort_values(keys, ignore_index=True)

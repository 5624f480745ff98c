"""A folder of results: one file per finished run, and the tables built from them.

A run's file appears by rename when the run is done, so a kill loses at most what was still
running. Tables are rebuilt from the rows already in them and the runs' files; a run repeated by
`--force` replaces its own rows and no others.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import tables
from experiments.result import RunResult

PARTS = "parts"


class Store:
    """The results in one folder.

    Args:
        folder: Made if it isn't there.

    Raises:
        ValueError: The folder can't be made or written to.
        TableError: It holds a table that does not fit its schema.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
            tables.replace_file(folder / PARTS / "writable", "")
            (folder / PARTS / "writable").unlink()
        except OSError as error:
            raise ValueError(
                f"`out` must be a folder that can be written to, got {folder} ({error.strerror})."
            ) from None
        self.rebuild()

    def finished(self) -> set[str]:
        """Ids of the runs that ended well or diverged; failed ones may be tried again."""
        runs = tables.read(self.folder, tables.RUNS)
        return set(runs.loc[runs["status"] != "failed", "run_id"])

    def add(self, result: RunResult) -> None:
        """Puts a finished run's rows on the disk."""
        path = self.folder / PARTS / f"{result.record['run_id']}.json"
        tables.replace_file(path, json.dumps(asdict(result)))

    def rebuild(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Folds the runs' files into `accuracy.csv` and `runs.csv`.

        Returns:
            Both tables, in the order of the run ids.
        """
        parts = [self._part(path) for path in sorted((self.folder / PARTS).glob("*.json"))]
        records = [part["record"] for part in parts]
        rows = [row for part in parts for row in part["rows"]]
        runs = _merge(tables.read(self.folder, tables.RUNS), records, tables.RUNS)
        accuracy = _merge(tables.read(self.folder, tables.ACCURACY), rows, tables.ACCURACY)
        if len(runs):
            tables.write(accuracy, self.folder, tables.ACCURACY)
            tables.write(runs, self.folder, tables.RUNS)
        return accuracy, runs

    def _part(self, path: Path) -> dict[str, Any]:
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
            tables.frame([part["record"]], tables.RUNS)
            return dict(part)
        except (ValueError, KeyError, TypeError) as error:
            raise tables.TableError(
                f"`{path}` is not a run's result ({error}); delete it and that run is repeated."
            ) from None


def _merge(table: pd.DataFrame, rows: list[dict[str, Any]], schema: tables.Schema) -> pd.DataFrame:
    """The table with the runs in `rows` put in place of its own of the same ids."""
    new = tables.frame(rows, schema)
    kept = table[~table["run_id"].isin(new["run_id"])]
    parts = [part for part in (kept, new) if len(part)]
    merged = pd.concat(parts, ignore_index=True) if parts else new
    keys = [k for k in ("run_id", "train_exp", "eval_exp") if k in merged]
    return merged.sort_values(keys, ignore_index=True)

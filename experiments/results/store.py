"""A folder of results: one file per finished run, and the tables built from them.

A run's file appears by rename when the run is done, so a kill loses at most what was still
running. Tables are made from the rows already in them and the runs' files; where both have a
run, its file takes precedence. Several processes may share a folder: a writer takes its lock.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from experiments.results import schemas, tables
from experiments.results.files import folder_lock, make_folder, replace_file, sweep_leftovers
from experiments.results.integrity import check_runs
from experiments.results.record import RunResult, one_line
from experiments.settings.unset import used

PARTS = "parts"  # the folder of the finished runs' files
PLOTS = "plots"
PLAN = "plan.txt"  # in it: the ids of all runs of the last sweep, a line each
DAMAGED = ".damaged"  # suffix added to the name of a run file that cannot be read


class Store:
    """The results in one folder.

    Args:
        folder: Made if it isn't there.
        say: Called with a message for each damaged run file that is renamed.

    Raises:
        ValueError: The folder can't be made or written to.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder = folder
        self._say = say
        self._read = Read()
        self._named: set[Path] = set()  # damaged files that stay where they are
        self.n_added = 0  # results since it was opened
        for name in (".", PARTS, PLOTS):
            make_folder(folder / name)
        self.lock: FileLock = folder_lock(folder / PARTS)
        with self.lock:  # so that what is half-written was left by a kill
            sweep_leftovers(folder, folder / PARTS, folder / PLOTS)

    def plan(self, run_ids: Sequence[str]) -> None:
        """Remember which runs a sweep is to make, for `unfinished`."""
        path, content = self.folder / PARTS / PLAN, "".join(f"{run_id}\n" for run_id in run_ids)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            replace_file(path, content)

    def finished(self) -> set[str]:
        """Ids of the runs that ended well or diverged; failed ones may be tried again.

        Raises:
            TableError: A table does not fit its schema, or a run in it is not whole.
        """
        runs = self.results()[1]
        return set(runs.loc[runs["status"] != "failed", "run_id"])

    def add(self, result: RunResult) -> None:
        """Put a finished run's rows on the disk; its checkpoint is needed no longer."""
        run_id = result.record["run_id"]
        with self.lock:
            replace_file(self.folder / PARTS / f"{run_id}.json", json.dumps(asdict(result)))
            self.drop_checkpoint(run_id)
        self.n_added += 1

    def checkpoint(self, run_id: str) -> Path:
        """Return the path of a run's checkpoint."""
        return self.folder.resolve() / PARTS / f"{run_id}.checkpoint"

    def drop_checkpoint(self, run_id: str) -> None:
        """Delete a run's checkpoint; one that stays, such as a folder of that name, is no harm."""
        with contextlib.suppress(OSError):
            self.checkpoint(run_id).unlink()

    def results(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """All rows of the folder; only files that are new since the last call are read.

        Returns:
            Rows of `accuracy.csv` and of `runs.csv`, in the order of the run ids.

        Raises:
            TableError: A table does not fit its schema, or a run in it is not whole.
        """
        with self.lock:
            self._read = read_folder(self.folder, self._read)
            for path, reason in self._read.damaged.items():
                if path not in self._named:
                    self._set_aside(path, reason)
        return self._read.accuracy, self._read.runs

    def _set_aside(self, path: Path, reason: str) -> None:
        """Rename a damaged run file, and say so."""
        aside = path.with_name(path.name + DAMAGED)
        try:
            path.replace(aside)
            became = f"it is now {aside.name}"
        except OSError as error:
            self._named.add(path)
            became = f"it can't be renamed ({error.strerror})"
        self._say(
            f"`{path}` is not a run's result ({reason}); {became}. Rows of that run in the tables "
            "count; without any, it is repeated."
        )

    def write_tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Write all rows of the folder to `accuracy.csv` and `runs.csv`; return both.

        Raises:
            TableError: A table does not fit its schema, or a run in it is not whole.
        """
        with self.lock:
            accuracy, runs = self.results()
            if len(runs):
                written = [
                    tables.write(accuracy, self.folder, schemas.ACCURACY),
                    tables.write(runs, self.folder, schemas.RUNS),
                ]
                stamps = {**self._read.stamps, **{path: _stamp(path) for path in written}}
                self._read = replace(self._read, stamps=stamps)
        return accuracy, runs


def unfinished(folder: Path, runs: pd.DataFrame) -> str:
    """How many runs of the last sweep are done; "" if all are, or no sweep is known.

    Args:
        folder: Of results.
        runs: All rows of its `runs.csv`, and of the runs' files.
    """
    path = folder / PARTS / PLAN
    planned = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    done = runs[runs["run_id"].isin(planned)]
    if len(done) == len(planned):
        return ""
    lost = int((done["status"] != "ok").sum())
    words = f", {lost} of them not well" if lost else ""
    return (
        f"{len(done)} of {len(planned)} runs of the last sweep are done{words}. If it was stopped, "
        "the same command makes the others."
    )


def has_parts(folder: Path) -> bool:
    """Whether a folder has files of runs, such as those of a sweep that was stopped."""
    return any((folder / PARTS).glob("*.json"))


Stamp = tuple[int, int]  # of a file: the time of its last change, and its size


@dataclass(frozen=True)
class Read:
    """The rows read from a results folder.

    Attributes:
        accuracy: Rows of `accuracy.csv`.
        runs: Rows of `runs.csv`.
        stamps: The files that were read.
        damaged: Files in the place of a run's result that are none, and why not.
    """

    accuracy: pd.DataFrame = field(default_factory=lambda: tables.empty(schemas.ACCURACY))
    runs: pd.DataFrame = field(default_factory=lambda: tables.empty(schemas.RUNS))
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)


def read_results(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows in a folder's tables and runs' files, checked; nothing is written.

    Args:
        folder: May be missing.

    Returns:
        Rows of `accuracy.csv` and of `runs.csv`, in the order of the run ids.

    Raises:
        TableError: A table does not fit its schema, or a run in it is not whole.
    """
    read = read_folder(folder, Read())
    return read.accuracy, read.runs


def read_folder(folder: Path, before: Read) -> Read:
    """The rows in a folder's tables and runs' files, checked.

    Args:
        folder: May be missing.
        before: An earlier result; files that have not changed since are not read again.

    Returns:
        The rows, and the runs' files that could not be read.

    Raises:
        TableError: A table does not fit its schema, or a run in it is not whole.
    """
    names = [folder / str(schema.name) for schema in (schemas.ACCURACY, schemas.RUNS)]
    paths = [*names, *sorted((folder / PARTS).glob("*.json"))]
    stamps = {path: _stamp(path) for path in paths if path.exists()}
    known = before.stamps
    unchanged = known and all(stamps.get(path) == known.get(path) for path in names)
    if not unchanged or known.keys() - stamps.keys():
        known = {}
        accuracy, runs = (tables.read(folder, s) for s in (schemas.ACCURACY, schemas.RUNS))
    else:
        accuracy, runs = before.accuracy, before.runs
    files = [p for p, stamp in stamps.items() if p not in names and known.get(p) != stamp]
    new, damaged = _read_parts(files)
    ids = {part["record"]["run_id"] for part in new}
    accuracy, runs = (table[~table["run_id"].isin(ids)] for table in (accuracy, runs))
    if not known:
        _check_tables(folder, runs, accuracy)
    rows = tables.frame([row for part in new for row in part["rows"]], schemas.ACCURACY)
    records = tables.frame([part["record"] for part in new], schemas.RUNS)
    return Read(
        _sorted(accuracy, rows, ["run_id", "train_exp", "eval_exp"]),
        _sorted(runs, records, ["run_id"]),
        {path: stamp for path, stamp in stamps.items() if path not in damaged},
        damaged,
    )


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _check_tables(folder: Path, runs: pd.DataFrame, accuracy: pd.DataFrame) -> None:
    try:
        check_runs(runs, accuracy)
    except tables.TableError as error:
        raise tables.TableError(
            f"The tables in `{folder}` don't agree: {error}. Restore them, or delete the run's "
            "rows from both and it is repeated."
        ) from None


def _read_parts(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """The results in the runs' files; and the files that hold none, with the reason."""
    parts, damaged = {}, {}
    for path in paths:
        try:
            parts[path] = _parsed(path)
        except _NOT_A_RESULT as error:
            damaged[path] = _reason(error)
    try:
        _check_parts(list(parts.values()))
    except _NOT_A_RESULT:
        for path, part in list(parts.items()):  # one by one is slow, but says which
            try:
                _check_parts([part])
            except _NOT_A_RESULT as error:
                damaged[path] = _reason(error)
                del parts[path]
    return list(parts.values()), damaged


_NOT_A_RESULT = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else one_line(str(error))


def _parsed(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError("it is no regular file")
    part = dict(json.loads(path.read_text(encoding="utf-8")))
    if part["record"]["run_id"] != path.stem:
        raise ValueError(f"it is of {part['record']['run_id']}")
    return {**part, "record": used(part["record"])}


def _check_parts(parts: list[dict[str, Any]]) -> None:
    records = [part["record"] for part in parts]
    rows = [row for part in parts for row in part["rows"]]
    for values, schema in ((records, schemas.RUNS), (rows, schemas.ACCURACY)):
        if unknown := {key for value in values for key in value} - schema.columns.keys():
            raise ValueError(f"{schema.name} has no column {sorted(unknown)[0]}")
    check_runs(
        tables.frame(records, schemas.RUNS, strict=True),
        tables.frame(rows, schemas.ACCURACY, strict=True),
    )


def _sorted(old: pd.DataFrame, new: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    parts = [part for part in (old, new) if len(part)]
    merged = pd.concat(parts, ignore_index=True) if parts else new
    return merged.sort_values(keys, ignore_index=True)

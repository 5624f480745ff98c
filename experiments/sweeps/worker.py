"""The code that runs in a worker: its set-up, and the two kinds of task.

Avalanche is imported in the functions: the parent, which only hands them out, need not wait for it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.data.sources import DataSource
from experiments.results.provenance import code_hash
from experiments.results.record import RunResult
from experiments.settings.run import RunSettings
from experiments.sweeps.queue import Check
from experiments.training.loggers import Logs


class Event(NamedTuple):
    """The progress of a run: its id, experiences done, and the mean accuracy on them; or a note."""

    run_id: str
    done: int
    accuracy: float
    note: str = ""


Report = Callable[[Event], None]
TOPIC = "ewc-plugin"  # of events in a Dask cluster

_parent: Connection | None = None  # where a worker process reports its progress
_one_run = threading.Lock()  # runs of one process would share its global random numbers


class WorkerDiedError(ChildProcessError):
    """Workers were lost, or can't make the runs; a finished run's file stays."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; the same command goes on from what is stored.")


class TaskError(RuntimeError):
    """A task raised an error in a worker process; the message names its type."""


def serve(parent: Connection, temporary: str) -> None:
    """Do the tasks that come from the parent process, one after the other, until it ends.

    Args:
        parent: A pipe to it.
        temporary: Folder for temporary files, which the parent deletes.
    """
    global _parent
    _parent = parent
    tempfile.tempdir = temporary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # third parties' notes, once per process
    try:
        while True:
            function, arguments = parent.recv()
            try:
                answer = ("result", function(*arguments))
            except OtherCodeError as error:
                answer = ("error", error)
            except Exception as error:
                answer = ("error", TaskError(f"{type(error).__name__}: {error}"))
            parent.send(answer)
    except (EOFError, OSError):  # the parent has ended
        _end()


def report_to_parent(event: Event) -> None:
    """Send progress from a worker process to the process that started it."""
    assert _parent is not None
    _parent.send(("event", event))


def report_to_cluster(event: Event) -> None:
    """Send progress from a Dask worker to every client that listens."""
    from distributed import get_worker

    get_worker().log_event(TOPIC, tuple(event))


class OtherCodeError(RuntimeError):
    """A worker has other sources than the command that gives it runs."""


def check_code(expected: str) -> None:
    """Raise an `OtherCodeError` unless this process would compute with the expected code."""
    if code_hash() != expected:
        raise OtherCodeError(
            f"the worker has code {code_hash()} where the command has {expected}: start it anew "
            "from the same checkout"
        )


def run_cell(
    code: str,
    cell: RunSettings,
    source: DataSource,
    checkpoint: Path | None,
    logs: Logs | None,
    report: Report,
) -> RunResult:
    """One run, by this `code` alone; `report` gets its begin and each experience."""
    from experiments.training.run import run

    check_code(code)

    with _alone():
        report(Event(cell.run_id, 0, 0.0))
        return run(
            cell,
            source,
            lambda done, accuracy: report(Event(cell.run_id, done, accuracy)),
            checkpoint,
            logs=logs,
            say=lambda line: report(Event(cell.run_id, 0, 0.0, line)),
        )


def check_cell(
    code: str, cell: RunSettings, source: DataSource, check: Check
) -> list[dict[str, Any]]:
    """The rows of a check on a cell's stream, by this `code` alone."""
    check_code(code)
    with _alone():
        return check(cell, source)


@contextmanager
def _alone() -> Iterator[None]:
    """One run at a time and one thread for it, so that results do not depend on what else runs."""
    with _one_run:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this worker when its parent process dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _end()


def _end(*_: Any) -> None:
    """End this worker; its parent may not be there to delete its temporary files."""
    shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)
    os._exit(1)

"""The side of the process that makes a run: its set-up, and the tasks that it is given.

Avalanche is imported in the functions: the parent, which only hands them out, need not wait for it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from experiments.data.sources import DataSource
from experiments.results.record import RunResult
from experiments.settings.run import RunSettings
from experiments.sweeps.queue import Check
from experiments.training.loggers import Logs

Event = tuple[str, int, float]  # run id, experiences done, mean accuracy on them
Tell = Callable[[Event], None]
TOPIC = "ewc-plugin"  # of events in a Dask cluster

_parent: Connection | None = None  # where a process of a pool tells how far it is
_one_run = threading.Lock()  # runs of one process would share its global random numbers


def start(parent: Connection) -> None:
    """Sets up a process of a pool."""
    global _parent
    _parent = parent
    # A killed parent can't end its workers, and they would wait for it for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # third parties' notes, once per process


def tell_parent(event: Event) -> None:
    """From a process of a pool to the one that started it."""
    assert _parent is not None
    _parent.send(event)


def tell_cluster(event: Event) -> None:
    """From a Dask worker to whoever listens."""
    from distributed import get_worker

    get_worker().log_event(TOPIC, event)


def run_cell(
    cell: RunSettings,
    source: DataSource,
    checkpoint: Path | None,
    logs: Logs | None,
    tell: Tell,
) -> RunResult:
    """One run, with `tell` called when it begins and after each experience."""
    from experiments.training.run import run

    with _alone():
        tell((cell.run_id, 0, 0.0))
        return run(
            cell,
            source,
            lambda done, accuracy: tell((cell.run_id, done, accuracy)),
            checkpoint,
            logs=logs,
        )


def check_cell(cell: RunSettings, source: DataSource, check: Check) -> list[dict[str, Any]]:
    """The rows of a check on a cell's stream."""
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
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""The side of a worker process: its set-up, and the tasks that it is given.

Avalanche is imported in the functions: the parent, which only hands them out, need not wait for it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from multiprocessing.queues import Queue
from typing import Any

import torch

from experiments.data import DataSource
from experiments.logs import Logs
from experiments.result import RunResult
from experiments.settings import RunSettings

Event = tuple[str, int, float]  # run id, experiences done, mean accuracy on them

_events: Queue[Event] | None = None  # where this process tells how far it is


def start(events: Queue[Event]) -> None:
    """One thread for each run, so that results do not depend on the number of processes."""
    global _events
    _events = events
    # A killed parent can't end its workers, and they would wait for it for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # third parties' notes, once per process


def run_cell(cell: RunSettings, source: DataSource, logs: Logs | None) -> RunResult:
    """One run, whose progress goes to the parent."""
    from experiments.run import run

    assert _events is not None
    send = _events.put
    send((cell.run_id, 0, 0.0))
    return run(cell, source, lambda done, accuracy: send((cell.run_id, done, accuracy)), logs=logs)


def check_cell(cell: RunSettings, source: DataSource) -> list[dict[str, Any]]:
    """The numerical checks against the built-in on a cell's stream."""
    from experiments.parity_checks import numerical_checks

    return list(numerical_checks(cell, source))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

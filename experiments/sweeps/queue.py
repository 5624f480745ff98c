"""Order of the tasks: streams are built as few times as possible, and no core idles for long."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.data.sources import DataSource
from experiments.settings.grids import DEFAULT_BATCH_SIZE
from experiments.settings.run import RunSettings

# Duration relative to Naive's, from the times in results/main.
METHOD_WORK = {"naive": 1.0, "joint": 0.9, "ewc": 1.3, "avalanche-ewc": 1.6, "si": 3.0}
CHECK_WORK = 0.1  # of a run
OVERHEAD = 100_000  # parameters whose training takes as long as what a step costs besides
N_INPUTS, N_IMAGES = 784, 60_000  # of MNIST
CNN_PARAMETERS = 2_000_000  # of an MLP that takes as long


Check = Callable[[RunSettings, DataSource], list[dict[str, Any]]]


@dataclass(frozen=True)
class Task:
    """A run of `cell`, or a check on its stream.

    Attributes:
        cell: The settings of the run.
        check: The function that does the check; None for a run.
    """

    cell: RunSettings
    check: Check | None = None

    @property
    def work(self) -> float:
        """Duration in the units of `work`."""
        return work(self.cell) * (CHECK_WORK if self.check else 1.0)


def work(cell: RunSettings) -> float:
    """Duration of a run in arbitrary units; right enough to tell large from small."""
    passes = cell.epochs * (1.0 if cell.benchmark == "split" else cell.n_experiences)
    if cell.iterations:
        passes = cell.iterations * cell.n_experiences * cell.batch_size / N_IMAGES
    h = cell.hidden_size
    n_parameters = N_INPUTS * h + (cell.hidden_layers - 1) * h * h
    if cell.model == "cnn":
        n_parameters = CNN_PARAMETERS
    steps = passes * DEFAULT_BATCH_SIZE["mnist"] / cell.batch_size
    return METHOD_WORK.get(cell.method, 1.5) * (OVERHEAD * steps + n_parameters * passes)


def next_task(
    waiting: Sequence[Task], own: RunSettings | None, others: Collection[RunSettings | None]
) -> Task:
    """The largest waiting task of the stream that a process should work on next.

    That is the stream which it built last; else, of those that no other process built last, the one
    with most work; else the one with most work: building it once more costs less than waiting.

    Args:
        waiting: Tasks that nobody has begun; at least one.
        own: The stream that the process built last.
        others: The streams that the other processes built last.

    Returns:
        One of `waiting`.
    """
    streams: dict[RunSettings, list[Task]] = defaultdict(list)
    for task in waiting:
        streams[task.cell.stream].append(task)
    if own in streams:
        chosen = own
    else:
        free = [stream for stream in streams if stream not in others] or list(streams)
        chosen = max(free, key=lambda stream: sum(task.work for task in streams[stream]))
    assert chosen is not None
    return max(streams[chosen], key=lambda task: task.work)

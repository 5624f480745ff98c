"""Runs many runs at once, shows what is going on, and leaves no finished run unsaved."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments import worker
from experiments.data import DataSource
from experiments.logs import Logs
from experiments.result import RunResult
from experiments.settings import RunSettings
from experiments.store import Store

POLL_S = 0.25
RATE_WINDOW_S = 600.0  # the time left is estimated from the last ten minutes

Outcome = RunResult | list[dict[str, Any]]  # of a run, or of a check


class WorkerDiedError(ChildProcessError):
    """A worker process ended without a result; what was finished is stored."""


def sweep(
    cells: Sequence[RunSettings],
    source: DataSource,
    store: Store,
    *,
    jobs: int,
    console: Console,
    force: bool = False,
    checks: Sequence[RunSettings] = (),
    logs: Logs | None = None,
) -> list[dict[str, Any]]:
    """Runs what the store does not hold yet; each result is stored as soon as it is there.

    Args:
        cells: The runs that are wanted.
        source: Where the images are.
        store: Where results go, and where they may be already.
        jobs: Processes; with 1, this one. Each run has one thread, so that results do not depend
            on their number.
        console: Where progress is shown.
        force: Repeat what the store holds.
        checks: Cells on whose streams our importances are compared with the built-in's.
        logs: What else is told how the runs go.

    Returns:
        The rows of those numerical checks.

    Raises:
        WorkerDiedError: A process was killed or ran out of memory.
    """
    finished = set() if force else store.finished()
    wanted = [cell for cell in cells if cell.run_id not in finished]
    if held := len(cells) - len(wanted):
        console.print(f"{held} of {len(cells)} runs are done already (--force repeats them).")
    rows: list[dict[str, Any]] = []
    if not wanted and not checks:
        return rows
    run_all = _here if jobs == 1 else _in_processes
    with _Display(wanted, console) as display:
        jobs = min(jobs, len(wanted + [*checks]))
        for outcome in run_all(wanted, checks, source, display, jobs, logs):
            if isinstance(outcome, RunResult):
                store.add(outcome)
                display.finish(outcome)
            else:
                rows += outcome
    return rows


def _here(
    cells: Sequence[RunSettings],
    checks: Sequence[RunSettings],
    source: DataSource,
    display: _Display,
    jobs: int,
    logs: Logs | None,
) -> Iterator[Outcome]:
    """One run after the other in this process, with one thread as in the others."""
    from experiments.run import run  # and with it Avalanche

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in cells:
            display.update(cell.run_id, 0, 0.0)
            yield run(cell, source, functools.partial(display.update, cell.run_id), logs=logs)
        for cell in checks:
            yield worker.check_cell(cell, source)
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    cells: Sequence[RunSettings],
    checks: Sequence[RunSettings],
    source: DataSource,
    display: _Display,
    jobs: int,
    logs: Logs | None,
) -> Iterator[Outcome]:
    """Outcomes as they come, from processes that are given up when the caller stops asking."""
    context = multiprocessing.get_context("spawn")
    events: Queue[worker.Event] = context.Queue()
    executor = ProcessPoolExecutor(jobs, context, initializer=worker.start, initargs=(events,))
    pending: set[Future[Outcome]] = set()
    try:
        pending = {executor.submit(worker.run_cell, cell, source, logs) for cell in cells}
        pending |= {executor.submit(worker.check_cell, cell, source) for cell in checks}
        while pending:
            done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            while not events.empty():
                display.update(*events.get())
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            f"a worker process died ({error}); finished runs are stored: the same command goes on "
            "from there, and --jobs 1 needs less memory."
        ) from None
    finally:  # also on Ctrl-C: what is finished is stored, what runs is given up
        if pending:
            for process in list((executor._processes or {}).values()):
                process.terminate()
        executor.shutdown(cancel_futures=True)


class _Display:
    """A bar over all experiences of all runs and a line for each run that is going on.

    Where the output is no terminal, a plain line for each run that has ended.
    """

    def __init__(self, cells: Sequence[RunSettings], console: Console) -> None:
        self.console = console
        self.start = time.perf_counter()
        self.n_experiences = {cell.run_id: cell.n_experiences for cell in cells}
        self.done = dict.fromkeys(self.n_experiences, 0)
        self.n_ended = 0
        self.lines: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=RATE_WINDOW_S,
        )
        total = sum(self.n_experiences.values())
        self.overall = self.progress.add_task("all runs", total=total, note=self._note())

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def update(self, run_id: str, done: int, accuracy: float) -> None:
        """A run has begun (done = 0) or finished an experience."""
        if self.done[run_id] > done:
            return  # its result has overtaken the event
        if run_id not in self.lines:
            total = self.n_experiences[run_id]
            self.lines[run_id] = self.progress.add_task(run_id, total=total, note="")
        note = f"accuracy {accuracy:.3f}" if done else "starting"
        self.progress.update(self.lines[run_id], completed=done, note=note)
        self._advance(run_id, done)

    def finish(self, result: RunResult) -> None:
        """A run has ended, well or not."""
        record = result.record
        run_id = record["run_id"]
        self._advance(run_id, self.n_experiences[run_id])
        self.n_ended += 1
        self.progress.update(self.overall, note=self._note())
        if run_id in self.lines:
            self.progress.update(self.lines[run_id], visible=False)
        outcome = f"accuracy {record['average_accuracy']:.4f}"
        if record["status"] != "ok":
            outcome = f"{record['status'].upper()}: {record['reason']}"
        self.console.print(
            f"[{self.n_ended}/{len(self.done)}, {time.perf_counter() - self.start:.0f} s] "
            f"{run_id}  {outcome}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def _advance(self, run_id: str, done: int) -> None:
        self.progress.update(self.overall, advance=max(done - self.done[run_id], 0))
        self.done[run_id] = max(done, self.done[run_id])

    def _note(self) -> str:
        return f"{len(self.done) - self.n_ended} of {len(self.done)} runs left"

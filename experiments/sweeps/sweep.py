"""Runs many runs at once, shows what is going on, and leaves no finished run unsaved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from typing import Any

from rich.console import Console

from experiments.data.sources import DataSource
from experiments.results.record import RunResult, failed
from experiments.results.store import Store
from experiments.settings.run import RunSettings
from experiments.sweeps import worker
from experiments.sweeps.executors import Cluster, Here, Lane, OneProcess
from experiments.sweeps.progress import Display
from experiments.sweeps.queue import Task, next_task
from experiments.training.loggers import Logs

POLL_S = 0.25
MAX_ATTEMPTS = 3  # of a run whose process dies

Outcome = RunResult | list[dict[str, Any]]  # of a run, or of a check


class WorkerDiedError(ChildProcessError):
    """What was to run elsewhere ended without a result; what was finished is stored."""


def sweep(
    cells: Sequence[RunSettings],
    source: DataSource,
    store: Store,
    *,
    jobs: int,
    console: Console,
    force: bool = False,
    checks: Sequence[Task] = (),
    scheduler: str | None = None,
    checkpoint: bool = False,
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
        checks: Tasks whose rows are returned rather than stored.
        scheduler: Address of a Dask scheduler whose workers take the place of the processes.
        checkpoint: Keep the state of runs that go on, and take up what a killed one left.
        logs: What else is told how the runs go.

    Returns:
        The rows of the checks.

    Raises:
        ValueError: The scheduler can't be reached.
        WorkerDiedError: The scheduler was lost, or a check's process died again and again.
    """
    finished = set() if force else store.finished()
    wanted = [cell for cell in cells if cell.run_id not in finished]
    if held := len(cells) - len(wanted):
        console.print(f"{held} of {len(cells)} runs are done already (--force repeats them).")
    rows: list[dict[str, Any]] = []
    tasks = [*map(Task, wanted), *checks]
    if not tasks:
        return rows
    if force:
        for cell in wanted:
            store.checkpoint(cell.run_id).unlink(missing_ok=True)
    with Display(wanted, console) as display:
        lanes = _open_lanes(min(jobs, len(tasks)), scheduler, display)
        try:
            kept = store if checkpoint else None
            for outcome in _outcomes(tasks, lanes, source, kept, logs, display):
                if isinstance(outcome, RunResult):
                    store.add(outcome)
                    display.finish(outcome)
                else:
                    rows += outcome
        finally:  # also on Ctrl-C: what is finished is stored, what runs is given up
            for lane in lanes:
                lane.close()
    return rows


def _open_lanes(jobs: int, scheduler: str | None, display: Display) -> list[Lane]:
    if scheduler is not None:
        return [Cluster(scheduler)]
    return [Here(display.update)] if jobs == 1 else [OneProcess() for _ in range(jobs)]


def _outcomes(
    tasks: Sequence[Task],
    lanes: Sequence[Lane],
    source: DataSource,
    store: Store | None,
    logs: Logs | None,
    display: Display,
) -> Iterator[Outcome]:
    """What becomes of each task, once, in the order in which they end."""
    waiting = list(tasks)
    running: dict[Future[Outcome], tuple[Lane, Task]] = {}
    held: dict[Lane, RunSettings] = {}  # the stream that each lane built last
    attempts: Counter[Task] = Counter()
    while waiting or running:
        for lane in lanes:
            n_running = sum(other is lane for other, _ in running.values())
            while waiting and n_running < lane.capacity:
                others = [stream for other, stream in held.items() if other is not lane]
                task = next_task(waiting, held.get(lane), others)
                waiting.remove(task)
                held[lane] = task.cell.stream
                running[_submit(lane, task, source, store, logs)] = lane, task
                n_running += 1
        done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
        for lane in lanes:
            for event in lane.drain():
                display.update(event)
        for future in done:
            lane, task = running.pop(future)
            try:
                yield future.result()
            except BrokenExecutor:
                lane.renew()
                del held[lane]
                attempts[task] += 1
                if attempts[task] < MAX_ATTEMPTS:
                    display.say(f"{task.cell.run_id}: its process died; it is tried again.")
                    waiting.insert(0, task)
                else:
                    yield _lost(task, f"its process died {MAX_ATTEMPTS} times: {_MEMORY}")
            except CancelledError:
                raise WorkerDiedError(
                    "the scheduler gave up its tasks; finished runs are stored: the same command "
                    "goes on from there."
                ) from None
            except Exception as error:  # of the executor: a run's own is in its row
                yield _lost(task, f"{type(error).__name__}: {error}")


_MEMORY = "it was killed, or short of memory, of which fewer --jobs need less"


def _submit(
    lane: Lane, task: Task, source: DataSource, store: Store | None, logs: Logs | None
) -> Future[Outcome]:
    cell = task.cell
    if task.check:
        return lane.submit(worker.check_cell, cell, source, task.check)
    path = store.checkpoint(cell.run_id) if store else None
    return lane.submit(worker.run_cell, cell, source, path, logs, lane.tell)


def _lost(task: Task, reason: str) -> RunResult:
    if task.check:
        raise WorkerDiedError(f"the checks on {task.cell.run_id}'s stream failed: {reason}.")
    return failed(task.cell, reason)

"""Execute runs in parallel, show progress, and store each run when it finishes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from typing import Any

from rich.console import Console

from experiments.data.sources import DataSource
from experiments.results.provenance import NOT_RECORDED, code_hash
from experiments.results.record import RunResult, failed
from experiments.results.store import Store
from experiments.settings.own import OwnFile
from experiments.settings.run import OWN, RunSettings
from experiments.sweeps import worker
from experiments.sweeps.cluster import Dask
from experiments.sweeps.dry_run import expected_time
from experiments.sweeps.executors import Executor, InProcess, OneProcess
from experiments.sweeps.progress import Display
from experiments.sweeps.queue import Task, next_task
from experiments.sweeps.worker import OtherCodeError, WorkerDiedError
from experiments.training.loggers import Logs

POLL_S = 0.25
MAX_ATTEMPTS = 3  # of a run whose process dies
SHORT_OF_MEMORY = "it was killed, or short of memory, of which fewer --processes need less"

Outcome = RunResult | list[dict[str, Any]]  # of a run, or of a check
Submit = Callable[[Executor, Task], "Future[Outcome]"]


def sweep(
    cells: Sequence[RunSettings],
    source: DataSource,
    store: Store,
    *,
    processes: int,
    console: Console,
    force: bool = False,
    checks: Sequence[Task] = (),
    scheduler: str | None = None,
    checkpoint: bool = False,
    mix_code: bool = False,
    logs: Logs | None = None,
) -> list[dict[str, Any]]:
    """Make the runs that the store lacks; each result is stored as soon as it is there.

    Args:
        cells: The runs that are wanted.
        source: Where the images are.
        store: Where results go, and where they may be already.
        processes: Their number; with 1, this one. Each run has one thread, so that results do not
            depend on it.
        console: Where progress is shown.
        force: Repeat the runs that the store has.
        checks: Tasks whose rows are returned rather than stored.
        scheduler: Address of a Dask scheduler whose workers take the place of the processes.
        checkpoint: Keep the state of unfinished runs, and go on from that of a killed one.
        mix_code: Add runs where the store has some of other code.
        logs: Further loggers of each run.

    Returns:
        The rows of the checks.

    Raises:
        ValueError: The scheduler can't be reached, or the store has runs of other code.
        WorkerDiedError: The scheduler was lost, or a check's process died again and again.
    """
    store.plan([cell.run_id for cell in cells])
    finished = store.finished()  # also with `force`: a damaged table is found before any run
    wanted = [cell for cell in cells if force or cell.run_id not in finished]
    if n_done := len(cells) - len(wanted):
        console.print(f"{n_done} of {len(cells)} runs are done already (--force repeats them).")
    rows: list[dict[str, Any]] = []
    tasks = [*map(Task, wanted), *checks]
    if not tasks:
        return rows
    if wanted and not mix_code:
        _check_own_files(store, cells)
        _check_code(store, {cell.run_id for cell in wanted})
    expected = expected_time(wanted, store.results()[1], processes)
    console.print(
        f"{len(wanted)} runs and {len(checks)} checks begin, "
        f"{'on ' + scheduler if scheduler else f'{min(processes, len(tasks))} at a time'}; "
        f"results go to {store.folder}."
        + (f" Expected: {expected}." if expected and not scheduler else "")
        + " --dry-run lists the runs and starts none.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if force:
        for cell in wanted:
            store.drop_checkpoint(cell.run_id)

    code = code_hash()

    def submit(executor: Executor, task: Task) -> Future[Outcome]:
        cell = task.cell
        if task.check:
            return executor.submit(worker.check_cell, code, cell, source, task.check)
        path = store.checkpoint(cell.run_id) if checkpoint else None
        return executor.submit(worker.run_cell, code, cell, source, path, logs, executor.report)

    with Display(wanted, console) as display:
        executors = _open_executors(min(processes, len(tasks)), scheduler, source.files, display)
        try:
            for outcome in Dispatcher(tasks, executors, submit, display).outcomes():
                if isinstance(outcome, RunResult):
                    store.add(outcome)
                    display.finish(outcome)
                else:
                    rows += outcome
        finally:  # also on Ctrl-C: finished runs are stored, the others are given up
            for executor in executors:
                executor.close()
    return rows


def _check_own_files(store: Store, cells: Sequence[RunSettings]) -> None:
    """Refuse to add runs to those of another version of the same own function."""
    runs = store.results()[1]
    for name in OWN:
        mine = {(getattr(c, name), getattr(c, f"{name}_sha256")) for c in cells}
        for value in {value for value, sha256 in mine if sha256}:
            hashes = sorted(sha256 for other, sha256 in mine if other == value)
            others = runs[runs[name].eq(value) & ~runs[f"{name}_sha256"].isin(hashes)]
            if len(others):
                raise ValueError(
                    f"`out` must hold runs of {value} as it is (SHA-256 {hashes[0][:8]}...), got "
                    f"{store.folder} with {len(others)} runs of the file as it was: name another "
                    "folder, or add to it by --mix-code."
                )


def _check_code(store: Store, wanted: set[str]) -> None:
    runs = store.results()[1]
    kept = runs.loc[~runs["run_id"].isin(wanted), "code_hash"].fillna(NOT_RECORDED)
    if len(others := kept[kept != code_hash()]):
        raise ValueError(
            f"`out` must hold runs of this code ({code_hash()}), got {store.folder} with "
            f"{len(others)} runs of other code ({', '.join(sorted(others.unique()))}): name "
            "another folder, or add to it by --mix-code."
        )


def _open_executors(
    processes: int, scheduler: str | None, files: tuple[OwnFile, ...], display: Display
) -> list[Executor]:
    if scheduler is not None:
        return [Dask(scheduler, files)]
    if processes == 1:
        return [InProcess(display.update)]
    return [OneProcess() for _ in range(processes)]


class Dispatcher:
    """Submits tasks to executors; resubmits a task if its process dies.

    Args:
        tasks: All of them.
        executors: Which do them.
        submit: Starts a task on an executor.
        display: Shows the progress that the executors report.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        executors: Sequence[Executor],
        submit: Submit,
        display: Display,
    ) -> None:
        self.waiting = list(tasks)
        self.executors = executors
        self.submit = submit
        self.display = display
        self.running: dict[Future[Outcome], tuple[Executor, Task]] = {}
        self.built: dict[Executor, RunSettings] = {}  # the stream that each executor built last
        self.attempts: Counter[Task] = Counter()

    def outcomes(self) -> Iterator[Outcome]:
        """The outcome of each task, once, in the order in which they end."""
        while self.waiting or self.running:
            for executor in self.executors:
                self._fill(executor)
            done, _ = wait(self.running, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for executor in self.executors:
                for event in executor.events():
                    self.display.update(event)
            for future in done:
                yield from self._outcome(future)

    def _fill(self, executor: Executor) -> None:
        """Give the executor as many tasks as it takes."""
        n_running = sum(other is executor for other, _ in self.running.values())
        while self.waiting and n_running < executor.capacity:
            others = [stream for other, stream in self.built.items() if other is not executor]
            task = next_task(self.waiting, self.built.get(executor), others)
            self.waiting.remove(task)
            self.built[executor] = task.cell.stream
            self.running[self.submit(executor, task)] = executor, task
            n_running += 1

    def _outcome(self, future: Future[Outcome]) -> Iterator[Outcome]:
        """The outcome of an ended task; none if it is tried again."""
        executor, task = self.running.pop(future)
        try:
            yield future.result()
        except (BrokenExecutor, CancelledError):
            self.built.pop(executor, None)
            self.attempts[task] += 1
            if self.attempts[task] == MAX_ATTEMPTS:
                yield _lost(task, f"its process died {MAX_ATTEMPTS} times: {SHORT_OF_MEMORY}")
                return
            self.display.say(f"{task.cell.run_id}: its process died; it is tried again.")
            self.waiting.insert(0, task)
        except OtherCodeError as error:
            raise WorkerDiedError(str(error)) from None
        except Exception as error:  # of the executor: a run's own is in its row
            yield _lost(task, f"{type(error).__name__}: {error}")


def _lost(task: Task, reason: str) -> RunResult:
    if task.check:
        raise WorkerDiedError(f"the checks on {task.cell.run_id}'s stream failed: {reason}")
    return failed(task.cell, reason)

"""Where tasks run: in this process, in others of this machine, or on the workers of a Dask cluster.

An executor has `capacity`, the number of tasks that it takes at a time; `report`, which a task
calls with its progress; `submit`, which returns a future; `events`, the progress since the last
call; and `close`. Each worker process has its own executor: if it dies, only its current run is
lost, and runs on the stream that it has already built can be given to it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from experiments.results.provenance import code_hash
from experiments.settings.own import OwnFile, changed_file
from experiments.sweeps import worker
from experiments.sweeps.worker import Event, Report

CONNECT_TIMEOUT_S = 5.0
WORKER_TIMEOUT_S = 60.0  # without any Dask worker
LOOK_EVERY_S = 5.0
TERMINATE_TIMEOUT_S = 5.0  # then it is killed


class WorkerDiedError(ChildProcessError):
    """A worker ended without a result; finished runs are stored."""


class InProcess:
    """This process: a task is done when it has been submitted.

    Args:
        report: Called with the progress of the tasks.
    """

    capacity = 1.0

    def __init__(self, report: Report) -> None:
        self.report = report

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call the function; Ctrl-C is not one of its results."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def events(self) -> Iterator[Event]:
        """No queued events: tasks in this process report directly."""
        return iter(())

    def close(self) -> None:
        """Do nothing: there is no process to close."""


class OneProcess:
    """One worker process, started anew when it has died.

    The two share a pipe and nothing else: the semaphores of a pool of processes stay in the system
    when everything is killed at once.
    """

    capacity = 1.0
    report = staticmethod(worker.report_to_parent)

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Hand the call to the process, a new one if it has died since its last task."""
        if not (self._process.is_alive() and self._listener.is_alive()):
            self.close()
            self._start()
        self._future = Future[Any]()
        future = self._future
        try:
            self._pipe.send((function, arguments))
        except OSError:  # it has just died; the listener may have ended before this task
            self._listener.join()
            if not future.done():
                future.set_exception(BrokenExecutor("the process died"))
        return future

    def events(self) -> Iterator[Event]:
        """Progress that the process has reported since the last call."""
        while not self._events.empty():
            yield self._events.get()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        self._process.join(TERMINATE_TIMEOUT_S)
        self._process.kill()
        self._process.join()
        self._listener.join()
        self._pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._future = Future[Any]()
        self._pipe, of_process = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(of_process,), daemon=True)
        with _interrupts_blocked():  # the process inherits it: the parent handles Ctrl-C
            self._process.start()
        of_process.close()
        self._listener = threading.Thread(target=self._listen, args=(self._pipe,), daemon=True)
        self._listener.start()

    def _listen(self, pipe: Connection) -> None:
        """Pass on what the process sends, until it ends."""
        try:
            while True:
                kind, content = pipe.recv()
                if kind == "event":
                    self._events.put(content)
                elif kind == "result":
                    self._future.set_result(content)
                else:
                    self._future.set_exception(worker.TaskError(content))
        except (EOFError, OSError):
            if not self._future.done():
                self._future.set_exception(BrokenExecutor("the process died"))


class Dask:
    """The workers of a Dask scheduler, which itself repeats the tasks of a lost worker.

    Args:
        address: Of the scheduler, such as tcp://host:8786.
        files: Own files, which every worker must have in the same place.

    Raises:
        ValueError: It can't be reached, or `distributed` is not installed.
    """

    capacity = math.inf
    report = staticmethod(worker.report_to_cluster)

    def __init__(self, address: str, files: tuple[OwnFile, ...] = ()) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise ValueError(
                f"`scheduler` needs Dask, got {address}: install it by pip install "
                "'ewc-plugin[cluster]'."
            ) from None
        for name in ("distributed", "tornado", "asyncio"):  # a lost scheduler is ours to report
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        try:
            self._client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"`scheduler` must be the address of a running Dask scheduler, got {address} "
                f"({reason})."
            ) from None
        self._seen = time.monotonic()  # when there was a worker
        self._looked = self._seen
        try:
            self._check_workers(address, files)
        except BaseException:
            self._client.close()
            raise
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._client.subscribe_topic(worker.TOPIC, lambda event: self._events.put(Event(*event[1])))
        # Not pure: --force repeats what the scheduler may remember.
        self._executor = self._client.get_executor(pure=False)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Hand the call to the scheduler."""
        future: Future[Any] = self._executor.submit(function, *arguments)
        return future

    def events(self) -> Iterator[Event]:
        """Progress that the workers have reported since the last call.

        Raises:
            WorkerDiedError: There has been no worker for a while.
        """
        self._look_for_workers()
        while not self._events.empty():
            yield self._events.get()

    def _check_workers(self, address: str, files: tuple[OwnFile, ...]) -> None:
        """Wait for a worker; refuse those that can't make our runs or have other code."""
        try:
            self._client.wait_for_workers(1, timeout=WORKER_TIMEOUT_S)
        except TimeoutError:
            raise ValueError(
                f"`scheduler` must have a worker, got {address} with none for "
                f"{WORKER_TIMEOUT_S:.0f} s: start one by `dask worker {address}` in this checkout."
            ) from None
        answers = self._client.run(code_hash, on_error="return")
        for name, answer in answers.items():
            if answer != code_hash():
                raise ValueError(
                    f"`scheduler` must have workers with this code ({code_hash()}), got {name} "
                    f"with {answer!r}: start it in this checkout."
                )
        for name, answer in self._client.run(changed_file, files, on_error="return").items():
            if answer:
                raise ValueError(
                    f"`scheduler` must have workers with the same own files, got {name}, where "
                    f"{answer}: copy the file there."
                )

    def _look_for_workers(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        with contextlib.suppress(Exception):  # a lost scheduler cancels the futures
            if self._client.nthreads():
                self._seen = now
        if now - self._seen > WORKER_TIMEOUT_S:
            raise WorkerDiedError(
                f"the scheduler has had no worker for {WORKER_TIMEOUT_S:.0f} s; finished runs are "
                "stored: the same command goes on from there."
            )

    def close(self) -> None:
        """Cancels what still runs."""
        self._executor.shutdown(wait=False)
        self._client.close()


Executor = InProcess | OneProcess | Dask


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C waits until this ends, and never reaches the processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where processes inherit no such thing
        yield
        return
    resource_tracker.ensure_running()  # started later, it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

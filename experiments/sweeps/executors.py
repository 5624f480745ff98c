"""Where tasks run: in this process, in others of this machine, or in a Dask cluster (`cluster`).

An executor has `capacity`, the number of tasks that it takes at a time; `report`, which a task
calls with its progress; `submit`, which returns a future; `events`, the progress since the last
call; and `close`. Each worker process has its own executor: if it dies, only its current run is
lost, and runs on the stream that it has already built can be given to it.
"""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from experiments.sweeps import worker
from experiments.sweeps.cluster import Dask
from experiments.sweeps.worker import Event, Report

TERMINATE_TIMEOUT_S = 5.0  # then it is killed


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
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._future = Future[Any]()
        self._pipe, of_process = context.Pipe()
        # Its own, since what it imports makes files there, and it is ended without notice.
        self._temporary = tempfile.mkdtemp(prefix="ewc-plugin-")
        arguments = (of_process, self._temporary)
        self._process = context.Process(target=worker.serve, args=arguments, daemon=True)
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
                    self._future.set_exception(content)
        except (EOFError, OSError):
            if not self._future.done():
                self._future.set_exception(BrokenExecutor("the process died"))


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

"""Where runs are made: in this process, in others of this machine, or by the workers of a cluster.

Each lane wraps a standard executor. It has `capacity`, the number of tasks that it takes at a time;
`tell`, which a task calls to say how far it is; and `submit`, `drain`, `renew` and `close`. A
process has a lane of its own, so that one which dies takes nothing along, and so that its next run
can be one on the stream which it holds already.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from experiments.sweeps import worker
from experiments.sweeps.worker import Event, Tell

CONNECT_TIMEOUT_S = 5.0


class Here:
    """This process: a task is done when it has been submitted."""

    capacity = 1.0

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Does the task; Ctrl-C is not one of its results."""
        future: Future[Any] = Future()
        try:
            future.set_result(task(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def drain(self) -> Iterator[Event]:
        """Nothing: `tell` has told it."""
        return iter(())

    def renew(self) -> None:
        """Nothing can have died."""

    def close(self) -> None:
        """Nothing is open."""


class OneProcess:
    """A pool of one process, which is made anew when it dies."""

    capacity = 1.0
    tell = staticmethod(worker.tell_parent)

    def __init__(self) -> None:
        self._open()

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Hands the task to the process."""
        with _interrupts_held():  # the process inherits it: Ctrl-C is the parent's business
            try:
                return self._pool.submit(task, *arguments)
            except BrokenExecutor:  # it died since its last task
                self.renew()
                return self._pool.submit(task, *arguments)

    def drain(self) -> Iterator[Event]:
        """What the process has told since."""
        while self._events.poll():
            yield self._events.recv()

    def renew(self) -> None:
        """A new process in place of one that died."""
        self.close()
        self._open()

    def close(self) -> None:
        """Gives up what runs."""
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        self._pool.shutdown(cancel_futures=True)
        self._events.close()

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._events, to_parent = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            1, context, initializer=worker.start, initargs=(to_parent,)
        )


class Cluster:
    """The workers of a Dask scheduler, which itself repeats what a lost worker had.

    Args:
        address: Of the scheduler, such as tcp://host:8786.

    Raises:
        ValueError: It can't be reached, or `distributed` is not installed.
    """

    capacity = math.inf
    tell = staticmethod(worker.tell_cluster)

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise ValueError(
                f"`scheduler` needs Dask, got {address}: install it by pip install "
                "'ewc-plugin[cluster]'."
            ) from None
        try:
            self._client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"`scheduler` must be the address of a running Dask scheduler, got {address} "
                f"({reason})."
            ) from None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._client.subscribe_topic(worker.TOPIC, lambda event: self._events.put(event[1]))
        # Not pure: --force repeats what the scheduler may remember.
        self._executor = self._client.get_executor(pure=False)

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Hands the task to the scheduler."""
        future: Future[Any] = self._executor.submit(task, *arguments)
        return future

    def drain(self) -> Iterator[Event]:
        """What the workers have told since."""
        while not self._events.empty():
            yield self._events.get()

    def renew(self) -> None:
        """The scheduler replaces its workers itself."""

    def close(self) -> None:
        """Gives up what runs."""
        self._executor.shutdown(wait=False)
        self._client.close()


Lane = Here | OneProcess | Cluster


@contextmanager
def _interrupts_held() -> Iterator[None]:
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

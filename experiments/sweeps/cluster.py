"""Runs on the workers of a Dask cluster: each worker that has this code makes one at a time."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from experiments.results.provenance import code_hash
from experiments.results.record import one_line
from experiments.settings.own import OwnFile, changed_file
from experiments.sweeps import worker
from experiments.sweeps.worker import Event, WorkerDiedError

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0  # of the scheduler
WORKER_TIMEOUT_S = 60.0  # without any usable worker, or without a sign of life from one
LOOK_EVERY_S = 1.0
LOGGERS = ("distributed", "tornado", "asyncio")  # their lines on a lost scheduler are tracebacks


class Dask:
    """The workers of a Dask scheduler, which may come and go; one with other code gets no run.

    Args:
        address: Of the scheduler, such as tcp://host:8786.
        files: Own files, which every worker must have in the same place.

    Raises:
        ValueError: It can't be reached, has no worker with this code, or `distributed` is not
            installed.
    """

    report = staticmethod(worker.report_to_cluster)

    def __init__(self, address: str, files: tuple[OwnFile, ...] = ()) -> None:
        self.address = one_line(address)
        self._files = files
        self._client = _connect(address)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._asked: set[str] = set()  # workers
        self._code: dict[str, str] = {}  # by worker: its code's hash, or why it has none
        self._heard: dict[str, tuple[Any, float]] = {}  # by worker: its last sign of life, our time
        self._usable: list[str] = []
        self._running: dict[str, Future[Any]] = {}  # by worker
        self._looked = self._seen = time.monotonic()  # `_seen`: when a worker was usable
        # Not pure: --force repeats what the scheduler may remember.
        self._executor = self._client.get_executor(pure=False)
        try:
            self._client.subscribe_topic(worker.TOPIC, self._hear)
            self._wait_for_workers()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> float:
        """One run for each worker, whatever number of threads it has."""
        return len(self._usable)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Hand the call to a free worker; the future is cancelled if that is lost."""
        busy = [name for name, future in self._running.items() if not future.done()]
        name = next(name for name in self._usable if name not in busy)
        future: Future[Any] = self._executor.submit(function, *arguments, workers=[name])
        self._running[name] = future
        return future

    def events(self) -> Iterator[Event]:
        """Progress that the workers have reported since the last call.

        Raises:
            WorkerDiedError: The scheduler is lost, or has had no usable worker for a while.
        """
        if self._client.status in ("closing", "closed"):
            raise WorkerDiedError(f"the scheduler at {self.address} was lost")
        if self._client.status != "running":  # it connects again, and workers will be others
            self._usable = []
        elif time.monotonic() - self._looked > LOOK_EVERY_S:
            self._look()
        if time.monotonic() - self._seen > WORKER_TIMEOUT_S:
            raise WorkerDiedError(
                f"the scheduler at {self.address} has had no worker for {WORKER_TIMEOUT_S:.0f} s"
                f"{self._refused()}"
            )
        while not self._events.empty():
            yield self._events.get()

    def close(self) -> None:
        """Close the connection; runs that have not ended are lost."""
        self._client.close(timeout=CONNECT_TIMEOUT_S)

    def _hear(self, event: Any) -> None:
        self._events.put(Event(*event[1]))

    def _wait_for_workers(self) -> None:
        """Wait until a worker has this code; raise a `ValueError` if all have other code."""
        while not self._usable:
            self._look()
            if self._code and len(self._code) == len(self._asked) and not self._usable:
                files = " and the same own files" if self._files else ""
                raise ValueError(
                    f"`scheduler` must have a worker with this code ({code_hash()}){files}, got "
                    f"{self.address}{self._refused()}: start one in this checkout."
                )
            if time.monotonic() - self._seen > WORKER_TIMEOUT_S:
                raise ValueError(
                    f"`scheduler` must have a worker, got {self.address} with none for "
                    f"{WORKER_TIMEOUT_S:.0f} s{self._refused()}: start one by `dask worker "
                    f"{self.address}` in this checkout."
                )
            time.sleep(0.1)

    def _look(self) -> None:
        """Ask new workers for their code, note which are usable, and give up lost ones' runs."""
        self._looked = time.monotonic()
        try:
            identity = self._client.scheduler.identity
            found = self._client.sync(identity, callback_timeout=ANSWER_TIMEOUT_S)["workers"]
        except Exception:  # a slow scheduler; `events` notices a lost one
            return
        found = {name: state for name, state in found.items() if self._is_alive(name, state)}
        for name in self._asked - found.keys():
            self._asked.discard(name)
            self._code.pop(name, None)
        for name in found.keys() - self._asked:
            self._asked.add(name)
            threading.Thread(target=self._ask, args=(name,), daemon=True).start()
        self._usable = [
            name
            for name, state in found.items()
            if state["status"] == "running" and self._code.get(name) == code_hash()
        ]
        if self._usable:
            self._seen = time.monotonic()
        for name in self._running.keys() - found.keys():
            self._running.pop(name).cancel()

    def _is_alive(self, name: str, state: dict[str, Any]) -> bool:
        """Whether a worker still gives signs of life, and goes on with what it was given."""
        now = time.monotonic()
        if self._heard.get(name, (None,))[0] != state["last_seen"]:
            self._heard[name] = state["last_seen"], now
        executing = state["metrics"].get("task_counts", {}).get("executing", 0)
        stuck = state["status"] == "paused" and not executing  # short of memory
        return now - self._heard[name][1] < WORKER_TIMEOUT_S and not stuck

    def _ask(self, name: str) -> None:
        """Find out a worker's code, in a thread: it may take a while to import ours, or hang."""
        try:
            answer = self._answer(name, code_hash)
            changed = self._answer(name, changed_file, self._files) if self._files else ""
            if changed:
                answer = f"another own file: {changed}"
        except Exception as error:
            answer = one_line(repr(error))
        self._code[name] = answer
        if self._code[name] != code_hash():
            note = f"NOTE: the worker {name} gets no run, since its code is {self._code[name]}."
            self._events.put(Event("", 0, 0.0, note))

    def _answer(self, name: str, function: Callable[..., str], *arguments: Any) -> str:
        run, limit = self._client.run, WORKER_TIMEOUT_S
        answers = run(function, *arguments, workers=[name], callback_timeout=limit)
        return str(answers[name])

    def _refused(self) -> str:
        """Return the workers that have other code or none, with the reason."""
        others = [f"{name} with {c}" for name, c in sorted(self._code.items()) if c != code_hash()]
        return f" ({', '.join(others)})" if others else ""


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            f"`scheduler` needs Dask, got {one_line(address)}: install it by pip install "
            "'ewc-plugin[cluster]'."
        ) from None

    class OurClient(Client):  # type: ignore[misc]
        """Closed by us alone: for one that could not connect, `__del__` prints a traceback."""

        def start(self, **options: Any) -> None:
            """Connect; something that accepts connections and never answers is given up."""
            super().start(callback_timeout=CONNECT_TIMEOUT_S + ANSWER_TIMEOUT_S, **options)

        def __del__(self) -> None:
            pass

    for name in logging.root.manager.loggerDict:  # some have a level of their own
        if name.split(".")[0] in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        return OurClient(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except Exception as error:  # every protocol and every name has its own
        silent = isinstance(error, TimeoutError | asyncio.TimeoutError)  # two types until 3.11
        reason = one_line(str(error) or ("timed out" if silent else type(error).__name__))
        raise ValueError(
            f"`scheduler` must be the address of a running Dask scheduler, got {one_line(address)} "
            f"({reason})."
        ) from None

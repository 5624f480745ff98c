"""A Dask cluster that is not there, has no worker or other code, or is lost: one line, no hang."""

import asyncio
import operator
import socket
import threading
import time
from concurrent.futures import wait

import pytest
from rich.console import Console

from experiments.data.sources import find_data
from experiments.results import provenance
from experiments.results.provenance import code_hash
from experiments.results.store import Store
from experiments.settings.grids import PermutedMnist
from experiments.sweeps import cluster as module
from experiments.sweeps.cluster import Dask
from experiments.sweeps.sweep import sweep
from experiments.sweeps.worker import WorkerDiedError

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Dask's, on what it sees of the machine
DIGITS = find_data("digits", None)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.1)


@pytest.fixture
def cluster():
    """A scheduler in this process, without workers yet."""
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(n_workers=0, silence_logs=False, **options) as running:
        yield running


def in_time(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class OtherCode:
    """Gives another hash here than on the workers, which get `code_hash` itself."""

    def __call__(self):
        return "0123456789ab"

    def __reduce__(self):
        return operator.attrgetter("code_hash"), (provenance,)


def one_line_of(error):
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize(
    "address",
    [
        *("tcp://127.0.0.1:1", "x", "", "tcp://", "tls://127.0.0.1:1", "http://127.0.0.1:1", "λ"),
        *("tcp://127.0.0.1:abc", "inproc://x", "tcp://[::1", "a\nb", "x" * 5000),
    ],
)
def test_an_address_without_a_scheduler_is_refused(address):
    with pytest.raises(ValueError, match="`scheduler` must be the address of a running") as error:
        Dask(address)
    assert len(one_line_of(error)) < 1200


def test_something_that_never_answers_is_no_scheduler(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match="must be the address of a running .*timed out"):
            Dask(address)


@pytest.mark.parametrize("error", [TimeoutError, asyncio.TimeoutError])
def test_a_timeout_without_words_gets_some(monkeypatch, error):
    def start(self, **options):
        raise error

    monkeypatch.setattr(distributed.Client, "start", start)
    with pytest.raises(ValueError, match="must be the address of a running .*timed out"):
        Dask("tcp://127.0.0.1:1")


def test_a_cluster_without_a_worker_is_refused_after_a_while(cluster, monkeypatch):
    monkeypatch.setattr(module, "WORKER_TIMEOUT_S", 1.0)
    with pytest.raises(ValueError, match="`scheduler` must have a worker, got .* none for 1 s"):
        Dask(cluster.scheduler_address)


def test_a_worker_of_other_code_is_refused_at_once(cluster, monkeypatch):
    cluster.scale(1)
    monkeypatch.setattr(module, "code_hash", OtherCode())
    with pytest.raises(ValueError, match=r"this code \(0123456789ab\), got ") as error:
        Dask(cluster.scheduler_address)
    assert f"with {code_hash()}): start one in this checkout." in one_line_of(error)


def test_a_worker_that_comes_late_is_waited_for(cluster):
    timer = threading.Timer(1.0, cluster.scale, [1])
    timer.start()
    executor = Dask(cluster.scheduler_address)
    try:
        assert executor.capacity == 1
        assert executor.submit(abs, -3).result() == 3
    finally:
        executor.close()


def test_a_later_worker_of_other_code_gets_no_run_and_is_named(cluster, monkeypatch):
    cluster.scale(1)
    executor = Dask(cluster.scheduler_address)
    monkeypatch.setattr(module, "code_hash", OtherCode())
    executor._code = {name: OtherCode()() for name in executor._code}  # the first has this code
    cluster.scale(2)
    notes = []
    try:
        assert in_time(lambda: notes.extend(e.note for e in executor.events()) or notes)
        assert "gets no run, since its code is" in notes[0]
        assert executor.capacity == 1
    finally:
        executor.close()


def test_the_run_of_a_lost_worker_is_given_up_and_others_are_waited_for(cluster, monkeypatch):
    cluster.scale(1)
    executor = Dask(cluster.scheduler_address)
    future = executor.submit(time.sleep, 3)
    try:
        cluster.scale(0)
        assert in_time(lambda: list(executor.events()) or future.cancelled())
        assert wait([future], timeout=60).done
        assert executor.capacity == 0
        cluster.scale(1)
        assert in_time(lambda: list(executor.events()) or executor.capacity)
        assert executor.submit(abs, -3).result() == 3
        monkeypatch.setattr(module, "WORKER_TIMEOUT_S", 1.0)
        cluster.scale(0)
        with pytest.raises(WorkerDiedError, match="has had no worker for 1 s"):
            in_time(lambda: list(executor.events()))
    finally:
        executor.close()


def test_a_worker_without_signs_of_life_counts_as_lost(cluster, monkeypatch):
    cluster.scale(1)
    executor = Dask(cluster.scheduler_address)
    now = time.monotonic()
    state = {"last_seen": 1.0, "status": "running", "metrics": {"task_counts": {}}}
    try:
        assert executor._is_alive("a", state)
        assert not executor._is_alive("b", {**state, "status": "paused"})
        running = {"task_counts": {"executing": 1}}
        assert executor._is_alive("b", {**state, "status": "paused", "metrics": running})
        monkeypatch.setattr(time, "monotonic", lambda: now + 100)
        assert not executor._is_alive("a", state)
        assert executor._is_alive("a", {**state, "last_seen": 2.0})
    finally:
        monkeypatch.undo()
        executor.close()


def test_a_lost_scheduler_ends_the_sweep_in_one_line_and_finished_runs_stay(tmp_path, capfd):
    with distributed.LocalCluster(
        n_workers=1, processes=False, threads_per_worker=1, dashboard_address=None
    ) as running:
        store = Store(tmp_path)
        values = {"methods": ("naive",), "experiences": (2,), "hidden_size": (8,), "epochs": (2,)}
        cells = list(PermutedMnist(seeds=tuple(range(30)), **values).cells("digits"))

        def lose():
            assert in_time(lambda: store.finished())
            running.close()

        thread = threading.Thread(target=lose)
        thread.start()
        with pytest.raises(WorkerDiedError, match="was lost; the same command") as error:
            sweep(
                cells,
                DIGITS,
                store,
                processes=1,
                console=Console(quiet=True),
                scheduler=running.scheduler_address,
            )
        thread.join()
    assert one_line_of(error).endswith("the same command goes on from what is stored.")
    assert 1 <= len(store.finished()) < len(cells)
    assert "Traceback" not in capfd.readouterr().err

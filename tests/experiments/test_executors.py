"""Every run ends once, whatever becomes of the process that makes it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pandas as pd
import psutil
import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.data.sources import find_data
from experiments.results import schemas, tables
from experiments.results.provenance import code_hash
from experiments.results.store import PARTS, Store
from experiments.settings.grids import PermutedMnist
from experiments.settings.own import find_function
from experiments.sweeps import sweep as sweep_module
from experiments.sweeps import worker
from experiments.sweeps.executors import Dask, OneProcess
from experiments.sweeps.queue import Task
from experiments.sweeps.sweep import MAX_ATTEMPTS, WorkerDiedError, sweep
from experiments.sweeps.worker import TaskError
from experiments.training.loggers import Logs
from support.paths import ROOT

DIGITS = find_data("digits", None)
holds_signals = pytest.mark.skipif(
    not hasattr(signal, "pthread_sigmask"), reason="signals are not held here"
)
TIMES = ["train_s", "fisher_s", "eval_s", "peak_rss_mb", "measured_at", "digest"]


def no_rows(cell, source):
    return []


def cells(**changes):
    values = {"experiences": (2,), "epochs": (1,), "hidden_size": (8,), "methods": ("naive", "ewc")}
    values |= {"seeds": (0, 1), "ewc_lambda": (10.0,)} | changes
    return list(PermutedMnist(**values).cells("digits"))


class CountingStore(Store):
    """Knows how often each run was added."""

    def __init__(self, folder):
        super().__init__(folder)
        self.added = Counter()

    def add(self, result):
        self.added[result.record["run_id"]] += 1
        super().add(result)


def results(store):
    accuracy, runs = store.write_tables()
    return accuracy, runs.drop(columns=TIMES)


def assert_same_results(one, other):
    for a, b in zip(results(one), results(other), strict=True):
        pd.testing.assert_frame_equal(a, b)


def run_here(wanted, folder):
    store = CountingStore(folder)
    sweep(wanted, DIGITS, store, processes=1, console=Console(quiet=True))
    return store


class FakeExecutor:
    """Makes runs at once, except for those whose process dies."""

    capacity = 1.0

    def __init__(self, deadly, deaths):
        self.deadly, self.deaths = deadly, deaths
        self.died = 0
        self.report = lambda event: None

    def submit(self, task, code, cell, *arguments):
        future = Future()
        if cell.run_id == self.deadly and self.died < self.deaths:
            self.died += 1
            future.set_exception(BrokenExecutor("died"))
        else:
            future.set_result(task(code, cell, *arguments))
        return future

    def events(self):
        return iter(())

    def close(self):
        pass


@pytest.fixture
def fake_executors(monkeypatch):
    def use(deadly, deaths):
        executors = [FakeExecutor(deadly, deaths)]
        monkeypatch.setattr(sweep_module, "_open_executors", lambda *arguments: executors)
        return executors[0]

    return use


def test_a_run_whose_process_dies_is_tried_again(tmp_path, fake_executors, capsys):
    wanted = cells()
    whole = run_here(wanted, tmp_path / "whole")
    executor = fake_executors(wanted[1].run_id, MAX_ATTEMPTS - 1)
    store = CountingStore(tmp_path / "died")
    sweep(wanted, DIGITS, store, processes=2, console=Console())
    assert executor.died == MAX_ATTEMPTS - 1
    assert capsys.readouterr().out.count("its process died; it is tried again") == MAX_ATTEMPTS - 1
    assert store.added == Counter({cell.run_id: 1 for cell in wanted})
    assert_same_results(store, whole)


def test_a_run_whose_process_always_dies_is_a_failed_row(tmp_path, fake_executors):
    wanted = cells()
    executor = fake_executors(wanted[0].run_id, 100)
    store = CountingStore(tmp_path)
    sweep(wanted, DIGITS, store, processes=2, console=Console(quiet=True))
    assert executor.died == MAX_ATTEMPTS
    runs = store.write_tables()[1].set_index("run_id")
    assert runs.loc[wanted[0].run_id, "status"] == "failed"
    assert "its process died 3 times" in runs.loc[wanted[0].run_id, "reason"]
    assert (runs.drop(index=wanted[0].run_id)["status"] == "ok").all()
    checks = [Task(wanted[0], no_rows)]
    with pytest.raises(WorkerDiedError, match="the checks on .* failed: its process died 3 times"):
        sweep(wanted[1:], DIGITS, store, processes=2, console=Console(quiet=True), checks=checks)


@pytest.mark.slow
def test_a_process_that_died_between_tasks_is_replaced():
    executor = OneProcess()
    try:
        for number in (3, 4):
            with pytest.raises(BrokenExecutor):
                executor.submit(os._exit, 1).result()
            assert executor.submit(abs, -number).result() == number
        with pytest.raises(TaskError, match="ValueError: invalid literal"):
            executor.submit(int, "x").result()
        executor._process.kill()
        executor._process.join()
        assert executor.submit(abs, -5).result() == 5
    finally:
        executor.close()


@pytest.mark.slow
@holds_signals
def test_an_interrupt_while_a_process_starts_is_not_lost(monkeypatch):
    start = SpawnProcess.start

    def interrupted(process):
        start(process)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    # What started the tests may have set it to be ignored, as a shell does in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            OneProcess()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@holds_signals
def test_an_interrupt_reaches_no_worker_process():
    executor = OneProcess()
    try:
        held = executor.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    finally:
        executor.close()
    assert signal.SIGINT in held
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def kill_one(find, parts, killed):
    """Kills what `find` gives as soon as a first result is stored."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(parts.glob("*.json")) and (process := find()):
            os.kill(process, signal.SIGKILL)
            killed.append(process)
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_process_of_the_pool_costs_nothing(tmp_path, capsys):
    wanted = cells(seeds=(0, 1, 2), epochs=(5,))
    whole = run_here(wanted, tmp_path / "whole")
    store = CountingStore(tmp_path / "killed")

    def a_child():
        lines = [(p.pid, " ".join(p.cmdline())) for p in psutil.Process().children()]
        return next((pid for pid, line in lines if "spawn_main" in line), None)

    killed = []
    thread = threading.Thread(target=kill_one, args=(a_child, store.folder / PARTS, killed))
    thread.start()
    sweep(wanted, DIGITS, store, processes=2, console=Console(), checkpoint=True)
    thread.join()
    assert killed
    assert "its process died; it is tried again" in capsys.readouterr().out
    assert store.added == Counter({cell.run_id: 1 for cell in wanted})
    assert_same_results(store, whole)


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers on loopback: the file with its address, the workers."""
    file = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    module = [sys.executable, "-m"]
    where = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file)]
    processes = [
        subprocess.Popen(
            [*module, "distributed.cli.dask_scheduler", "--port", "0", *where], **quiet
        )
    ]
    options = ["--nthreads", "2", "--no-nanny", "--local-directory", str(tmp_path)]
    processes += [
        subprocess.Popen([*module, "distributed.cli.dask_worker", *where, *options], **quiet)
        for _ in range(2)
    ]
    yield file, processes[1:]
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's, on what it sees of the machine
def test_a_dask_cluster_that_loses_a_worker_loses_no_run(tmp_path, cluster):
    file, workers = cluster
    address = json.loads(wait_for(file).read_text())["address"]
    wanted = cells(seeds=(0, 1, 2, 3), epochs=(3,))
    whole = run_here(wanted, tmp_path / "whole")
    store = CountingStore(tmp_path / "cluster")
    killed = []
    arguments = (lambda: workers[0].pid, store.folder / PARTS, killed)
    thread = threading.Thread(target=kill_one, args=arguments)
    thread.start()
    options = {"console": Console(quiet=True), "scheduler": address, "checkpoint": True}
    logs = Logs(tmp_path / "logs", tensorboard=True)
    sweep(wanted, DIGITS, store, processes=2, logs=logs, **options)
    thread.join()
    assert killed
    assert workers[0].wait() == -signal.SIGKILL
    assert store.added == Counter({cell.run_id: 1 for cell in wanted})
    assert_same_results(store, whole)
    assert {path.name for path in logs.folder.iterdir()} == {cell.run_id for cell in wanted}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's, on what it sees of the machine
def test_workers_of_a_cluster_need_the_same_own_files(tmp_path, cluster):
    address = json.loads(wait_for(cluster[0]).read_text())["address"]
    own = tmp_path / "own.py"
    own.write_text("def plugins():\n    return []\n")
    file = find_function("method", f"{own}:plugins").file
    for wrong, said in (
        (replace(file, sha256="0" * 64), "is not the file that the command began with"),
        (replace(file, path=str(tmp_path / "elsewhere.py")), "can't be read here"),
    ):
        with pytest.raises(ValueError, match="with this code .* and the same own files") as error:
            Dask(address, (wrong,))
        assert said in str(error.value)
    quick = ["--dataset", "digits", "--experiences", "2", "--hidden-size", "8", "--epochs", "1"]
    options = [*quick, "--methods", "naive", f"{own}:plugins", "--scheduler", address]
    assert main(["sweep", *options, "--out", str(tmp_path / "out")]) == 0
    accuracy = tables.load(tmp_path / "out")["accuracy"].groupby("method")["accuracy"]
    assert accuracy.mean()["own.py:plugins"] == accuracy.mean()["naive"]


def wait_for(file):
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return file


def command(folder, *arguments):
    options = [
        "--methods",
        "naive",
        "--dataset",
        "digits",
        "--processes",
        "1",
        "--experiences",
        "2",
    ]
    options += ["--hidden-size", "8", "--epochs", "1", "--quiet", "--out", str(folder)]
    return [sys.executable, "-m", "experiments", "sweep", *options, *arguments]


@pytest.mark.slow
def test_two_sweeps_may_use_one_folder_at_a_time(tmp_path):
    """Seeds 0-4 and 3-7: some runs are wanted by both."""
    sweeps = [
        subprocess.Popen(command(tmp_path, "--seeds", *map(str, seeds)), cwd=ROOT)
        for seeds in (range(5), range(3, 8))
    ]
    assert [process.wait() for process in sweeps] == [0, 0]
    found = tables.load(tmp_path)
    assert sorted(found["runs"]["seed"]) == list(range(8))
    assert (found["runs"]["status"] == "ok").all()
    assert len(found["accuracy"]) == 8 * 3 * 2
    n = found["summary"].set_index("metric")["n"]
    assert n["average_accuracy"] == 8  # the one that ended last saw the other's
    assert not list(tmp_path.rglob("*.tmp"))


def test_runs_of_one_process_do_not_mix(tmp_path):
    """A Dask worker may have several threads; random numbers and their seeds are the process's."""
    wanted = cells(dropout=(0.5,))
    whole = run_here(wanted, tmp_path)
    expected = whole.write_tables()[0]
    rows = []
    threads = [
        threading.Thread(
            target=lambda c=c: rows.extend(
                worker.run_cell(code_hash(), c, DIGITS, None, None, lambda e: None).rows
            )
        )
        for c in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = ["run_id", "train_exp", "eval_exp"]
    found = tables.frame(rows, schemas.ACCURACY).sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("killed", [False, True])
def test_a_worker_leaves_no_temporary_files(tmp_path, monkeypatch, killed):
    """Avalanche imports modules that make folders there; a worker ends without notice."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    executor = OneProcess()
    made = Path(executor.submit(tempfile.mkdtemp).result(timeout=60))
    assert made.is_dir()
    assert tmp_path in made.parents
    if killed:
        executor._process.kill()
    executor.close()
    assert not list(tmp_path.iterdir())

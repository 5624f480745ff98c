"""The benchmark of runs and sweeps: the plain loop does the same work, bit for bit."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.data.sources import find_data
from experiments.settings.grids import PermutedMnist
from experiments.timing import sweep_speed
from experiments.timing.plain_loop import Timed, run_plainly
from experiments.timing.sweep_speed import (
    SweepSpeed,
    summarise_sweeps,
    time_sweeps,
)
from experiments.timing.sweep_speed import run as run_benchmark
from experiments.training.run import run


def test_the_plain_loop_has_the_accuracies_of_the_run_through_avalanche():
    source = find_data("digits", None)
    (cell,) = PermutedMnist(methods=("ewc",), seeds=(3,), experiences=(3,), epochs=(3,)).cells(
        "digits"
    )
    accuracy = pd.DataFrame(run(cell, source).rows)
    matrix = accuracy.pivot(index="train_exp", columns="eval_exp", values="accuracy")
    assert run_plainly(cell, source).accuracies == matrix.to_numpy().tolist()
    assert matrix.loc[2, 0] > 0.5  # of 0.1 by chance: something was learned


@pytest.mark.slow
def test_the_benchmark_compares_equals(tmp_path):
    sizes = ["--rounds", "1", "--experiences", "2", "--epochs", "2", "--seeds", "2"]
    assert main(["sweep-speed", "--dataset", "digits", *sizes, "--out", str(tmp_path)]) == 0
    runs = pd.read_csv(tmp_path / "sweep_speed.csv").set_index("run")
    ours = runs.drop(index="avalanche-ewc, classic path")
    assert len(ours) == 3
    assert ours["same_accuracies"].all()
    assert runs.loc["ours, fast path", "ratio"] == 1.0
    assert (runs["ratio_min"] <= runs["ratio"]).all()
    scaling = pd.read_csv(tmp_path / "sweep_scaling.csv")
    assert list(scaling["processes"]) == [1, 2, 2]
    assert list(scaling["commands"]) == [1, 1, 2]
    assert list(scaling["runs"]) == [2, 2, 2]
    assert scaling["same_accuracies"].all()
    assert list(scaling["rounds"]) == [1, 1, 1]
    assert scaling["efficiency"][0] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "`rounds` must be a whole number, >= 1 and <= 1000000, got 0"),
        (["--processes", "0"], "`processes` must be a whole number, >= 1 and <= 1024, got 0"),
        (["--seeds", "1"], "`seeds` must be 0 (no grid), or enough for every process"),
        (["--seeds", "-1"], "`seeds` must be a whole number, >= 0 and <= 1000000, got -1"),
    ],
)
def test_bad_sizes_get_a_clear_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["sweep-speed", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_second_call_goes_on_where_the_first_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_speed, "_sweep", lambda grids: (2.0, "a"))
    for name in ("_through_avalanche", "run_plainly"):
        monkeypatch.setattr(sweep_speed, name, lambda cell, source: Timed(1.0, [[0.5, 0.25]]))
    sizes = {"experiences": 2, "dataset": "digits", "out": str(tmp_path)}
    once = SweepSpeed(rounds=1, seeds=2, processes=(1,), **sizes)
    run_benchmark(once)
    first = {path.name: pd.read_csv(path) for path in tmp_path.glob("*.csv")}
    again = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    run_benchmark(once)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == again
    runs, _ = run_benchmark(replace(once, rounds=2))
    assert list(runs["rounds"]) == [2, 2, 2, 2]
    rounds = pd.read_csv(tmp_path / "sweep_speed_rounds.csv")
    assert list(rounds["round"]) == [0] * 4 + [1] * 4
    pd.testing.assert_frame_equal(rounds[:4], first["sweep_speed_rounds.csv"])


def test_other_sizes_are_other_rows(tmp_path, monkeypatch):
    path = tmp_path / "sweep_scaling_rounds.csv"
    source = find_data("digits", None)
    made = []
    monkeypatch.setattr(sweep_speed, "_sweep", lambda grids: (made.append(*grids), (2.0, "a"))[1])
    for epochs in (1, 2, 1):
        settings = SweepSpeed(rounds=1, experiences=2, epochs=epochs, processes=(1,), seeds=1)
        table = time_sweeps(settings, source, path, Console(quiet=True))
        assert list(table["epochs"]) == [epochs]
    assert [grid.epochs for grid in made] == [(1,), (2,)]
    assert sorted(pd.read_csv(path)["epochs"]) == [1, 2]
    no_grid = time_sweeps(SweepSpeed(seeds=0), source, path, Console(quiet=True))
    assert no_grid.empty
    assert sorted(pd.read_csv(path)["epochs"]) == [1, 2]


def test_a_grid_is_made_by_one_command_and_by_as_many_as_there_are_processes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sweep_speed, "_sweep", lambda grids: (made.append(grids), (2.0, "a"))[1])
    source = find_data("digits", None)
    settings = SweepSpeed(rounds=2, processes=(1, 2), seeds=5)
    path = tmp_path / "sweep_scaling_rounds.csv"
    table = time_sweeps(settings, source, path, Console(quiet=True))
    assert list(table["processes"]) == [1, 2, 2] * 2
    assert list(table["commands"]) == [1, 1, 2] * 2
    seeds = [[grid.seeds for grid in grids] for grids in made[:3]]
    assert seeds == [[(0, 1, 2, 3, 4)], [(0, 1, 2, 3, 4)], [(0, 2, 4), (1, 3)]]
    assert [[grid.processes for grid in grids] for grids in made[:3]] == [[1], [2], [1, 1]]


def test_efficiency_is_that_of_each_round():
    seconds = {(0, 1): 10.0, (0, 2): 5.0, (1, 1): 12.0, (1, 2): 8.0, (2, 1): 12.0, (2, 2): 10.0}
    rounds = pd.DataFrame([
        {
            "runs": 4,
            "round": i,
            "processes": processes,
            "commands": 1,
            "seconds": value,
            "accuracies": "a" if i else "b",
        }
        for (i, processes), value in seconds.items()
    ])
    table = summarise_sweeps(rounds).set_index("processes")
    assert list(table["rounds"]) == [3, 3]
    assert list(table.loc[2, ["efficiency_min", "efficiency", "efficiency_max"]]) == [0.6, 0.75, 1]
    assert not table["same_accuracies"].any()


def test_a_grid_that_fails_is_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_speed.sys, "executable", shutil.which("false"))
    path = tmp_path / "sweep_scaling_rounds.csv"
    source = find_data("digits", None)
    with pytest.raises(ChildProcessError, match="ended with code 1"):
        time_sweeps(SweepSpeed(seeds=2), source, path, Console(quiet=True))
    assert not path.exists()

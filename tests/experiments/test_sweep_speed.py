"""The benchmark of runs: the plain loop does the same work, bit for bit."""

from dataclasses import replace

import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.data.sources import find_data
from experiments.settings.grids import PermutedMnist
from experiments.timing import sweep_speed
from experiments.timing.plain_loop import Timed, run_plainly
from experiments.timing.sweep_speed import BUILTIN, OURS_FAST, SweepSpeed, summarise
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
    sizes = ["--rounds", "1", "--experiences", "2", "--epochs", "2"]
    assert main(["sweep-speed", "--dataset", "digits", *sizes, "--out", str(tmp_path)]) == 0
    runs = pd.read_csv(tmp_path / "sweep_speed.csv").set_index("run")
    ours = runs.drop(index=BUILTIN)
    assert len(ours) == 3
    assert ours["same_accuracies"].all()
    assert runs.loc[OURS_FAST, "ratio"] == 1.0
    assert (runs["ratio_min"] <= runs["ratio"]).all()


def test_bad_sizes_get_a_clear_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["sweep-speed", "--rounds", "0"]) == 2
    said = "`rounds` must be a whole number, >= 1 and <= 1000000, got 0"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_second_call_goes_on_where_the_first_was_stopped(tmp_path, monkeypatch):
    made = []

    def timed(cell, source):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(cell)
        return Timed(1.0, [[0.5, 0.25]])

    for name in ("_through_avalanche", "run_plainly"):
        monkeypatch.setattr(sweep_speed, name, timed)
    settings = SweepSpeed(rounds=1, experiences=2, dataset="digits", out=str(tmp_path))
    sweep_speed.run(settings)
    assert len(made) == 5  # one to warm up
    made.clear()
    longer = replace(settings, rounds=2)
    with pytest.raises(KeyboardInterrupt):
        sweep_speed.run(longer)
    made.clear()
    table = sweep_speed.run(longer)
    assert len(made) == 4  # five of the eight were kept
    assert list(table["rounds"]) == [2] * 4
    assert not (tmp_path / "cells").exists()


def test_ratios_are_those_of_each_round_and_accuracies_are_compared_in_all():
    seconds = {OURS_FAST: (10.0, 20.0), "other": (20.0, 20.0), BUILTIN: (30.0, 80.0)}
    rounds = pd.DataFrame([
        {
            "round": i,
            "run": run,
            "seconds": value,
            "accuracies": [[0.1], [0.5 + (run != OURS_FAST) * i]],
        }
        for run, values in seconds.items()
        for i, value in enumerate(values)
    ])
    table = summarise(rounds).set_index("run")
    assert list(table.loc["other", ["ratio_min", "ratio", "ratio_max"]]) == [1.0, 1.5, 2.0]
    assert list(table["average_accuracy"]) == [0.5] * 3
    assert list(table["same_accuracies"]) == [True, False, None]

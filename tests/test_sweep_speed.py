"""The benchmark of runs and sweeps: the plain loop does the same work, bit for bit."""

import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.data import find_data
from experiments.plain_loop import run_plainly
from experiments.run import run
from experiments.settings import PermutedMnist


def test_the_plain_loop_has_the_accuracies_of_the_run_through_avalanche():
    source = find_data("digits", None)
    (cell,) = PermutedMnist(methods=("ewc",), seeds=(3,), experiences=3, epochs=3).cells("digits")
    accuracy = pd.DataFrame(run(cell, source).rows)
    matrix = accuracy.pivot(index="train_exp", columns="eval_exp", values="accuracy")
    assert run_plainly(cell, source).accuracies == matrix.to_numpy().tolist()
    assert matrix.loc[2, 0] > 0.5  # of 0.1 by chance: something was learned


@pytest.mark.slow
def test_the_benchmark_compares_equals(tmp_path):
    sizes = ["--rounds", "2", "--experiences", "2", "--epochs", "2", "--seeds", "2"]
    assert main(["sweep-speed", "--dataset", "digits", *sizes, "--out", str(tmp_path)]) == 0
    runs = pd.read_csv(tmp_path / "sweep_speed.csv").set_index("run")
    ours = runs.drop(index="built-in, classic path")
    assert len(ours) == 3
    assert ours["same_accuracies"].all()
    assert runs.loc["ours, fast path", "ratio"] == 1.0
    assert (runs["ratio_min"] <= runs["ratio"]).all()
    scaling = pd.read_csv(tmp_path / "sweep_scaling.csv")
    assert list(scaling["jobs"]) == [1, 2]
    assert list(scaling["runs"]) == [2, 2]
    assert scaling["same_accuracies"].all()
    assert scaling["efficiency"][0] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--rounds", "0"], "`rounds` must be >= 1, got 0"), (["--jobs", "0"], "`jobs` one or more")],
)
def test_bad_sizes_get_a_clear_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["sweep-speed", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())

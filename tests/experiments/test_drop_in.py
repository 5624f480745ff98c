"""The study of the drop-in: lambdas are Avalanche's own best, and both methods are paired."""

import dataclasses

import pytest

from experiments.__main__ import main
from experiments.results import schemas, tables
from experiments.settings.grids import PermutedMnist, SplitMnist
from experiments.studies import drop_in


@pytest.fixture
def small(monkeypatch):
    """The study with two streams of two short experiences."""
    streams = ((PermutedMnist, 2, (10.0, 100.0)), (SplitMnist, 2, (1e4, 1e5)))
    monkeypatch.setattr(drop_in, "STREAMS", streams)
    runs = drop_in._runs

    def quick(*arguments):
        for run in runs(*arguments):
            yield dataclasses.replace(run, epochs=1, hidden_size=8)

    monkeypatch.setattr(drop_in, "_runs", quick)


@pytest.mark.slow
def test_both_methods_take_the_lambda_that_is_avalanches_best(small, tmp_path, capsys):
    arguments = ["drop-in", "--dataset", "digits", "--batch-size", "64", "--out", str(tmp_path)]
    assert main([*arguments, "--seeds", "0,1", "--processes", "1", "--dry-run"]) == 0
    assert "Then 8 paired runs" in capsys.readouterr().out
    assert main([*arguments, "--seeds", "0,1", "--processes", "1", "--quiet"]) == 0
    tuning = tables.load(tmp_path / "tuning")["runs"]
    assert tuning["validation"].all()
    assert set(tuning["method"]) == {"avalanche-ewc"}
    best = tuning.sort_values("average_accuracy").groupby("benchmark")["ewc_lambda"].last()
    runs = tables.load(tmp_path)["runs"]
    assert len(runs) == 8
    assert not runs["validation"].any()
    assert (runs["ewc_lambda"] == runs["benchmark"].map(best)).all()
    assert set(runs.loc[runs["method"] == "ewc", "normalize"]) == {"avalanche"}
    found = tables.read(tmp_path, schemas.COMPARISONS)
    found = found[found["metric"] == "average_accuracy"]
    assert set(found["n"]) == {2}
    assert set(zip(found["method"], found["other_method"], strict=True)) == {
        ("ewc", "avalanche-ewc")
    }
    assert (tmp_path / "plots" / "differences.png").exists()

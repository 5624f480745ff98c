"""The study of the drop-in: lambdas are Avalanche's own best, and both methods are paired."""

import pytest

from experiments.__main__ import main
from experiments.results import schemas, tables
from experiments.studies import drop_in


@pytest.fixture
def small(monkeypatch):
    """The study with two streams of two short experiences."""
    monkeypatch.setattr(drop_in, "STREAMS", (("permuted", (2,)), ("split", (2,))))
    grids = drop_in.DropIn.grids.fget
    small = {"epochs": (1,), "hidden_size": (8,)}
    monkeypatch.setattr(
        drop_in.DropIn, "grids", property(lambda self: [grid | small for grid in grids(self)])
    )


@pytest.mark.slow
def test_both_methods_take_the_lambda_that_is_avalanches_best(small, tmp_path, capsys):
    arguments = ["drop-in", "--dataset", "digits", "--batch-size", "64", "--out", str(tmp_path)]
    assert main([*arguments, "--seeds", "0,1", "--processes", "1", "--dry-run"]) == 0
    assert "the paired runs come after it" in capsys.readouterr().out
    assert main([*arguments, "--seeds", "0,1", "--processes", "1", "--quiet"]) == 0
    tuning = tables.load(tmp_path / "tuning")["runs"]
    assert tuning["validation"].all()
    assert set(tuning["method"]) == {"avalanche-ewc"}
    found = tables.read(tmp_path / "tuning", schemas.TUNED)
    assert len(found) == 2
    best = found.set_index("benchmark")["ewc_lambda"]
    runs = tables.load(tmp_path)["runs"]
    assert len(runs) == 16
    assert set(runs["fisher_type"].dropna()) == {"predicted", "class_mean", "class_mean_empirical"}
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

"""The factorial experiment: effects against a plain loop, and the command on two small streams."""

import itertools

import numpy as np
import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.results import tables
from experiments.studies import factorial
from experiments.studies.factorial import EFFECTS, FACTORS, TYPES, Factorial, draw_effects, effects

SEEDS = (0, 1, 2)


@pytest.fixture
def runs():
    """Accuracies at random for every cell of a class-incremental stream."""
    random = np.random.default_rng(0)
    rows = [
        {
            **{"benchmark": "split", "dataset": "mnist", "scenario": "class", "status": "ok"},
            "loss_classes": loss,
            "fisher_type": kind,
            "normalize": normalize,
            "validation": False,
            "seed": seed,
            "average_accuracy": random.uniform(),
        }
        for loss, kind, normalize, seed in itertools.product(
            ("all", "current"), TYPES, FACTORS["normalize"], SEEDS
        )
    ]
    return pd.DataFrame(rows)


def found(table, **where):
    (row,) = [row for row in table if all(row[name] == value for name, value in where.items())]
    return row


def test_an_effect_is_the_mean_over_all_other_factors(runs):
    table = list(effects(runs))
    row = found(
        table, loss_classes="current", factor="squared", level="class means", given_factor="all"
    )
    differences = []
    for seed in SEEDS:
        own = runs[(runs.seed == seed) & (runs.loss_classes == "current")]
        means = own[own.fisher_type.str.startswith("class_mean")].average_accuracy
        samples = own[own.fisher_type.isin(["empirical", "reversed"])].average_accuracy
        assert len(means) == len(samples) == 4
        differences.append(means.mean() - samples.mean())
    assert row["difference"] == pytest.approx(np.mean(differences), abs=1e-12)
    assert row["n"] == 3
    half = 4.302652729911275 * np.std(differences, ddof=1) / np.sqrt(3)  # Student, 2 degrees
    assert row["ci_high"] - row["difference"] == pytest.approx(half, rel=1e-9)


def test_an_effect_at_one_level_of_another_factor(runs):
    row = found(
        list(effects(runs)),
        **{"loss_classes": "all", "factor": "reversed", "level": "yes"},
        **{"given_factor": "squared", "given_level": "mini-batches"},
    )
    own = runs[runs.loss_classes == "all"].groupby("fisher_type").average_accuracy.mean()
    assert row["difference"] == pytest.approx(own["batched_reversed"] - own["batched"], abs=1e-12)


def test_the_loss_is_a_factor_over_the_whole_stream(runs):
    row = found(list(effects(runs)), factor="loss_classes", given_factor="all")
    means = runs.groupby("loss_classes").average_accuracy.mean()
    assert row["difference"] == pytest.approx(means["current"] - means["all"], abs=1e-12)


def test_a_seed_without_one_of_the_cells_does_not_count(runs):
    lost = (runs.seed == 1) & (runs.fisher_type == "batched") & (runs.normalize == "mean")
    runs.loc[lost & (runs.loss_classes == "all"), "status"] = "diverged"
    table = list(effects(runs))
    where = {"factor": "reversed", "given_factor": "all"}
    assert found(table, loss_classes="all", **where)["n"] == 2
    assert found(table, loss_classes="current", **where)["n"] == 3
    runs["status"] = "diverged"
    assert not list(effects(runs))


def test_every_effect_has_words_and_the_figure_shows_the_main_ones(runs):
    table = tables.check(pd.DataFrame(effects(runs)), EFFECTS)
    assert {(row.factor, row.level) for row in table.itertuples()} == set(factorial.WORDS)
    figure = draw_effects(table)
    assert [len(axis.get_yticks()) for axis in figure.axes] == [4, 4]


def test_mini_batches_count_where_they_are_squared_alone():
    cells = list(Factorial().searches()[0].cells("mnist"))
    batched = {cell.fisher_type for cell in cells if cell.importance_batch == 128}
    assert batched == {"batched", "batched_reversed"}
    assert batched == {cell.fisher_type for cell in cells if cell.importance_order == "shuffled"}


@pytest.mark.slow
def test_the_command_tunes_and_compares(monkeypatch, tmp_path):
    small = {"hidden_size": (8,), "epochs": (1,), "experiences": (2,), "normalize": ("none",)}
    small["fisher_type"] = ("empirical", "batched")
    grids = Factorial.grids.fget
    monkeypatch.setattr(Factorial, "grids", property(lambda self: [grids(self)[2] | small]))
    arguments = ["factorial", "--dataset", "digits", "--processes", "1", "--quiet"]
    assert (
        main([*arguments, "--out", str(tmp_path), "--seeds", "0,1", "--tuning-seeds", "100"]) == 0
    )
    table = tables.read(tmp_path, EFFECTS)
    assert set(table["n"]) == {2}
    assert set(zip(table["factor"], table["level"], strict=True)) == {("squared", "mini-batches")}
    assert (tmp_path / "effects.png").exists()
    tuned = tables.load(tmp_path / "tuning")["runs"]
    assert tuned["validation"].all()
    assert set(tuned["seed"]) == {100}

"""Whole runs on the digits beside Avalanche's EWC; the λ curves' bookkeeping."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from avalanche.training.plugins import EWCPlugin
from torch import nn

from ewc_plugin import diagonal_fisher
from experiments.data.sources import find_data
from experiments.reporting.figures.over_lambda import METRICS
from experiments.results import schemas, tables
from experiments.settings.run import RunSettings
from experiments.settings.unset import used
from experiments.studies.parity import study as parity
from experiments.studies.parity.curves import LAMBDAS, WAYS, Curves, curves, draw_ways
from experiments.studies.parity.importances import softmax_rounding
from experiments.studies.parity.numerical import beside_a_sample_loop
from experiments.studies.parity.whole_runs import same_definition, same_mathematics, trace_of
from experiments.training.run import run

DIGITS = find_data("digits", None)
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "ewc_lambda": 5.0}
ADAM = {"dropout": 0.2}


def settings(scenario="domain", fisher_type="batched", **changes):
    fields = {"epochs": 2, "batch_size": 64, "hidden_size": 16, "ewc_lambda": 100.0}
    return RunSettings(
        *("split", "digits", scenario, "ewc", 0),
        **{"fisher_type": fisher_type, "mode": "separate", **fields, **changes},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {**SGD},
        {**ADAM, "scenario": "task"},
        {**SGD, "mode": "online", "decay_factor": 0.9, "scenario": "task"},
        {**ADAM, "mode": "online", "decay_factor": 0.9},
    ],
    ids=["separate-sgd", "separate-adam-heads", "online-sgd-heads", "online-adam"],
)
def test_batched_runs_are_the_built_ins_to_the_last_bit(changes):
    rows = list(same_definition(settings(**changes), DIGITS))
    claimed = [row for row in rows if row["tolerance"] is not None]
    assert len(claimed) == 3  # importances, penalties, weights
    assert [row["largest_relative_error"] for row in claimed] == [0.0, 0.0, 0.0]
    assert all(row["ours"] > 0 for row in claimed[:2])
    value, gradient = (row["largest_relative_error"] for row in rows[3:5])
    assert value < 1e-5  # the folded penalty, in float32
    assert gradient < 1e-5


def test_the_folded_penalty_ends_at_the_same_weights_in_float64():
    rows = list(same_definition(settings(**SGD), DIGITS, double=True))
    tables.frame(rows, schemas.CHECKS)
    assert rows[-1]["what"] == "weights at the end"
    assert rows[-1]["largest_relative_error"] < 1e-12


def test_the_built_ins_draws_matter():
    run_settings = settings(**ADAM)
    builtin = trace_of("avalanche-ewc", run_settings, DIGITS)
    other = trace_of("avalanche-ewc", replace(run_settings, seed=1), DIGITS)
    assert (
        max(
            float((a - b).abs().max())
            for a, b in zip(builtin.weights.values(), other.weights.values(), strict=True)
        )
        > 1e-3
    )


def test_empirical_is_the_built_in_at_batches_of_one():
    rows = list(same_mathematics(settings(fisher_type="empirical", **SGD), DIGITS, double=True))
    assert rows[0]["largest_relative_error"] <= 1e-12
    assert rows[0]["verdict"] == "equal"
    assert rows[1]["largest_relative_error"] <= 1e-12


def test_predicted_is_the_sample_loops_and_empirical_where_all_is_right():
    rows = list(beside_a_sample_loop(replace(settings(), method="naive", fisher_type=None), DIGITS))
    assert [row["verdict"] for row in rows] == ["equal"] * 3
    assert rows[2]["size"] > 50


def test_the_built_ins_rounding_on_a_sure_network_is_within_the_tolerance():
    """One sample, logits (16, 0): F of the first bias is (1 - p)^2, p = 1 / (1 + exp(-16))."""
    model = nn.Linear(1, 2).double()
    model.load_state_dict({"weight": torch.zeros(2, 1), "bias": torch.tensor([16.0, 0.0])})
    sample = [(torch.zeros(1, dtype=torch.float64), 0, 0)]
    theirs = (
        EWCPlugin(1.0)
        .compute_importances(
            model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.0), sample, "cpu", 1
        )["bias"]
        .data
    )
    ours = diagonal_fisher(model, [(sample[0][0][None], torch.tensor([0]))], "empirical")["bias"]
    exact = (math.exp(-16) / (1 + math.exp(-16))) ** 2
    bound = softmax_rounding(torch.tensor([[16.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert abs(float(ours[0]) / exact - 1) < 1e-15
    assert 1e-11 < abs(float(theirs[0]) / exact - 1) < bound < 1e-7


def test_importances_have_mini_batches_of_their_own():
    base = RunSettings(
        *("split", "digits", "domain", "avalanche-ewc", 0),
        ewc_lambda=1.0,
        mode="separate",
        batch_size=64,
        hidden_size=16,
    )
    ways = (
        {},
        {"importance_batch": 64},
        {"importance_batch": 8},
        {"importance_order": "shuffled"},
    )
    found = [
        sum(
            float(f.sum())
            for f in trace_of("avalanche-ewc", replace(base, **w), DIGITS).importances[0].values()
        )
        for w in ways
    ]
    assert found[0] == found[1]
    assert found[2] > found[0] > found[3]  # smaller batches, and sorted ones, square more


@pytest.mark.parametrize("iterations", [3, 7])  # an epoch has about 5
def test_training_has_as_many_steps_as_asked_for(iterations, monkeypatch):
    steps = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: steps.append(step(*a, **k)))
    result = run(settings(iterations=iterations, **SGD), DIGITS)
    assert result.record["status"] == "ok"
    assert len(steps) == 5 * iterations


def test_per_sample_fishers_refuse_mini_batches():
    with pytest.raises(ValueError, match="`importance_batch` must be unset where F does not"):
        settings(fisher_type="predicted", importance_batch=8)


def test_curves_have_every_way_and_count_what_diverged():
    cells = list(Curves(seeds=(0, 1)).cells("digits"))
    assert len(cells) == (len(WAYS) * len(LAMBDAS) + 1) * 2
    assert len({cell.run_id for cell in cells}) == len(cells)
    runs = pd.DataFrame([
        {
            **used(vars(cell)),
            "config_hash": cell.config_hash,
            "status": "diverged" if (cell.ewc_lambda or 0) > 100 else "ok",
            "average_accuracy": 0.9,
            "forgetting": 0.1,
        }
        for cell in cells
    ])
    table = curves(runs)
    assert len(table) == (len(WAYS) * len(LAMBDAS) + 1) * 2
    assert set(table.loc[table["ewc_lambda"] > 100, "diverged"]) == {2}
    assert set(table.loc[~(table["ewc_lambda"] > 100), "n"]) == {2}
    assert set(table.loc[table["method"] == "naive", "metric"]) == set(METRICS)
    built_in = table[table["method"] == "avalanche-ewc"]
    assert set(built_in["importance_batch"]) == {32, 128}
    assert set(built_in["importance_order"]) == {"dataset", "shuffled"}
    figure = draw_ways(runs)
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"predicted", "exact", "Naive"} <= words
    plt.close(figure)


def test_a_dry_run_computes_nothing_and_names_every_part(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parity.run(parity.Parity(dataset="digits", out=str(tmp_path), dry_run=True))
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    curves, tuning = (
        len(list(part.cells("digits"))) for part in (parity.Curves(), parity._Tuning())
    )
    assert f"{curves} of {curves} runs would run" in shown
    assert f"{tuning} of {tuning} runs would run" in shown
    assert "Then 40 paired runs" in shown
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_every_part_is_told_what_the_command_was():
    command = parity.Parity(
        checkpoint=True, scheduler="tcp://host:8786", quiet=True, processes=3, out="there"
    )
    part = Curves(**parity._shared(command, "curves"))
    assert part.out == "there/curves"
    for name in ("checkpoint", "scheduler", "quiet", "processes"):
        assert getattr(part, name) == getattr(command, name)

"""Runs on the embedded digits: the fast data path, lambda = 0, repetition, divergence."""

import dataclasses

import numpy as np
import pytest
import torch
from avalanche.evaluation.metrics import forgetting_metrics
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive

from experiments.data.sources import find_data
from experiments.data.streams import make_stream
from experiments.results.metrics import METRICS
from experiments.settings.run import RunSettings
from experiments.training.networks import make_model
from experiments.training.run import Run, run

DIGITS = find_data("digits", None)
EWC = {"fisher_type": "predicted", "ewc_lambda": 1000.0, "mode": "separate"}
BUILTIN = {"ewc_lambda": 1000.0, "mode": "separate"}
PENALTY = {"ewc": EWC, "avalanche-ewc": BUILTIN}


def settings(method="naive", benchmark="split", scenario="task", **changes):
    fields = {"n_experiences": 5, "epochs": 2, "batch_size": 32, "hidden_size": 24}
    fields |= PENALTY.get(method, {}) | changes
    return RunSettings(benchmark, "digits", scenario, method, 0, **fields)


def trained(run_settings):
    current = Run(run_settings, DIGITS)
    current.run(lambda done, accuracy: None)
    return current


def weights(current):
    return {name: p.detach() for name, p in current.model.named_parameters()}


def assert_same_bits(a, b):
    assert a.rows == b.rows or [r | {"run_id": ""} for r in a.rows] == [
        r | {"run_id": ""} for r in b.rows
    ]
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name


@pytest.mark.parametrize("benchmark", ["split", "permuted"])
def test_fast_data_gives_the_bits_of_pixels_in_the_unit_interval(benchmark):
    scenario = {"split": "task", "permuted": "domain"}[benchmark]
    n = {"n_experiences": 5 if benchmark == "split" else 2, "pixels": "unit"}
    fast = trained(settings("ewc", benchmark, scenario, **n))
    classic = trained(settings("ewc", benchmark, scenario, **n, data_path="classic"))
    assert_same_bits(fast, classic)


@pytest.mark.parametrize("method", ["naive", "avalanche-ewc", "ewc", "joint"])
@pytest.mark.parametrize(
    ("benchmark", "scenario"),
    [
        *(("split", "task"), ("split", "domain"), ("split", "class")),
        *(("permuted", "domain"), ("rotated", "domain"), ("rotated", "task")),
    ],
)
def test_fast_data_gives_the_bits_of_the_classic_stream(method, benchmark, scenario):
    n = {"n_experiences": 5 if benchmark == "split" else 2}
    fast = trained(settings(method, benchmark, scenario, **n))
    classic = trained(settings(method, benchmark, scenario, **n, data_path="classic"))
    assert_same_bits(fast, classic)


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_lambda_zero_is_naive_to_the_last_bit(scenario):
    naive = trained(settings("naive", scenario=scenario, n_experiences=2, dropout=0.5))
    ewc = trained(settings("ewc", scenario=scenario, n_experiences=2, dropout=0.5, ewc_lambda=0.0))
    for name, tensor in weights(naive).items():
        assert torch.equal(tensor, weights(ewc)[name]), name
    accuracies = [[row["accuracy"] for row in current.rows] for current in (naive, ewc)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_repeated_run_gives_the_same_rows(model):
    first, second = (run(settings("ewc", model=model), DIGITS) for _ in range(2))
    assert first.rows == second.rows
    assert first.record["status"] == "ok"


def test_a_run_measures_the_whole_matrix():
    result = run(settings("naive", "permuted", "domain", n_experiences=3), DIGITS)
    cells = {(row["train_exp"], row["eval_exp"]) for row in result.rows}
    assert cells == {(i, j) for i in range(-1, 3) for j in range(3)}
    assert {row["n_samples"] for row in result.rows} == {360}


@pytest.mark.parametrize(("method", "scenario"), [("ewc", "domain"), ("avalanche-ewc", "task")])
def test_fewer_evaluations_leave_training_as_it_is(method, scenario):
    """Every row that is measured is that of a run with all evaluations, to the last bit."""
    options = {"n_experiences": 5, "dropout": 0.3}
    full, fewer = (
        trained(settings(method, "permuted", scenario, **options, eval_every=every))
        for every in (None, 2)
    )
    rows = {(row["train_exp"], row["eval_exp"]): row | {"run_id": ""} for row in full.rows}
    found = {(row["train_exp"], row["eval_exp"]): row | {"run_id": ""} for row in fewer.rows}
    everywhere = [(i, j) for i in (-1, 1, 3, 4) for j in range(5)]
    assert sorted(found) == sorted([*everywhere, (0, 0), (2, 2)])
    assert found == {place: rows[place] for place in found}
    for name, tensor in weights(full).items():
        assert torch.equal(tensor, weights(fewer)[name]), name


def test_metrics_that_need_what_was_not_measured_are_missing():
    options = {"n_experiences": 3}
    full, fewer = (
        run(settings("naive", "permuted", "domain", **options, eval_every=every), DIGITS).record
        for every in (None, 3)
    )
    needs_all = {"forward_transfer", "forgetting"}
    for name in METRICS:
        same = np.isnan(fewer[name]) if name in needs_all else fewer[name] == full[name]
        assert same, name


def test_joint_measures_the_untrained_and_the_last_row():
    result = run(settings("joint"), DIGITS)
    assert result.record["status"] == "ok"
    assert sorted({row["train_exp"] for row in result.rows}) == [-1, 4]


@pytest.mark.slow
def test_forgetting_is_what_avalanches_own_metric_says():
    run_settings = settings("naive", scenario="domain", epochs=20)
    record = run(run_settings, DIGITS).record
    stream = make_stream(run_settings, DIGITS)
    RNGManager.set_random_seeds(0)
    model = make_model(run_settings, stream)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=32,
        train_epochs=20,
        eval_mb_size=1000,
        evaluator=EvaluationPlugin(forgetting_metrics(stream=True), loggers=[]),
    )
    strategy.eval(stream.benchmark.test_stream)
    for experience in stream.benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        last = strategy.eval(stream.benchmark.test_stream)
    (theirs,) = (v for k, v in last.items() if k.startswith("StreamForgetting"))
    assert record["forgetting_avalanche"] > 0.02
    assert record["forgetting_avalanche"] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.slow
def test_ewc_forgets_less_than_naive():
    naive, ewc = (
        run(settings(m, "permuted", "domain", epochs=15, n_experiences=3, **change), DIGITS).record
        for m, change in (("naive", {}), ("ewc", {"ewc_lambda": 30.0}))
    )
    assert ewc["forgetting"] < naive["forgetting"] - 0.05


def test_a_diverged_run_is_a_row_with_its_reason():
    result = run(settings("naive", optimizer="sgd", learning_rate=1e6), DIGITS)
    assert result.record["status"] == "diverged"
    assert "nan" in result.record["reason"] or "finite" in result.record["reason"]
    assert np.isnan(result.record["average_accuracy"])
    assert {row["train_exp"] for row in result.rows} == {-1}  # what was complete is kept


def test_a_failed_run_is_a_row_with_its_reason():
    elsewhere = dataclasses.replace(DIGITS, name="mnist", root="/nonexistent")
    record = run(settings(), elsewhere).record
    assert record["status"] == "failed"
    assert record["reason"]


def test_validation_runs_hold_out_a_sixth_of_the_training_images():
    stream = make_stream(settings(validation=True, scenario="class"), DIGITS)
    n = [
        sum(len(e.dataset) for e in s)
        for s in (stream.benchmark.train_stream, stream.benchmark.test_stream)
    ]
    assert n == [1197, 240]  # of the 1,437 training images; none of the 360 test images


@pytest.mark.parametrize(("optimizer_state", "first"), [(None, [0, 3, 6]), ("reset", [0, 0, 0])])
def test_the_optimizers_state_is_kept_or_reset(optimizer_state, first, monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def count(optimizer, *args, **kwargs):
        states = [s["step"] for s in optimizer.state.values() if "step" in s]
        seen.append(int(max(states, default=0)))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", count)
    sizes = {"n_experiences": 3, "iterations": 3, "optimizer_state": optimizer_state}
    trained(settings(benchmark="permuted", scenario="domain", **sizes))
    assert seen[::3] == first


@pytest.mark.parametrize(
    ("name", "value", "only"), [("optimizer_state", "kept", "reset"), ("pixels", "raw", "unit")]
)
def test_an_unknown_way_is_refused(name, value, only):
    with pytest.raises(ValueError, match=f"`{name}` must be one of {only} or unset, got {value}"):
        settings(**{name: value})


@pytest.mark.parametrize("benchmark", ["split", "permuted", "rotated"])
def test_pixels_are_normalised_or_in_the_unit_interval(benchmark):
    scenario = "task" if benchmark == "split" else "domain"
    streams = [
        make_stream(settings("naive", benchmark, scenario, pixels=p), DIGITS)
        for p in (None, "unit")
    ]
    normalized, unit = (s.benchmark.train_stream[0].dataset[0][0] for s in streams)
    assert 0.0 == float(unit.min()) < 0.5 < float(unit.max()) <= 1.0
    torch.testing.assert_close(normalized, (unit - 0.1307) / 0.3081)

"""The studies of the penalty: what they compute, and that they run on the digits."""

from copy import deepcopy

import pandas as pd
import pytest
import torch

from ewc_plugin import DiagonalEWCPlugin
from experiments.data.sources import find_data
from experiments.results.statistics import by_lambda
from experiments.settings.run import RunSettings
from experiments.studies.implicit_step import ImplicitStep
from experiments.studies.implicit_step import run as run_implicit_step
from experiments.studies.lambda_translation import LambdaTranslation, statistics, translate
from experiments.studies.normalized_lambda import NormalizedLambda
from experiments.timing.penalty_speed import (
    CALLS_ALONE,
    LAMBDA,
    METHODS,
    PenaltySpeed,
    make_strategy,
    measure,
    model_and_batch,
    remember,
    step_seconds,
    with_past,
)
from experiments.training.run import OPTIMIZERS
from experiments.training.trained import train

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")


def test_by_lambda_counts_what_diverged_and_leaves_it_out_of_the_mean():
    runs = pd.DataFrame({
        "ewc_lambda": [1.0, 1.0, 1.0, 10.0],
        "status": ["ok", "ok", "diverged", "diverged"],
        "average_accuracy": [0.5, 0.7, 0.1, 0.1],
        "validation": True,
    })
    one, ten = by_lambda(runs, "average_accuracy").to_dict("records")
    assert (one["metric"], one["unit"], one["validation"]) == ("average_accuracy", "fraction", True)
    assert (one["n"], one["diverged"], one["mean"]) == (2, 1, pytest.approx(0.6))
    assert (ten["n"], ten["diverged"]) == (0, 1)
    assert pd.isna(ten["mean"])


def test_normalized_lambda_is_measured_on_validation_images_and_other_seeds():
    cells = list(NormalizedLambda().cells("mnist"))
    assert all(cell.validation for cell in cells)
    assert {cell.seed for cell in cells} == {100, 101, 102, 103, 104}
    assert {cell.normalize for cell in cells} == {None, "mean"}


def test_implicit_step_has_both_ways_for_every_lambda():
    cells = list(ImplicitStep().cells("mnist"))
    assert len(cells) == len({cell.run_id for cell in cells}) == 2 * 2 * 7 * 3


@pytest.fixture(scope="module")
def digits():
    cell = RunSettings("permuted", "digits", "domain", "naive", 0, n_experiences=1, epochs=5)
    return cell, train(cell, find_data("digits", None))


def test_translated_lambda_makes_penalties_equally_strong(digits):
    cell, trained = digits
    rows = list(translate(cell, trained, LambdaTranslation(ewc_lambda=100.0)))
    assert [row["fisher"] for row in rows] == [
        "avalanche",
        "predicted",
        "empirical",
        "sampled",
        "exact",
    ]
    strength = 100.0 * rows[0]["trace"]
    for row in rows:
        assert row["same_strength_lambda"] * row["trace"] == pytest.approx(strength)
        mean_one = row["same_strength_lambda_of_f_by_its_mean"] / row["mean"]
        assert mean_one * row["trace"] == pytest.approx(strength)
    assert rows[4]["trace_of_exact"] == 1
    assert rows[1]["trace_of_exact"] < 1


def test_statistics():
    fisher = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([6.0])}
    assert statistics(fisher) == {"trace": 9.0, "mean": 3.0, "max": 6.0}


def test_training_data_is_that_of_the_experience(digits):
    _, trained = digits
    x, y, task = trained.experiences[0][:]
    assert len(x) == len(y) == len(task)
    with torch.no_grad():
        assert float((trained.model(x).argmax(1) == y).float().mean()) > 0.9


def test_penalty_speed_has_a_row_per_method_and_counts_the_memory():
    settings = PenaltySpeed(rounds=1)
    rows = {row["method"]: row for row in measure(settings, "mlp-2x256", "sgd", batch_size=4, T=3)}
    P = 784 * 256 + 256 + 256 * 256 + 256 + 2560 + 10
    mib = 4 * P / 2**20
    assert rows["in the gradient"]["state_mib"] == pytest.approx(3 * mib)
    assert rows["Avalanche"]["state_mib"] == pytest.approx(6 * mib)
    assert all(row["ratio"] > 0 for row in rows.values())


def test_the_calls_alone_make_the_plugins_step():
    torch.manual_seed(0)
    model, x = model_and_batch("mlp-2x256", 4)
    past = remember(DiagonalEWCPlugin(LAMBDA), model, 3).penalty.state_dict()
    constant = LAMBDA * sum(q["constant"] for q in past["quadratics"].values())
    assert constant > 1e-6
    ends = []
    for method in ("in the gradient", CALLS_ALONE):
        plugin = with_past(METHODS[method](), past, model, 3)
        strategy = make_strategy(deepcopy(model), OPTIMIZERS["sgd"], plugin, 3)
        strategy.optimizer.param_groups[0]["lr"] = 0.1
        with torch.no_grad():
            for p in strategy.model.parameters():
                p.add_(0.05)
        torch.manual_seed(1)  # of the dropout
        step_seconds(strategy, [x, torch.randint(0, 10, (4,))], 2)
        loss = strategy.loss + (constant if method == CALLS_ALONE else 0)  # the plugin's has it
        ends.append([*strategy.model.parameters(), loss])
    for ours, alone in zip(*ends, strict=True):
        assert torch.allclose(ours, alone, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the penalty alone makes SGD diverge:UserWarning")
def test_implicit_step_study_on_the_digits(tmp_path):
    settings = ImplicitStep(
        dataset="digits",
        processes=1,
        seeds=(0,),
        ewc_lambda=(10.0, 1e6),
        experiences=2,
        out=str(tmp_path),
    )
    table = run_implicit_step(settings)
    accuracy = table[(table["metric"] == "average_accuracy") & (table["ewc_lambda"] == 1e6)]
    by_way = accuracy.set_index(["optimizer", "penalty"])
    assert by_way.loc[("sgd", "in the gradient"), "diverged"] == 1
    assert by_way.loc[("sgd", "implicit step"), "n"] == 1
    assert (tmp_path / "implicit_step.png").stat().st_size > 10_000

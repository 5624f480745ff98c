"""The plugin's numbers as Avalanche's loggers get them."""

import io

import pytest
import torch
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from plugin_streams import benchmark, mlp, train
from torch import nn

from ewc_plugin import DiagonalEWCPlugin, ewc_metrics
from ewc_plugin.metrics import share_holding


def learner(*plugins, loggers):
    model = mlp()
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=24,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(*ewc_metrics(), loggers=loggers),
    )


def test_metrics_are_the_plugins_numbers_and_loggers_show_them():
    text = io.StringIO()
    plugin = DiagonalEWCPlugin(3.0)
    strategy = learner(plugin, loggers=[TextLogger(text)])
    stream = benchmark().train_stream
    train(strategy, stream[:1])
    first = strategy.evaluator.get_last_metrics()
    trace = sum(float(f.sum()) for f in plugin.fisher.values())
    found = {name.split("/")[0]: value for name, value in first.items()}
    assert found["EWC_FisherTrace"] == pytest.approx(trace, rel=1e-5)
    assert found["EWC_Share90"] == share_holding(plugin.fisher, 0.9)
    assert found["EWC_FisherSeconds"] == plugin.fisher_seconds
    assert found["EWC_Penalty"] == 0
    train(strategy, stream[1:])
    # One iteration per epoch: its mean is the last value, and the weights start at the anchor.
    last = strategy.evaluator.get_last_metrics()
    found = {name.split("/")[0]: value for name, value in last.items()}
    assert found["EWC_Penalty"] == float(plugin.penalty_loss) == 0
    assert found["EWC_TaskLoss"] == pytest.approx(float(plugin.task_loss), rel=1e-6)
    for name in ("EWC_Penalty", "EWC_TaskLoss", "EWC_FisherTrace", "EWC_Share90"):
        assert name in text.getvalue()


def test_epoch_mean_weighs_by_samples():
    plugin = DiagonalEWCPlugin(3.0)
    strategy = learner(plugin, loggers=[TextLogger(io.StringIO())])
    strategy.train_mb_size = 10  # 24 samples: 10, 10, 4
    seen = []

    original = plugin.after_backward

    def after_backward(learner_, **kwargs):
        original(learner_, **kwargs)
        penalty = 0.0 if plugin.penalty_loss is None else float(plugin.penalty_loss)
        seen.append((len(learner_.mb_y), penalty))

    plugin.after_backward = after_backward
    train(strategy, benchmark().train_stream)
    sizes, penalties = zip(*seen[3:], strict=True)
    assert sizes == (10, 10, 4)
    expected = sum(n * p for n, p in zip(sizes, penalties, strict=True)) / 24
    assert expected > 0
    last = strategy.evaluator.get_last_metrics()
    (found,) = (value for name, value in last.items() if name.startswith("EWC_Penalty"))
    assert found == pytest.approx(expected, rel=1e-6)


def test_strategy_without_the_plugin_is_an_error():
    with pytest.raises(ValueError, match="need a strategy with a `DiagonalEWCPlugin`"):
        train(learner(loggers=[TextLogger(io.StringIO())]), benchmark().train_stream)


def test_share_of_the_parameters_that_hold_the_fisher():
    even = {"a": torch.ones(50), "b": torch.ones(5, 10)}
    assert share_holding(even, 0.9) == pytest.approx(0.9)
    one = {"a": torch.zeros(99), "b": torch.ones(1)}
    assert share_holding(one, 0.9) == pytest.approx(0.01)

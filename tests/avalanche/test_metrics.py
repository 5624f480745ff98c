"""The plugin's numbers as Avalanche's loggers get them."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import (
    CSVLogger,
    InteractiveLogger,
    TensorboardLogger,
    TextLogger,
    WandBLogger,
)
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from ewc_plugin import DiagonalEWCPlugin, ewc_metrics
from ewc_plugin.avalanche.metrics import share_holding
from support.plugin_streams import benchmark, mlp, train
from support.wandb_files import finished_run


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


NAMES = ("EWC_Penalty", "EWC_TaskLoss", "EWC_FisherTrace", "EWC_Share90", "EWC_FisherSeconds")


def curves_of(strategy):
    """What the evaluator collected of our metrics: [(iteration, value), ...] by name."""
    everything = strategy.evaluator.get_all_metrics()
    ours = {name: c for name, c in everything.items() if name.startswith(NAMES)}
    assert {name.split("/")[0] for name in ours} == set(NAMES)
    return {name: list(zip(*curve, strict=True)) for name, curve in ours.items()}


@pytest.mark.parametrize("kind", ["interactive", "text"])
def test_those_for_people_print_them(kind, capsys):
    logger = InteractiveLogger() if kind == "interactive" else TextLogger(sys.stdout)
    strategy = learner(DiagonalEWCPlugin(3.0), loggers=[logger])
    stream = benchmark().train_stream
    for experience in stream:
        strategy.train(experience)
        strategy.eval(stream)  # prints what came after the last epoch
    printed = capsys.readouterr().out
    for name, curve in curves_of(strategy).items():
        for _, value in curve:
            assert f"{name} = {value:.4f}" in printed


def test_tensorboard_holds_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorboardLogger(tmp_path)
    strategy = learner(DiagonalEWCPlugin(3.0), loggers=[logger])
    train(strategy, benchmark().train_stream)
    logger.writer.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name, curve in curves_of(strategy).items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in curve], name


def test_avalanches_csv_has_no_column_for_them(tmp_path):
    logger = CSVLogger(tmp_path)
    strategy = learner(DiagonalEWCPlugin(3.0), loggers=[logger])
    strategy.evaluator.metrics += [*accuracy_metrics(epoch=True), *loss_metrics(epoch=True)]
    train(strategy, benchmark().train_stream)
    logger.close()
    curves_of(strategy)  # it was given them
    with (tmp_path / "training_results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    columns = "training_exp,epoch,training_accuracy,val_accuracy,training_loss,val_loss"
    assert ",".join(rows[0]) == columns
    assert (tmp_path / "eval_results.csv").read_text().count("\n") == 1


@pytest.mark.slow
def test_wandb_holds_them(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    monkeypatch.setenv("WANDB_SILENT", "true")
    # As README.md says it.
    charts = SimpleNamespace(CustomChart=wandb.plot.CustomChart)
    monkeypatch.setattr(wandb, "viz", charts, raising=False)
    params = {"mode": "offline", "id": "ours"}
    logger = WandBLogger(dir=str(tmp_path), save_code=False, params=params)
    strategy = learner(DiagonalEWCPlugin(3.0), loggers=[logger])
    train(strategy, benchmark().train_stream)
    wandb.finish()
    found = {}
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for record in finished_run(file):
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for name in items.keys() & curves_of(strategy).keys():
            step = json.loads(items["_step"])
            found.setdefault(name, []).append((step, json.loads(items[name])))
    assert found == curves_of(strategy)


def test_a_strategy_without_the_plugin_has_no_values():
    strategy = learner(loggers=[TextLogger(io.StringIO())])
    train(strategy, benchmark().train_stream)
    assert not [n for n in strategy.evaluator.get_last_metrics() if n.startswith("EWC_")]


def test_share_of_the_parameters_that_hold_the_fisher():
    even = {"a": torch.ones(50), "b": torch.ones(5, 10)}
    assert share_holding(even, 0.9) == pytest.approx(0.9)
    one = {"a": torch.zeros(99), "b": torch.ones(1)}
    assert share_holding(one, 0.9) == pytest.approx(0.01)

"""`DiagonalEWC` in the place of Avalanche's `EWC`."""

import inspect

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import EWC
from torch import nn

from ewc_plugin import DiagonalEWC, DiagonalEWCPlugin
from support.plugin_streams import assert_same, benchmark, mlp, quiet, strategy, train


def test_signature_is_avalanches_with_keyword_extras():
    theirs = list(inspect.signature(EWC).parameters.values())
    ours = list(inspect.signature(DiagonalEWC).parameters.values())
    assert theirs[-1].kind is ours[-1].kind is inspect.Parameter.VAR_KEYWORD
    for their, our in zip(theirs[:-1], ours[: len(theirs) - 1], strict=True):
        assert (their.name, their.default, their.kind) == (our.name, our.default, our.kind)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) - 1 : -1])


def test_extras_have_the_plugins_defaults():
    plugin = inspect.signature(DiagonalEWCPlugin).parameters
    extras = [p for p in plugin.values() if p.kind is p.KEYWORD_ONLY]
    strategy_defaults = inspect.signature(DiagonalEWC).parameters
    assert extras
    assert {p.name: p.default for p in extras} | {"normalize": "avalanche"} == {
        p.name: strategy_defaults[p.name].default for p in extras
    }


def test_positional_arguments_warn_as_avalanches_do():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="keyword"):
        learner = DiagonalEWC(model, optimizer, nn.CrossEntropyLoss(), 3.0, evaluator=quiet())
    assert learner.plugins[0].ewc_lambda == 3.0


def test_plugins_of_the_caller_stay_as_they_are():
    mine = []
    model = mlp()
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "evaluator": quiet()}
    for _ in range(2):
        learner = DiagonalEWC(
            model=model, criterion=nn.CrossEntropyLoss(), ewc_lambda=1, plugins=mine, **options
        )
        assert sum(isinstance(p, DiagonalEWCPlugin) for p in learner.plugins) == 1
    assert mine == []


def test_strategy_trains_as_the_plugin_does():
    stream = benchmark().train_stream
    plugin = DiagonalEWCPlugin(5, "online", 0.5, normalize="avalanche")
    by_plugin = train(strategy(mlp(), plugin), stream)
    options = {"ewc_lambda": 5, "mode": "online", "decay_factor": 0.5}
    by_strategy = train(strategy(mlp(), kind=DiagonalEWC, **options), stream)
    assert_same(by_plugin, by_strategy)


def test_further_arguments_reach_the_template():
    model, seen = mlp(), []

    class Spy(SupervisedPlugin):
        def before_eval(self, strategy, **kwargs):
            seen.append(strategy.clock.train_exp_iterations)

    stream = benchmark().train_stream
    learner = DiagonalEWC(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        ewc_lambda=1,
        train_mb_size=8,
        plugins=[Spy()],
        evaluator=quiet(),
        eval_every=1,
        peval_mode="iteration",
    )
    learner.train(stream[0], eval_streams=[stream])
    assert seen == [0, 0, 1, 2, 3]  # before; after each iteration, before it counts; at the end

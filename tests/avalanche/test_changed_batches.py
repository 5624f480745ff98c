"""Another plugin or the template changes a batch between loader and loss: a warning says so."""

import copy
import pickle
import warnings

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import (
    AGEMPlugin,
    GDumbPlugin,
    GEMPlugin,
    LwFPlugin,
    MASPlugin,
    MIRPlugin,
    ReplayPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.supervised import DER, ER_ACE, Naive
from torch import nn

from ewc_plugin import DiagonalEWCPlugin
from support.plugin_streams import benchmark, mlp, strategy, train

WORDS = "changes the {} between the data loader and the loss"


class Replaces(SupervisedPlugin):
    def before_training_iteration(self, strategy, **kwargs):
        strategy.mbatch[0] = strategy.mbatch[0] + 1


class Modifies(SupervisedPlugin):
    def before_forward(self, strategy, **kwargs):
        strategy.mbatch[0].add_(1)


class Mixes(SupervisedPlugin):
    """New labels in half of the iterations: not the first one."""

    calls = 0

    def before_forward(self, strategy, **kwargs):
        self.calls += 1
        if self.calls % 2 == 0:
            strategy.mbatch = [strategy.mbatch[0], strategy.mbatch[1].flip(0), strategy.mbatch[2]]


class Cools(SupervisedPlugin):
    def after_forward(self, strategy, **kwargs):
        strategy.mb_output = strategy.mb_output / 2


class Appends(SupervisedPlugin):
    def before_training_iteration(self, strategy, **kwargs):
        strategy.mbatch = [torch.cat([t, t[:2]]) for t in strategy.mbatch]


class Prepends(SupervisedPlugin):
    def before_forward(self, strategy, **kwargs):
        for i, t in enumerate(strategy.mbatch):
            strategy.mbatch[i] = torch.cat([t[:2], t])


class Copies(SupervisedPlugin):
    def before_forward(self, strategy, **kwargs):
        strategy.mbatch = [t.clone() for t in strategy.mbatch]


class RegularisesLate(SupervisedPlugin):
    """Borrows the batch when the loss is known."""

    def before_backward(self, strategy, **kwargs):
        kept = strategy.mbatch
        strategy.mbatch = [t + 1 for t in kept]
        strategy.mbatch = kept


def warnings_of(*plugins, model=None, stream=None, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = strategy(model or mlp(), *plugins, **options)
        train(learner, benchmark().train_stream if stream is None else stream)
    assert type(learner.plugins) is list
    return [str(w.message) for w in caught if "data loader" in str(w.message)]


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Replaces, "batch"),
        (Modifies, "batch"),
        (Mixes, "batch"),
        (Cools, "model's outputs"),
    ],
)
def test_a_plugin_that_changes_what_is_trained_on_is_named_once(other, what, place):
    plugins = [DiagonalEWCPlugin(1), other()]
    found = warnings_of(*(plugins if place == "first" else plugins[::-1]))
    assert len(found) == 1
    assert WORDS.format(what) in found[0] and found[0].startswith(other.__name__)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize(
    "make",
    [
        list,
        lambda: [Appends()],
        lambda: [Prepends()],
        lambda: [Copies()],
        lambda: [RegularisesLate()],
        lambda: [ReplayPlugin(8)],
        lambda: [LwFPlugin(1, 2)],
        lambda: [GDumbPlugin(8)],
        lambda: [SynapticIntelligencePlugin(0.1)],
        lambda: [MASPlugin()],
        lambda: [GEMPlugin(4, 0.5)],
        lambda: [AGEMPlugin(4, 4)],
        lambda: [MIRPlugin(4, 8)],
    ],
)
def test_plugins_that_add_samples_or_read_are_not_warned_of(make, place):
    others, ours = make(), DiagonalEWCPlugin(1)
    assert not warnings_of(*([ours, *others] if place == "first" else [*others, ours]))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": DER, "mem_size": 8, "batch_size_mem": 4},
        {"kind": ER_ACE, "mem_size": 8, "batch_size_mem": 4},
        {"eval_every": 1, "peval_mode": "iteration"},
        {"train_epochs": 3},
    ],
)
def test_avalanches_strategies_are_not_warned_of(options):
    assert not warnings_of(DiagonalEWCPlugin(1, fisher_type="batched"), **options)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x.mul_(2))


class ScaledInput(Naive):
    @property
    def mb_x(self):
        return self.mbatch[0] / 2


class OwnForward(Naive):
    def forward(self):
        self.mbatch[0] = self.mbatch[0] / 2
        return super().forward()


@pytest.mark.parametrize(
    "options", [{"model": InPlace()}, {"kind": ScaledInput}, {"kind": OwnForward}]
)
def test_what_the_fisher_sees_too_is_not_warned_of(options):
    assert not warnings_of(DiagonalEWCPlugin(1), **options)


class Noisy(Naive):
    def _before_forward(self, **kwargs):
        super()._before_forward(**kwargs)
        self.mbatch[0] = self.mbatch[0] + torch.randn_like(self.mbatch[0])


class NoisyInPlace(Naive):
    def _before_forward(self, **kwargs):
        super()._before_forward(**kwargs)
        self.mbatch[0] += 1


class NoisyEarlier(Naive):
    def _before_training_iteration(self, **kwargs):
        super()._before_training_iteration(**kwargs)
        self.mbatch[0] = self.mbatch[0] + 1


class Sharpened(Naive):
    def _after_forward(self, **kwargs):
        super()._after_forward(**kwargs)
        self.mb_output = self.mb_output * 2


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Noisy, "batch"),
        (NoisyInPlace, "batch"),
        (NoisyEarlier, "batch"),
        (Sharpened, "model's outputs"),
    ],
)
def test_a_template_whose_hooks_change_the_batch_is_named(kind, what):
    (found,) = warnings_of(DiagonalEWCPlugin(1), kind=kind)
    assert WORDS.format(what) in found and found.startswith(kind.__name__)


class Told(DiagonalEWCPlugin):
    def forward(self, model, batch):
        return model(batch[0] + 1)


def test_the_remedy_is_not_warned_of():
    assert not warnings_of(Told(1), Replaces())


class Stops(SupervisedPlugin):
    def after_forward(self, strategy, **kwargs):
        strategy.plugins.append(SupervisedPlugin())
        copies = copy.deepcopy(strategy.plugins[-1:]), pickle.loads(pickle.dumps(strategy.plugins))
        assert all(type(plugins) is list for plugins in copies)
        raise KeyboardInterrupt


def test_an_interrupted_run_gets_its_list_back_with_what_was_added():
    learner = strategy(mlp(), DiagonalEWCPlugin(1))
    own, others = learner.plugins, list(learner.plugins)
    learner.plugins.append(stops := Stops())
    stream = benchmark().train_stream
    with pytest.raises(KeyboardInterrupt):
        learner.train(stream[0])
    learner.plugins.remove(stops)
    learner.train(stream[0])
    assert learner.plugins is own and own[:-1] == others


def test_two_plugins_leave_the_strategys_list_as_it_was():
    learner = strategy(mlp(), DiagonalEWCPlugin(1), DiagonalEWCPlugin(2))
    own, plugins = learner.plugins, list(learner.plugins)
    for experience in benchmark(n_experiences=4).train_stream:
        learner.train(experience)
    assert learner.plugins is own and own == plugins

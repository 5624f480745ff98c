"""An implicit step is taken when, and only when, an optimizer stepped."""

import gc
import pickle

import pytest
import torch
from avalanche.training.supervised import Naive
from torch.optim.optimizer import _global_optimizer_post_hooks

from ewc_plugin import DiagonalEWCPlugin
from ewc_plugin.penalty.implicit_step import implicit_step_
from support.plugin_streams import assert_same, benchmark, mlp, strategy, train

LAMBDA = 50.0


class Accumulating(Naive):
    """Steps in every second iteration, on the gradients of both."""

    iterations = 0

    def optimizer_step(self):
        self.iterations += 1
        if self.iterations % 2 == 0:
            super().optimizer_step()


class Overflowing(Naive):
    """A gradient scaler that finds infinities in every second iteration."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        self.iterations = 0

    def backward(self):
        self.scaler.scale(self.loss).backward()
        self.iterations += 1
        if self.iterations % 2:
            next(self.model.parameters()).grad[0] = torch.inf

    def optimizer_step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update(1.0)


class TwoOptimizers(Naive):
    """One for the classifier alone, which the strategy does not know."""

    def __init__(self, *, optimizer, model, **kwargs):
        self.second = torch.optim.SGD(model.classifier.parameters(), lr=0.03)
        first = torch.optim.SGD(model.features.parameters(), lr=0.1)
        super().__init__(optimizer=first, model=model, **kwargs)

    def make_optimizer(self, **kwargs):
        pass

    def check_model_and_optimizer(self, **kwargs):
        self.model = self.model_adaptation()

    def optimizer_step(self):
        self.optimizer.step()
        self.second.step()
        self.second.zero_grad()


def steps_of(strategy_):
    second = getattr(strategy_, "second", None)
    return [strategy_.optimizer] + ([second] if second else [])


class ByHand(DiagonalEWCPlugin):
    """The reference: the template's counter says which iterations step."""

    def before_backward(self, strategy, **kwargs):
        self._hooks_called = True

    def after_update(self, strategy, **kwargs):
        if self._is_active and getattr(strategy, "iterations", 0) % 2 == 0:
            for optimizer in steps_of(strategy):
                implicit_step_(optimizer, self.penalty.pairs(strategy.model), LAMBDA)


def trained(kind, plugin_kind, fused=False, optimizer=torch.optim.SGD):
    def made(parameters, lr):
        return optimizer(parameters, lr=lr, fused=fused)

    model = mlp().double()
    plugin = plugin_kind(LAMBDA, implicit=True)
    learner = strategy(model, plugin, kind=kind, optimizer=made, lr=0.1)
    return train(learner, benchmark(dtype=torch.float64).train_stream)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [Naive, Accumulating, Overflowing])
def test_as_many_implicit_steps_as_optimizer_steps(kind, fused):
    ours, reference = trained(kind, DiagonalEWCPlugin, fused), trained(kind, ByHand, fused)
    assert_same(ours, reference)
    free = trained(kind, lambda *_, **options: DiagonalEWCPlugin(0, **options), fused)
    assert any(not torch.allclose(ours[n], free[n], rtol=1e-3) for n in ours)


def test_every_optimizer_of_a_template_is_followed():
    ours, reference = trained(TwoOptimizers, DiagonalEWCPlugin), trained(TwoOptimizers, ByHand)
    assert_same(ours, reference)


class Slower(torch.optim.SGD):
    """Its step is that of the class above, which torch hooks too."""

    def step(self, closure=None):
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """Leaves the step to an optimizer of its own, as sharpness-aware and look-ahead ones do."""

    def __init__(self, parameters, lr, fused=False):
        super().__init__(parameters, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.inner.step(closure)


@pytest.mark.parametrize("optimizer", [Slower, Wrapper])
def test_a_step_inside_of_a_step_is_not_counted_twice(optimizer):
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # now its `step` has hooks
    ours, reference = (
        trained(Naive, kind, optimizer=optimizer) for kind in (DiagonalEWCPlugin, ByHand)
    )
    assert_same(ours, reference)


def test_an_interrupted_iteration_can_be_pickled():
    plugin = DiagonalEWCPlugin(LAMBDA, implicit=True)
    learner = strategy(mlp(), plugin, optimizer=torch.optim.SGD)
    stream = benchmark().train_stream
    train(learner, stream[:1])
    learner.backward = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learner.train(stream[1])
    assert pickle.loads(pickle.dumps(plugin)).penalty.n_experiences == 1
    del learner.backward
    learner.train(stream[1])  # takes the hooks away


def test_no_hook_outlives_an_iteration_nor_an_interrupted_one():
    plugin = DiagonalEWCPlugin(LAMBDA, implicit=True)
    learner = strategy(mlp(), plugin, optimizer=torch.optim.SGD)
    stream = benchmark().train_stream
    train(learner, stream[:1])
    before = len(_global_optimizer_post_hooks)
    original, learner.backward = learner.backward, lambda: 1 / 0
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            learner.train(stream[1])
    learner.backward = original
    gc.collect()
    assert len(_global_optimizer_post_hooks) <= before + 1
    learner.train(stream[1])
    assert len(_global_optimizer_post_hooks) == before


def test_an_optimizer_that_is_not_torchs_is_refused():
    class Foreign:
        param_groups = ()

    plugin = DiagonalEWCPlugin(LAMBDA, implicit=True)
    learner = strategy(mlp(), plugin)
    learner.optimizer = Foreign()
    learner.check_model_and_optimizer = lambda **kwargs: None
    with pytest.raises(ValueError, match="`implicit=True` follows .* got Foreign"):
        learner.train(benchmark().train_stream[0])

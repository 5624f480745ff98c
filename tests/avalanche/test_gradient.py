"""The total gradient is right whoever else has a hand in it."""

from copy import deepcopy

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import AGEMPlugin, GEMPlugin, LwFPlugin, ReplayPlugin
from avalanche.training.supervised import Naive

from ewc_plugin import DiagonalEWCPlugin, DivergedError
from ewc_plugin.avalanche.placement import gradients_are_ours
from support.plugin_streams import InTheLoss, benchmark, mlp, strategy, train

LAMBDA = 5.0


class Clip(SupervisedPlugin):
    """Rewrites gradients."""

    def after_backward(self, strategy, **kwargs):
        torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.1)


class Halve(SupervisedPlugin):
    """Rewrites the loss."""

    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss / 2


class Scaled(Naive):
    """Scales the loss for its backward pass, as a gradient scaler does."""

    def backward(self):
        (1024 * self.loss).backward()
        for p in self.model.parameters():
            p.grad /= 1024


class ClipsItself(Naive):
    def _after_backward(self, **kwargs):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        super()._after_backward(**kwargs)


class HalvesItself(Naive):
    def _before_backward(self, **kwargs):
        super()._before_backward(**kwargs)
        self.loss = self.loss / 2


class Closure(Naive):
    """Its optimizer computes loss and gradient again, as LBFGS or a sharpness-aware one does."""

    def optimizer_step(self):
        def closure():
            self.optimizer.zero_grad()
            self.mb_output = self.forward()
            self.loss = self.criterion()
            self._before_backward()
            self.backward()
            return self.loss

        self.optimizer.step(closure)


class Again(SupervisedPlugin):
    """Computes the gradient again, at other weights, before each update."""

    def before_update(self, strategy, **kwargs):
        steps = [(p, 0.05 * p.grad) for p in strategy.model.parameters() if p.grad is not None]
        self.move(steps, 1)
        strategy.optimizer.zero_grad()
        strategy.mb_output = strategy.forward()
        strategy.loss = strategy.criterion()
        strategy._before_backward()
        strategy.backward()
        self.move(steps, -1)

    @torch.no_grad()
    def move(self, steps, sign):
        for p, step in steps:
            p.add_(sign * step)


class Twice(SupervisedPlugin):
    """Goes back through the graph of the loss a second time."""

    def before_training_exp(self, strategy, **kwargs):
        strategy.retain_graph = True

    def after_training_iteration(self, strategy, **kwargs):
        assert strategy.loss.grad_fn is not None


class HooksInForward(SupervisedPlugin):
    """Scales gradients by hooks that are there during an iteration alone."""

    def before_forward(self, strategy, **kwargs):
        parameters = strategy.model.parameters()
        self.handles = [p.register_hook(lambda gradient: gradient / 10) for p in parameters]

    def after_training_iteration(self, strategy, **kwargs):
        for handle in self.handles:
            handle.remove()


CASES = {
    "alone": ([], [], Naive, True),
    "clipping after": ([], [Clip], Naive, False),
    "template clips": ([], [], ClipsItself, False),
    "template halves the loss": ([], [], HalvesItself, False),
    "closure": ([], [], Closure, False),
    "gradient again after": ([], [Again], Naive, False),
    "gradient again before": ([Again], [], Naive, False),
    "graph kept": ([], [Twice], Naive, True),
    "hooks after": ([], [HooksInForward], Naive, True),
    "clipping before": ([Clip], [], Naive, False),
    "loss halved after": ([], [Halve], Naive, False),
    "own backward": ([], [], Scaled, False),
    "GEM after": ([], [lambda: GEMPlugin(4, 0.5)], Naive, False),
    "GEM before": ([lambda: GEMPlugin(4, 0.5)], [], Naive, False),
    "A-GEM before": ([lambda: AGEMPlugin(4, 4)], [], Naive, False),
    "replay": ([lambda: ReplayPlugin(8)], [], Naive, True),
}


@pytest.mark.filterwarnings("ignore:Converted P to scipy:UserWarning")
@pytest.mark.filterwarnings("ignore:Again changes:UserWarning")  # no watch of `InTheLoss`
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_penalty_in_the_loss(case):
    before, after, kind, fast = CASES[case]
    if "GEM" in case and "A-" not in case:
        pytest.importorskip("quadprog", reason="GEM needs a QP solver")

    stream = benchmark(dtype=torch.float64).train_stream

    def run(ewc):
        plugins = [make() for make in before] + [ewc] + [make() for make in after]
        learner = strategy(mlp().double(), *plugins, kind=kind, optimizer=torch.optim.SGD, lr=0.1)
        train(learner, stream[:1])
        assert gradients_are_ours(ewc, learner) is fast or isinstance(ewc, InTheLoss)
        return train(learner, stream[1:])

    ours, reference = run(DiagonalEWCPlugin(LAMBDA)), run(InTheLoss(LAMBDA))
    free = run(DiagonalEWCPlugin(0))
    for name in ours:
        assert torch.allclose(ours[name], reference[name], rtol=1e-9, atol=1e-12), name
    assert any(not torch.allclose(ours[n], free[n], rtol=1e-3) for n in ours)


def test_lwf_beside_it():
    learner = strategy(mlp(), LwFPlugin(), DiagonalEWCPlugin(1))
    weights = train(learner, benchmark().train_stream)
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_too_large_a_lambda_warns_once_and_the_run_stops_with_a_clear_error():
    plugin = DiagonalEWCPlugin(1e9)
    learner = strategy(mlp(), plugin, optimizer=torch.optim.SGD, lr=0.5, train_epochs=40)
    stream = benchmark().train_stream
    train(learner, stream[:1])
    with (
        pytest.warns(UserWarning, match="above .* the penalty alone makes SGD diverge") as caught,
        pytest.raises(DivergedError, match="The training diverged: the loss is .* `implicit=True`"),
    ):
        train(learner, stream[1:])
    assert len(caught) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_weights_that_stand_still_as_second_moments_overflowed_are_an_error(optimizer):
    plugin = DiagonalEWCPlugin(1e28)
    learner = strategy(mlp(), plugin, optimizer=optimizer, lr=1e-2)
    with pytest.raises(DivergedError, match=f"of {optimizer.__name__} is not finite"):
        train(learner, benchmark().train_stream)


def test_a_frozen_mask_of_minus_infinity_is_no_divergence():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
            self.mask = torch.nn.Parameter(mask, requires_grad=False)

        def forward(self, x):
            logits = self.net(x)
            return logits + (logits + self.mask).softmax(1)

    plugin = DiagonalEWCPlugin(1)
    train(strategy(Masked(), plugin), benchmark().train_stream)
    assert plugin.penalty.n_experiences == 2


def test_implicit_step_holds_every_lambda():
    plugin = DiagonalEWCPlugin(1e12, implicit=True)
    learner = strategy(mlp(), plugin, optimizer=torch.optim.SGD, lr=0.5, train_epochs=5)
    stream = benchmark().train_stream
    first = train(learner, stream[:1])
    fisher = plugin.fisher
    second = train(learner, stream[1:])
    for name in fisher:
        held = fisher[name] > 1e-6
        assert torch.allclose(first[name][held], second[name][held], atol=1e-3)
    assert any(not torch.equal(first[name], second[name]) for name in fisher)
    assert float(plugin.penalty_loss) > 0


def test_bfloat16_storage_trains_nearly_the_same():
    stream = benchmark().train_stream

    def run(**options):
        plugin = DiagonalEWCPlugin(LAMBDA, **options)
        learner = strategy(mlp(), plugin, optimizer=torch.optim.SGD, lr=0.1)
        return train(learner, stream), plugin.penalty.nbytes

    (exact, exact_bytes), (rounded, rounded_bytes) = run(), run(storage_dtype=torch.bfloat16)
    assert rounded_bytes * 3 == exact_bytes * 2
    for name in exact:
        assert torch.allclose(exact[name], rounded[name], atol=2e-3)


def test_plugin_of_another_strategy_is_refused():
    plugin = DiagonalEWCPlugin(1)
    stream = benchmark().train_stream[:1]
    learner = strategy(mlp(), plugin)
    train(learner, stream)
    with pytest.raises(ValueError, match="already belongs to another strategy"):
        train(strategy(mlp(), plugin), stream)
    train(learner, stream)


def test_plugin_that_was_trained_with_another_model_is_refused():
    plugin, stream = DiagonalEWCPlugin(1), benchmark().train_stream
    model = mlp()
    train(strategy(model, plugin), stream[:1])
    train(strategy(model, plugin), stream[1:2])  # a new strategy for the same model
    assert plugin.penalty.n_experiences == 2
    state = plugin.state_dict()
    with pytest.raises(ValueError, match="holds the Fisher of another model"):
        train(strategy(mlp(), plugin), stream[:1])
    plugin.load_state_dict(state)
    train(strategy(deepcopy(model), plugin), stream[:1])


def test_template_without_the_hooks_is_refused():
    class NoHooks(Naive):
        def training_epoch(self, **kwargs):
            for _ in self.dataloader:
                self._after_training_iteration(**kwargs)

    with pytest.raises(RuntimeError, match="NoHooks never calls `before_backward`"):
        train(strategy(mlp(), DiagonalEWCPlugin(1), kind=NoHooks), benchmark().train_stream)


def test_unknown_fisher_option():
    with pytest.raises(ValueError, match=r"`fisher_options` may have .*'max_samples'.*, got \['x'"):
        DiagonalEWCPlugin(1, fisher_options={"x": 1})


def test_fisher_options_reach_the_fisher():
    plugin = DiagonalEWCPlugin(1, fisher_options={"max_samples": 3})
    learner = strategy(mlp(), plugin)
    train(learner, benchmark().train_stream[:1])
    few = plugin.fisher
    learner.experience = benchmark().train_stream[0]
    plugin.fisher_options = {}
    every = plugin.compute_fisher(learner)
    assert any(not torch.allclose(few[n], every[n]) for n in every)

"""Beside Avalanche's other strategies, plugins and templates."""

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger
from avalanche.training.plugins import (
    AGEMPlugin,
    EarlyStoppingPlugin,
    EvaluationPlugin,
    GEMPlugin,
    LRSchedulerPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.supervised import Cumulative, JointTraining, Naive
from avalanche.training.supervised.strategy_wrappers_online import OnlineNaive
from avalanche.training.templates import SupervisedMetaLearningTemplate, SupervisedTemplate
from torch import nn

from ewc_plugin import DiagonalEWCPlugin
from support.plugin_streams import InTheLoss, assert_same, benchmark, mlp, strategy, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converted P to scipy:UserWarning"),
    pytest.mark.filterwarnings("ignore:Metric Top1_Acc_Stream used by the EarlyStopping"),
]

LAMBDA = 5.0


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)  # SI keeps what it remembers in the default
    yield
    torch.set_default_dtype(torch.float32)


class Clip(SupervisedPlugin):
    def after_backward(self, strategy, **kwargs):
        nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.1)


class Mine(SupervisedTemplate):
    """A template that somebody wrote: its own loss, backward pass and step."""

    def criterion(self):
        return super().criterion() + 0.01 * self.mb_output.square().mean()

    def backward(self):
        (8 * self.loss).backward()

    def optimizer_step(self):
        for p in self.model.parameters():
            p.grad /= 8
        super().optimizer_step()


def scheduler(learner):
    schedule = torch.optim.lr_scheduler.StepLR(learner.optimizer, 1, gamma=0.5)
    learner.plugins.append(LRSchedulerPlugin(schedule))


def metrics():
    return EvaluationPlugin(accuracy_metrics(stream=True), loggers=[BaseLogger()])


PLUGINS = {
    "nobody": list,
    "replay": lambda: [ReplayPlugin(8)],
    "LwF": lambda: [LwFPlugin(1, 2)],
    "GEM": lambda: [GEMPlugin(4, 0.5)],
    "A-GEM": lambda: [AGEMPlugin(4, 4)],
    "SI": lambda: [SynapticIntelligencePlugin(0.1)],
    "MAS": lambda: [MASPlugin()],
    "RWalk": lambda: [RWalkPlugin(delta_t=1)],
    "clipping": lambda: [Clip()],
    "early stopping": lambda: [EarlyStoppingPlugin(1, "train_stream")],
    "replay and clipping": lambda: [ReplayPlugin(8), Clip()],
}
TEMPLATES = {
    "Naive": {"kind": Naive},
    "SupervisedTemplate": {"kind": SupervisedTemplate},
    "Cumulative": {"kind": Cumulative},
    "OnlineNaive": {"kind": OnlineNaive},
    "user's": {"kind": Mine},
    "periodic eval": {"kind": Naive, "eval_every": 1},
    "eval each iteration": {"kind": Naive, "eval_every": 1, "peval_mode": "iteration"},
    "learning rate schedule": {"kind": Naive, "prepare": scheduler},
}
CASES = {
    **{f"before {name}": (make, "first", {}) for name, make in PLUGINS.items()},
    **{f"after {name}": (make, "last", {}) for name, make in PLUGINS.items()},
    **{name: (list, "first", options) for name, options in TEMPLATES.items()},
}


def run(ewc, make, place, options, stream, **more):
    options = {"optimizer": torch.optim.SGD, "lr": 0.1, **options, **more}
    prepare = options.pop("prepare", None)
    if "train_epochs" not in options and options.get("kind") is not OnlineNaive:
        options["train_epochs"] = 2
    others, ours = make(), [ewc] if ewc else []
    plugins = ours + others if place == "first" else others + ours
    learner = strategy(mlp().double(), *plugins, evaluator=metrics(), **options)
    if prepare:
        prepare(learner)
    return train(learner, stream)


@pytest.mark.parametrize("case", CASES)
def test_lambda_zero_is_bit_identical(case):
    stream = benchmark(dtype=torch.float64).train_stream
    ewc = DiagonalEWCPlugin(0)
    assert_same(run(None, *CASES[case], stream), run(ewc, *CASES[case], stream))
    assert ewc.penalty.n_experiences == 2
    assert sum(float(f.sum()) for f in ewc.fisher.values()) > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_penalty_in_the_loss(case):
    stream = benchmark(dtype=torch.float64).train_stream
    ours, reference, free = (
        run(ewc, *CASES[case], stream)
        for ewc in (DiagonalEWCPlugin(LAMBDA), InTheLoss(LAMBDA), InTheLoss(0))
    )
    for name in ours:
        assert torch.allclose(ours[name], reference[name], rtol=1e-8, atol=1e-11), name
    assert any(not torch.allclose(ours[n], free[n], rtol=1e-3) for n in ours)


def test_joint_training():
    stream = benchmark(dtype=torch.float64).train_stream

    def fitted(*plugins):
        learner = strategy(mlp().double(), *plugins, kind=JointTraining)
        torch.manual_seed(1)
        learner.train(stream)
        return learner

    ewc = DiagonalEWCPlugin(0, fisher_data="training")
    learner = fitted(ewc)
    assert_same(dict(fitted().model.named_parameters()), dict(learner.model.named_parameters()))
    parts = []
    for learner.experience in stream:
        parts.append(DiagonalEWCPlugin(0).compute_fisher(learner))
    for name, fisher in ewc.fisher.items():  # over both experiences, of 24 samples each
        torch.testing.assert_close(fisher, (parts[0][name] + parts[1][name]) / 2)


def test_early_stopping_remembers_the_weights_that_it_restores():
    class Stop(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 1:
                self.best = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
            if strategy.clock.train_exp_epochs == 3:
                strategy.model.load_state_dict(self.best)
                strategy.stop_training()

    stop, ewc = Stop(), DiagonalEWCPlugin(LAMBDA, keep_importance_data=True)
    learner = strategy(mlp(), stop, ewc, train_epochs=9)
    train(learner, benchmark(dtype=torch.float64).train_stream[:1])
    assert learner.clock.train_exp_epochs == 3
    assert_same(stop.best, ewc.penalty.history[0].anchor)


def test_meta_learning_template_is_refused_at_the_start():
    class Meta(SupervisedMetaLearningTemplate):
        def _inner_updates(self, **kwargs):
            raise AssertionError("has begun")

        _outer_update = _inner_updates

    learner = strategy(mlp(), DiagonalEWCPlugin(1), kind=Meta)
    with pytest.raises(ValueError, match="Meta is a meta-learning template, which never calls"):
        train(learner, benchmark().train_stream)

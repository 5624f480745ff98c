"""Attached late, trained again, compiled, in half precision, saved and loaded by Avalanche."""

import subprocess
import sys

import dill
import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive

from ewc_plugin import DiagonalEWC, DiagonalEWCPlugin, QuadraticPenalty
from ewc_plugin.avalanche.placement import gradients_are_ours
from support.paths import ROOT
from support.plugin_streams import (
    InTheLoss,
    assert_same,
    benchmark,
    mlp,
    multi_head,
    strategy,
    train,
)


def stream_of(n=2, **options):
    return benchmark(n_experiences=n, **options).train_stream


def named(learner):
    return dict(learner.model.named_parameters())


# ---- avalanche.checkpointing

pytestmark = pytest.mark.filterwarnings("ignore:Cannot locate reference to:Warning")

FRESH = """
import sys, dill, torch
sys.path[:0] = ["tests", "tests/avalanche"]
from test_lifecycle import *
learner, begun = maybe_load_checkpoint(checkpointed(), sys.argv[1])
assert begun == 1, begun
learner.train(stream_of()[1])
torch.save(learner.model.state_dict(), sys.argv[2])
"""


def checkpointed():
    return strategy(mlp(), ReplayPlugin(8), DiagonalEWCPlugin(50.0), train_epochs=2)


@pytest.fixture
def by_reference(monkeypatch):
    """What makes `save_checkpoint` work: by value, dill 0.4 can't pickle torch's optimizers."""
    monkeypatch.setitem(dill.settings, "byref", True)


def test_avalanches_checkpoint_goes_on_bit_identically(by_reference, tmp_path, capfd):
    stream = stream_of()
    learner = checkpointed()
    train(learner, stream[:1])
    save_checkpoint(learner, tmp_path / "checkpoint.pt")
    learner.train(stream[1])
    torch.rand(7)  # the checkpoint brings the random states back
    resumed, begun = maybe_load_checkpoint(checkpointed(), tmp_path / "checkpoint.pt")
    resumed.train(stream[begun])
    assert_same(named(resumed), named(learner))
    plugin = next(p for p in resumed.plugins if isinstance(p, DiagonalEWCPlugin))
    assert plugin.penalty.n_experiences == 2
    resumed.train(stream[0])  # it knows its new strategy


@pytest.mark.slow
def test_avalanches_checkpoint_in_another_process(by_reference, tmp_path):
    learner = checkpointed()
    train(learner, stream_of()[:1])
    save_checkpoint(learner, tmp_path / "checkpoint.pt")
    learner.train(stream_of()[1])
    files = [str(tmp_path / name) for name in ("checkpoint.pt", "weights.pt")]
    root = ROOT
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, *files], check=True, cwd=root)
    found = torch.load(files[1], weights_only=True)
    assert_same(found, learner.model.state_dict())


# ---- attached late, again, several


def test_attached_late():
    stream = stream_of(4, dtype=torch.float64)
    learner = strategy(mlp().double(), optimizer=torch.optim.SGD, lr=0.1)
    reference = strategy(mlp().double(), optimizer=torch.optim.SGD, lr=0.1)
    for each in (learner, reference):
        train(each, stream[:1])
    late, spelled_out = DiagonalEWCPlugin(5.0), InTheLoss(5.0)
    learner.plugins.append(late)  # after the evaluator and the clock
    reference.plugins.insert(0, spelled_out)
    for each in (learner, reference):
        train(each, stream[1:])
    assert late.penalty.n_experiences == 3
    for name, weight in named(learner).items():
        torch.testing.assert_close(weight, named(reference)[name], rtol=1e-9, atol=1e-12)


def test_the_same_experience_again_counts_again():
    stream = stream_of(dtype=torch.float64)
    plugin = DiagonalEWCPlugin(5.0, keep_importance_data=True)
    learner = strategy(mlp().double(), plugin)
    train(learner, [stream[0], stream[0], stream[1]])
    assert plugin.penalty.n_experiences == 3
    by_hand = sum(
        float((past.fisher[n] * (p.detach() - past.anchor[n]).square()).sum())
        for past in plugin.penalty.history
        for n, p in named(learner).items()
    )
    assert float(plugin.penalty(learner.model).detach()) == pytest.approx(by_hand, rel=1e-9)
    assert by_hand > 1e-6


def test_one_call_for_many_experiences_is_many_calls():
    stream = stream_of()
    together, apart = (strategy(mlp(), DiagonalEWCPlugin(5.0)) for _ in range(2))
    torch.manual_seed(1)
    together.train(stream)
    train(apart, stream)
    assert_same(named(together), named(apart))


def test_evaluating_in_the_middle_changes_nothing():
    stream = stream_of()
    quiet, looked_at = (strategy(mlp(), DiagonalEWCPlugin(5.0)) for _ in range(2))
    train(quiet, stream)
    torch.manual_seed(1)
    for experience in stream:
        looked_at.train(experience)
        state = torch.get_rng_state()
        looked_at.eval(stream)
        torch.set_rng_state(state)  # evaluation draws a seed for its loader
    assert_same(named(looked_at), named(quiet))


def test_every_modules_flag_is_as_it_was():
    class Watch(DiagonalEWCPlugin):
        flags = ()

        def after_training_exp(self, strategy, **kwargs):
            strategy.model.features[1].eval()
            before = [m.training for m in strategy.model.modules()]
            super().after_training_exp(strategy, **kwargs)
            self.flags = (before, [m.training for m in strategy.model.modules()])

    watch = Watch(1.0)
    train(strategy(mlp(), watch), stream_of()[:1])
    assert watch.flags[0] == watch.flags[1]
    assert {True, False} == set(watch.flags[0])


def test_drop_in_strategy_trains_on_heads_too():
    stream = stream_of(task_labels=True)
    by_plugin = train(strategy(multi_head(), DiagonalEWCPlugin(5.0, normalize="avalanche")), stream)
    assert_same(by_plugin, train(strategy(multi_head(), kind=DiagonalEWC, ewc_lambda=5.0), stream))


# ---- torch.compile


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_model_is_held_as_much(when, how):
    def compiled(model):
        if how == "wrapped":
            return torch.compile(model, backend="eager")
        model.compile(backend="eager")
        return model

    def run(compiling):
        torch.manual_seed(0)
        model = mlp().double()
        model.features[2].p = 0.0  # compiled, dropout draws otherwise
        learner = strategy(model, DiagonalEWCPlugin(5.0), optimizer=torch.optim.SGD, lr=0.1)
        for i, experience in enumerate(stream_of(dtype=torch.float64)):
            if compiling and i == (1 if when == "between" else 0):
                learner.model = compiled(learner.model)
            torch.manual_seed(i)
            learner.train(experience)
        return learner

    ours, plain = run(True), run(False)
    for (name, p), q in zip(named(ours).items(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
    assert float(ours.plugins[0].penalty_loss) > 1e-4
    for name, fisher in ours.plugins[0].fisher.items():
        plain_fisher = plain.plugins[0].fisher[name.removeprefix("_orig_mod.")]
        torch.testing.assert_close(fisher, plain_fisher, rtol=1e-9, atol=1e-15)


# ---- automatic mixed precision


class Mixed(Naive):
    """Half precision with a gradient scaler, as a user writes it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def forward(self):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward().float()

    def backward(self):
        self.scaler.scale(self.loss).backward()

    def optimizer_step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()


def test_mixed_precision_with_a_scaler():
    stream = stream_of()

    def run(plugin, kind):
        learner = strategy(mlp(), plugin, kind=kind, optimizer=torch.optim.SGD, lr=0.1)
        return train(learner, stream), learner

    (ours, learner), (reference, _) = (
        run(plugin, Mixed) for plugin in (DiagonalEWCPlugin(5.0), InTheLoss(5.0))
    )
    plugin = learner.plugins[0]
    assert not gradients_are_ours(plugin, learner)  # else it would not be scaled
    for name, weight in ours.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-3, atol=1e-4)
    learner.experience = stream[1]
    half = plugin.compute_fisher(learner)
    learner.__class__ = Naive  # the same weights in full precision
    full = plugin.compute_fisher(learner)
    for name in full:
        difference = (half[name] - full[name]).norm() / full[name].norm()
        assert 0 < float(difference) < 0.05, name  # bfloat16 has eight bits
        assert half[name].dtype is torch.float32
        assert not bool(((half[name] == 0) & (full[name] > 1e-3 * full[name].max())).any()), name


def test_state_dict_goes_into_a_penalty_without_avalanche():
    plugin = DiagonalEWCPlugin(5.0)
    learner = strategy(mlp(), plugin)
    train(learner, stream_of())
    penalty = QuadraticPenalty()
    penalty.load_state_dict(plugin.state_dict()["penalty"])
    assert torch.equal(penalty(learner.model), plugin.penalty(learner.model))

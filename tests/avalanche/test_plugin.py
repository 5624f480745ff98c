"""The plugin inside Avalanche's own strategies."""

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training.plugins import LwFPlugin, ReplayPlugin
from avalanche.training.supervised import Cumulative, Naive

from ewc_plugin import DiagonalEWCPlugin, QuadraticPenalty, diagonal_fisher, experience_batches
from ewc_plugin.avalanche.placement import InGradient, InLoss
from support.plugin_streams import Blobs, assert_same, benchmark, mlp, multi_head, strategy, train


@pytest.mark.parametrize(("make", "task_labels"), [(mlp, False), (multi_head, True)])
def test_lambda_zero_is_bit_identical_to_naive(make, task_labels):
    stream = benchmark(task_labels=task_labels).train_stream
    naive = train(strategy(make()), stream)
    ours = train(strategy(make(), DiagonalEWCPlugin(ewc_lambda=0)), stream)
    assert_same(naive, ours)


@pytest.mark.parametrize(
    ("kind", "others"),
    [(Cumulative, []), (Naive, [lambda: ReplayPlugin(8)]), (Naive, [lambda: LwFPlugin()])],
    ids=["cumulative", "replay", "lwf"],
)
def test_lambda_zero_is_bit_identical_beside_other_plugins_and_strategies(kind, others):
    stream = benchmark().train_stream
    without = train(strategy(mlp(), *[make() for make in others], kind=kind), stream)
    plugins = [DiagonalEWCPlugin(ewc_lambda=0), *[make() for make in others]]
    assert_same(without, train(strategy(mlp(), *plugins, kind=kind), stream))


def test_penalty_holds_the_weights():
    stream = benchmark().train_stream

    def moved(ewc_lambda):
        plugin = DiagonalEWCPlugin(ewc_lambda)
        learner = strategy(mlp(), plugin)
        train(learner, stream[:1])
        one_experience = QuadraticPenalty()
        one_experience.load_state_dict(plugin.penalty.state_dict())
        train(learner, stream[1:])
        return float(one_experience(learner.model).detach())

    assert moved(1e4) < 0.1 * moved(0)


def test_old_head_without_gradient_stays_where_it_was():
    stream = benchmark(task_labels=True).train_stream
    learner = strategy(multi_head(), DiagonalEWCPlugin(ewc_lambda=1e-12))
    first = train(learner, stream[:1])
    second = train(learner, stream[1:])
    head = [n for n in first if "classifiers.0" in n]
    assert head
    for name in head:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("fisher_type", ["predicted", "empirical", "sampled", "exact"])
def test_fisher_is_that_of_the_experience(fisher_type):
    stream = benchmark().train_stream
    plugin = DiagonalEWCPlugin(ewc_lambda=1, fisher_type=fisher_type)
    learner = strategy(mlp(), plugin)
    train(learner, stream[:1])
    items = [stream[0].dataset.eval()[i] for i in range(len(stream[0].dataset))]
    x, y = torch.stack([i[0] for i in items]), torch.tensor([i[1] for i in items])
    expected = diagonal_fisher(learner.model, [(x, y)], fisher_type)
    for name, fisher in plugin.fisher.items():
        assert torch.allclose(fisher, expected[name], rtol=1e-4, atol=1e-9), name
    assert plugin.fisher_seconds > 0
    assert plugin.penalty.n_experiences == 1


def test_fisher_batches_of_the_caller_are_used():
    seen = []

    def batches(learner):
        for batch in experience_batches(learner):
            seen.append(len(batch[0]))
            yield batch

    plugin = DiagonalEWCPlugin(ewc_lambda=1, fisher_batches=batches)
    train(strategy(mlp(), plugin), benchmark().train_stream[:1])
    assert sum(seen) == 24


@pytest.mark.parametrize("placement", [InGradient, InLoss])
def test_loss_is_task_loss_plus_lambda_times_penalty(placement):
    class Spy(DiagonalEWCPlugin):
        losses = ()

        def before_training_exp(self, strategy, **kwargs):
            super().before_training_exp(strategy, **kwargs)
            self._placement = placement(self.penalty)

        def after_backward(self, strategy, **kwargs):
            super().after_backward(strategy, **kwargs)
            task = strategy.criterion().detach()
            penalty = self.penalty(strategy.model).detach()
            self.losses = (
                *self.losses,
                (float(strategy.loss.detach()), float(task + 40 * penalty)),
            )

    spy = Spy(ewc_lambda=40)
    train(strategy(mlp(), spy), benchmark().train_stream)
    assert len(spy.losses) == 6
    for found, expected in spy.losses:
        assert found == pytest.approx(expected, rel=1e-6)
    assert spy.penalty_loss > 0.01


def test_training_flags_and_gradients_are_left_alone():
    learner = strategy(mlp(), DiagonalEWCPlugin(ewc_lambda=1))
    plain = strategy(mlp())
    stream = benchmark().train_stream[:1]
    learner.model.features[1].eval()
    for each in (learner, plain):
        train(each, stream)
    for ours, theirs in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_eval_transforms_and_no_global_random_draw():
    learner = strategy(mlp(), DiagonalEWCPlugin(ewc_lambda=1))
    stream = nc_benchmark(
        Blobs(),
        Blobs(),
        n_experiences=1,
        task_labels=False,
        shuffle=False,
        train_transform=lambda x: torch.randn_like(x),
        eval_transform=lambda x: x + 100,
    )
    learner.experience = stream.train_stream[0]
    state = torch.get_rng_state()
    batches = list(experience_batches(learner))
    assert torch.equal(state, torch.get_rng_state())
    x = torch.cat([batch[0] for batch in batches])  # in the order of the classes
    assert torch.equal(x.sort(0).values, (Blobs().x + 100).sort(0).values)


@pytest.mark.parametrize("size", [5, 6])  # 24 samples: a part of 4 at the end, or equal parts
def test_online_stream_has_one_fisher_per_experience_over_all_of_it(size):
    stream = benchmark().train_stream
    online = split_online_stream(stream, experience_size=size, access_task_boundaries=True, seed=0)
    plugin = DiagonalEWCPlugin(ewc_lambda=1, keep_importance_data=True)
    learner = strategy(mlp(), plugin)
    train(learner, online)
    assert len(plugin.penalty.history) == plugin.penalty.n_experiences == 2
    learner.experience = stream[1]
    whole = plugin.compute_fisher(learner)
    for name, fisher in plugin.penalty.history[1].fisher.items():
        assert torch.allclose(fisher, whole[name], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_bad_lambda(value):
    with pytest.raises(ValueError, match=f"`ewc_lambda` must be finite and >= 0, got {value}"):
        DiagonalEWCPlugin(value)


def test_bad_fisher_type_names_the_allowed_ones():
    with pytest.raises(ValueError, match="'predicted', 'empirical', 'sampled', 'exact', 'batched'"):
        DiagonalEWCPlugin(1, fisher_type="true")


def test_leading_arguments_are_avalanches():
    import inspect

    from avalanche.training.plugins import EWCPlugin

    theirs = list(inspect.signature(EWCPlugin).parameters.values())
    ours = list(inspect.signature(DiagonalEWCPlugin).parameters.values())
    for their, our in zip(theirs, ours[: len(theirs)], strict=True):
        assert (their.name, their.default, their.kind) == (our.name, our.default, our.kind)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])

"""`normalize="avalanche"`: F has the trace of Avalanche's own, on few of its mini-batches."""

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.plugins import EWCPlugin
from torch import nn
from torch.utils.data import TensorDataset

import ewc_plugin.avalanche.builtin_trace as module
from ewc_plugin import DiagonalEWC, DiagonalEWCPlugin
from support.plugin_streams import assert_same, benchmark, mlp, strategy, train

K, C = 12, 5


def sorted_stream(N, n_experiences=2, seed=0):
    """Classes of unequal spread, one after the other, as Avalanche hands MNIST."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(C, K, generator=generator)
    datasets = []
    for _ in range(n_experiences):
        y = torch.randint(C, (N,), generator=generator).sort().values
        noise = torch.randn(N, K, generator=generator) * (0.5 + y[:, None])
        x = (centres[y] + noise)[:, torch.randperm(K, generator=generator)]
        datasets.append(AvalancheDataset([TensorDataset(x.double(), y)]))
    return benchmark_from_datasets(train=datasets).train_stream


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, 16), nn.ReLU(), nn.Linear(16, C)).double()


def trace(fisher):
    return sum(float(f.sum(dtype=torch.float64)) for f in fisher.values())


def builtin_trace_of(learner, experience):
    """By Avalanche's own code, over all of its mini-batches."""
    data = AvalancheDataset([WithTask(experience.dataset)])
    importances = EWCPlugin(1).compute_importances(
        learner.model,
        learner._criterion,
        learner.optimizer,
        data,
        learner.device,
        learner.train_mb_size,
    )
    learner.model.zero_grad()
    return trace({name: imp.data for name, imp in importances.items()})


class WithTask(list):
    """The rows (x, y, task label), which Avalanche's plugin reads."""

    def __init__(self, data):
        super().__init__((*row[:2], 0) for row in data)


@pytest.mark.parametrize("fisher_type", ["predicted", "exact"])
@pytest.mark.parametrize(("N", "mb_size"), [(6000, 4), (6000, 32), (6001, 40), (130, 128), (5, 8)])
def test_trace_is_avalanches_within_a_tenth(N, mb_size, fisher_type):
    experience = sorted_stream(N)[0]
    plugin = DiagonalEWCPlugin(
        1.0, normalize="avalanche", fisher_type=fisher_type, keep_importance_data=True
    )
    learner = strategy(network(), plugin, train_mb_size=mb_size)
    train(learner, [experience])
    expected = builtin_trace_of(learner, experience)
    assert trace(plugin.penalty.history[0].fisher) == pytest.approx(expected, rel=0.1)
    for name, scaled in plugin.penalty.history[0].fisher.items():
        factor = trace(plugin.penalty.history[0].fisher) / trace(plugin.fisher)
        torch.testing.assert_close(scaled, plugin.fisher[name] * factor, rtol=1e-9, atol=0)


def test_a_part_of_the_mini_batches_is_enough(monkeypatch):
    experience, calls = sorted_stream(6000)[0], []
    plugin = DiagonalEWCPlugin(1.0, normalize="avalanche")
    learner = strategy(network(), plugin, train_mb_size=32)
    original = module._squared_norm
    monkeypatch.setattr(module, "_squared_norm", lambda *a: (calls.append(a[-1]), original(*a))[1])
    train(learner, [experience])
    assert 16 <= len(calls) <= 100 < 6000 // 32
    assert len({rows.start for rows in calls}) == len(calls)


def test_a_small_batch_at_the_end_counts_as_much_as_avalanche_lets_it():
    """Its gradient is that of few samples, so it can have most of the trace."""
    experience = sorted_stream(2049)[0]
    plugin = DiagonalEWCPlugin(1.0, normalize="avalanche", keep_importance_data=True)
    learner = strategy(network(), plugin, train_mb_size=32)
    train(learner, [experience])
    expected = builtin_trace_of(learner, experience)
    assert trace(plugin.penalty.history[0].fisher) == pytest.approx(expected, rel=0.1)


def test_lambda_zero_is_the_run_without_the_plugin():
    stream = benchmark().train_stream
    naive = train(strategy(mlp()), stream)
    assert_same(naive, train(strategy(mlp(), kind=DiagonalEWC, ewc_lambda=0), stream))


def test_a_state_goes_into_a_plugin_of_the_same_scale():
    plugin = DiagonalEWCPlugin(1.0, normalize="avalanche")
    train(strategy(mlp(), plugin), benchmark().train_stream)
    with pytest.raises(ValueError, match="`normalize` of this plugin is None, and the state"):
        DiagonalEWCPlugin(1.0).load_state_dict(plugin.state_dict())
    resumed = DiagonalEWCPlugin(1.0, normalize="avalanche")
    resumed.load_state_dict(plugin.state_dict())
    assert resumed.penalty.n_experiences == 2


def test_online_parts_share_one_scale_over_all_of_their_data():
    from avalanche.benchmarks.scenarios.online import split_online_stream

    stream = benchmark(dtype=torch.float64).train_stream
    parts = split_online_stream(stream, experience_size=6, access_task_boundaries=True)
    plugin = DiagonalEWCPlugin(1.0, normalize="avalanche", keep_importance_data=True)
    learner = strategy(mlp().double(), plugin)
    train(learner, parts)
    expected = builtin_trace_of(learner, stream[1])
    assert trace(plugin.penalty.history[1].fisher) == pytest.approx(expected, rel=1e-6)


def test_a_trace_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_squared_norm", lambda *arguments: float("inf"))
    plugin = DiagonalEWCPlugin(1.0, normalize="avalanche")
    with pytest.raises(ValueError, match="Avalanche's own, which is inf here"):
        train(strategy(mlp(), plugin), benchmark().train_stream)
    assert plugin.penalty.n_experiences == 0


def test_a_mini_batch_without_labels_is_as_avalanche_has_it():
    y = torch.arange(24) % 9
    y[8:16] = -100
    data = TensorDataset(torch.randn(24, K).double(), y)
    stream = benchmark_from_datasets(train=[AvalancheDataset([data])]).train_stream
    plugin = DiagonalEWCPlugin(1.0, normalize="avalanche", keep_importance_data=True)
    learner = strategy(nn.Linear(K, 9).double(), plugin, train_mb_size=8)
    learner.train(stream[0], shuffle=True)
    expected = builtin_trace_of(learner, stream[0])
    assert trace(plugin.penalty.history[0].fisher) == pytest.approx(expected, rel=1e-6)

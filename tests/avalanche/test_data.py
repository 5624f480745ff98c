"""Every kind of data: streams, loaders, collate functions, batches as mappings, odd sizes."""

import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Cumulative, Naive
from torch import nn
from torch.utils.data import DataLoader, default_collate

from ewc_plugin import DiagonalEWCPlugin, FisherData, diagonal_fisher
from ewc_plugin.batch_parts import Unpacked, unpack
from support.plugin_streams import (
    N_FEATURES,
    Blobs,
    Tokens,
    assert_same,
    benchmark,
    mlp,
    strategy,
    train,
)
from support.reference import loop_fisher, relative_error


def double_mlp():
    return mlp().double()


def stream_of(**options):
    return benchmark(dtype=torch.float64, **options).train_stream


def x_y(*datasets):
    rows = [row for dataset in datasets for row in dataset.eval()]
    return torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])


def expected_fisher(model, *datasets):
    model.eval()
    return loop_fisher(model, *x_y(*datasets), "predicted")


def online(stream, size, **options):
    return split_online_stream(stream, experience_size=size, **options)


# ---- online streams


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [5, 6])  # 24 samples: a part of 4 at the end, or equal parts
def test_parts_of_an_experience_share_one_fisher(size, drop_last):
    parts = online(stream_of(), size, access_task_boundaries=True, drop_last=drop_last)
    plugin = DiagonalEWCPlugin(1, keep_importance_data=True)
    learner = strategy(double_mlp(), plugin)
    train(learner, parts)
    assert plugin.penalty.n_experiences == 2
    expected = expected_fisher(learner.model, stream_of()[1].dataset)
    assert relative_error(plugin.fisher, expected) < 1e-9
    assert_same(plugin.penalty.history[1].anchor, dict(learner.model.named_parameters()))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("size", [5, 6])
def test_lambda_zero_is_bit_identical_on_online_streams(size, known):
    def run(*plugins):
        parts = online(stream_of(), size, access_task_boundaries=known)
        return train(strategy(double_mlp(), *plugins), parts)

    ewc = DiagonalEWCPlugin(0)
    assert_same(run(), run(ewc))
    assert ewc.penalty.n_experiences == (2 if known else 2 * -(-24 // size))


@pytest.mark.parametrize("size", [5, 6])
def test_without_boundaries_every_part_has_its_own(size):
    plugin = DiagonalEWCPlugin(1)
    learner = strategy(double_mlp(), plugin)
    parts = list(online(stream_of(), size))
    train(learner, parts)
    assert plugin.penalty.n_experiences == len(parts) == 2 * -(-24 // size)
    assert relative_error(plugin.fisher, expected_fisher(learner.model, parts[-1].dataset)) < 1e-9


def test_without_boundaries_so_many_parts_share_one():
    plugin = DiagonalEWCPlugin(1, mode="online", decay_factor=0.9, consolidate_every=3)
    learner = strategy(double_mlp(), plugin)
    parts = list(online(stream_of(), 6))
    train(learner, parts)
    assert plugin.penalty.n_experiences == 2  # of eight parts; the last two wait
    with pytest.raises(RuntimeError, match="`state_dict` was called after 2 of the experiences"):
        plugin.state_dict()
    train(learner, parts[:1])
    assert plugin.penalty.n_experiences == 3
    expected = expected_fisher(learner.model, *(e.dataset for e in (*parts[6:], parts[0])))
    assert relative_error(plugin.fisher, expected) < 1e-9
    assert plugin.state_dict()["n_parts"] == 0


def test_resumed_between_the_parts():
    def learner_of():
        plugin = DiagonalEWCPlugin(1)
        return strategy(double_mlp(), plugin, optimizer=torch.optim.SGD), plugin

    parts = list(online(stream_of(), 6, access_task_boundaries=True))
    (whole, expected), (first, begun), (second, resumed) = (learner_of() for _ in range(3))
    train(first, parts[:2])
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(begun.state_dict())
    for experience in parts[2:4]:
        second.train(experience)
    train(whole, parts[:4])
    assert resumed.penalty.n_experiences == expected.penalty.n_experiences == 1
    assert_same(resumed.fisher, expected.fisher)


def test_an_interrupted_part_is_not_counted_twice():
    parts = list(online(stream_of(), 6, access_task_boundaries=True))
    plugin = DiagonalEWCPlugin(1)
    learner = strategy(double_mlp(), plugin)
    original, learner.criterion = learner.criterion, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learner.train(parts[0])
    learner.criterion = original
    for done, experience in enumerate(parts[:4]):
        assert plugin.penalty.n_experiences == 0, done
        learner.train(experience)
    assert plugin.penalty.n_experiences == 1


def test_an_interrupted_fisher_is_computed_over_the_same_experiences():
    stream = stream_of(n_experiences=4)
    plugin = DiagonalEWCPlugin(1, consolidate_every=2)
    learner = strategy(double_mlp(), plugin)
    train(learner, stream[:1])
    plugin.fisher_batches = lambda strategy: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learner.train(stream[1])
    plugin.fisher_batches = None
    learner.train(stream[1])
    expected = expected_fisher(learner.model, *(e.dataset for e in stream[:2]))
    assert plugin.penalty.n_experiences == 1
    assert relative_error(plugin.fisher, expected) < 1e-9


@pytest.mark.parametrize("value", [0, 1.5])
def test_bad_consolidate_every(value):
    with pytest.raises(
        ValueError, match=f"`consolidate_every` must be an integer >= 1, got {value}"
    ):
        DiagonalEWCPlugin(1, consolidate_every=value)


# ---- which data the Fisher sees


@pytest.mark.parametrize("replay_first", [False, True])
@pytest.mark.parametrize("data", list(FisherData))
def test_replay_buffer_is_seen_or_not(data, replay_first):
    plugin, replay = DiagonalEWCPlugin(1, fisher_data=data), ReplayPlugin(8)
    plugins = (replay, plugin) if replay_first else (plugin, replay)
    learner = strategy(double_mlp(), *plugins)
    stream = stream_of()
    train(learner, stream[:1])
    buffer = replay.storage_policy.buffer  # as it is while the second is trained on
    assert len(buffer) == 8
    train(learner, stream[1:])
    seen = [stream[1].dataset, buffer] if data is FisherData.TRAINING else [stream[1].dataset]
    assert relative_error(plugin.fisher, expected_fisher(learner.model, *seen)) < 1e-9


@pytest.mark.parametrize("data", list(FisherData))
def test_cumulative_sees_the_past_or_not(data):
    plugin = DiagonalEWCPlugin(1, fisher_data=data)
    learner = strategy(double_mlp(), plugin, kind=Cumulative)
    stream = stream_of()
    train(learner, stream)
    seen = [e.dataset for e in (stream if data is FisherData.TRAINING else stream[1:])]
    assert relative_error(plugin.fisher, expected_fisher(learner.model, *seen)) < 1e-9


def test_training_data_of_an_unknown_loader():
    class Opaque(Naive):
        def make_train_dataloader(self, **kwargs):
            self.dataloader = list(DataLoader(self.adapted_dataset, 8))

    learner = strategy(mlp(), DiagonalEWCPlugin(1, fisher_data="training"), kind=Opaque)
    with pytest.raises(ValueError, match="list has neither `datasets` nor `dataset`. Pass `fisher"):
        train(learner, benchmark().train_stream)


# ---- loaders


def tripled(samples):
    x, *others = default_collate(samples)
    return [3 * x, *others]


class OfTorch(Naive):
    """Its loader is torch's own."""

    def make_train_dataloader(self, **kwargs):
        self.dataloader = DataLoader(self.adapted_dataset, 8, collate_fn=tripled)


class OfAvalanche(Naive):
    """Its loader is one of Avalanche's."""

    def make_train_dataloader(self, **kwargs):
        self.dataloader = TaskBalancedDataLoader(
            self.adapted_dataset, batch_size=8, collate_fn=tripled
        )


@pytest.mark.parametrize("options", [{}, {"max_samples": 24}], ids=str)
@pytest.mark.parametrize("kind", [OfTorch, OfAvalanche])
def test_the_fisher_is_of_batches_that_the_training_collates(kind, options):
    stream = stream_of()
    plugin = DiagonalEWCPlugin(1, fisher_options=options)
    learner = strategy(double_mlp(), plugin, kind=kind)
    train(learner, stream[:1])
    x, y = x_y(stream[0].dataset)
    learner.model.eval()
    assert relative_error(plugin.fisher, loop_fisher(learner.model, 3 * x, y, "predicted")) < 1e-9


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 1, "persistent_workers": True},
        {"pin_memory": True},
        {"drop_last": True},
        {"shuffle": False},
    ],
    ids=str,
)
def test_options_of_the_loader(options):
    stream = stream_of()

    def run(*plugins):
        learner = strategy(double_mlp(), *plugins, train_mb_size=7)
        torch.manual_seed(1)
        for experience in stream:
            learner.train(experience, **options)
        return learner

    plugin = DiagonalEWCPlugin(0)
    ours, plain = run(plugin), run()
    assert_same(dict(ours.model.named_parameters()), dict(plain.model.named_parameters()))
    expected = expected_fisher(ours.model, stream[1].dataset)  # all of it, drop_last or not
    assert relative_error(plugin.fisher, expected) < 1e-9


def test_transforms_may_draw_from_any_generator():
    def transform(x):
        return x + random.random() + np.random.rand() + float(torch.rand(()))

    stream = nc_benchmark(
        Blobs(), Blobs(), 2, task_labels=False, shuffle=False, eval_transform=transform
    ).train_stream
    naive = train(strategy(mlp()), stream)
    assert_same(naive, train(strategy(mlp(), DiagonalEWCPlugin(0)), stream))
    np.random.seed(0)
    train(strategy(mlp(), DiagonalEWCPlugin(1)), stream)
    state = np.random.get_state()[1]
    np.random.seed(0)
    assert (state == np.random.get_state()[1]).all()


# ---- batches without task labels, custom collate functions, mappings


class TokenNaive(Naive):
    """What Avalanche's examples make of a strategy for such batches."""

    @property
    def mb_y(self):
        return self.mbatch["labels"]

    def _unpack_minibatch(self):
        self.mbatch = {key: value.to(self.device) for key, value in self.mbatch.items()}

    def forward(self):
        batch = {key: value for key, value in self.mbatch.items() if key != "labels"}
        return self.model(**batch).logits


class Sentences(list):
    """Dicts of tokens, of different length."""

    def __init__(self, n=10, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for i in range(n):
            ids = torch.randint(1, 9, (2 + i % 3,), generator=generator)
            self.append({"input_ids": ids, "labels": i % 4})


class BatchEncoding(dict):
    """As tokenizers give them: a mapping of a class of its own."""


def collate(items):
    width = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    for row, item in zip(ids, items, strict=True):
        row[: len(item["input_ids"])] = item["input_ids"]
    labels = torch.tensor([item["labels"] for item in items])
    return BatchEncoding(input_ids=ids, attention_mask=(ids > 0).double(), labels=labels)


class CollatingNaive(TokenNaive):
    def make_train_dataloader(self, **kwargs):
        self.dataloader = DataLoader(self.adapted_dataset, self.train_mb_size, collate_fn=collate)


def token_stream():
    datasets = [AvalancheDataset([Sentences(seed=s)], collate_fn=collate) for s in range(2)]
    return benchmark_from_datasets(train=datasets).train_stream


def token_model():
    torch.manual_seed(0)
    return Tokens().double()


def token_fisher(model, kind):
    batch = collate(Sentences(seed=1))
    parts = (batch["input_ids"], batch["attention_mask"])
    return loop_fisher(model, parts, batch["labels"], kind, lambda m, p: m(*p).logits)


@pytest.mark.parametrize("kind", ["predicted", "empirical", "exact"])
def test_mappings_by_the_templates_own_forward(kind):
    plugin = DiagonalEWCPlugin(2.0, fisher_type=kind)
    learner = strategy(token_model(), plugin, kind=CollatingNaive)
    train(learner, token_stream())
    assert relative_error(plugin.fisher, token_fisher(learner.model, kind)) < 1e-9


def test_mappings_by_the_plugins_default():
    model = token_model()
    batch = collate(Sentences(seed=1))
    plugin = DiagonalEWCPlugin(2.0, fisher_type="empirical", fisher_batches=lambda s: [batch])
    found = plugin.compute_fisher(strategy(model, plugin))
    assert relative_error(found, token_fisher(model, "empirical")) < 1e-9


def test_hooks_of_the_plugin_win_over_the_template():
    class Hooks(DiagonalEWCPlugin):
        def unpack(self, batch):
            return Unpacked(
                (batch["input_ids"], batch["attention_mask"]), batch["labels"] * 0, None
            )

        def forward(self, model, batch):
            return model(*self.unpack(batch).inputs).logits[:, :3]

    plugin = Hooks(2.0, fisher_type="empirical")
    learner = strategy(token_model(), plugin, kind=CollatingNaive)
    train(learner, token_stream())
    batch = collate(Sentences(seed=1))
    expected = loop_fisher(
        learner.model,
        (batch["input_ids"], batch["attention_mask"]),
        batch["labels"] * 0,
        "empirical",
        lambda m, p: m(*p).logits[:, :3],
    )
    assert relative_error(plugin.fisher, expected) < 1e-9


def test_batches_without_task_labels():
    datasets = [AvalancheDataset([Blobs(seed=s, dtype=torch.float64)]) for s in range(2)]
    stream = benchmark_from_datasets(train=datasets).train_stream
    assert not hasattr(stream[0], "task_labels")
    assert len(stream[0].dataset[0]) == 2
    plugin = DiagonalEWCPlugin(2.0)
    learner = strategy(double_mlp(), plugin)
    train(learner, stream)
    assert relative_error(plugin.fisher, expected_fisher(learner.model, stream[1].dataset)) < 1e-9


def test_two_samples_are_no_task_labels():
    model, generator = double_mlp(), torch.Generator().manual_seed(0)
    batch = [torch.randn(2, N_FEATURES, generator=generator).double(), torch.tensor([0, 3])]
    plugin = DiagonalEWCPlugin(1, fisher_type="empirical", fisher_batches=lambda s: [batch])
    found = plugin.compute_fisher(strategy(model, plugin))
    assert_same(found, diagonal_fisher(model, [tuple(batch)], "empirical"))


def test_a_batch_that_is_neither_says_so():
    with pytest.raises(ValueError, match="a mapping with 'labels', got Tensor. Override `unpack`"):
        unpack(torch.zeros(3))


def test_regression_by_a_score_of_the_caller():
    class Points(Blobs):
        def __getitem__(self, index):
            return self.x[index], self.x[index, :1] * 2

    def score(outputs, batch):
        return (batch[1] - outputs) / 0.25

    datasets = [AvalancheDataset([Points(12, seed=s, dtype=torch.float64)]) for s in range(2)]
    stream = benchmark_from_datasets(train=datasets).train_stream
    plugin = DiagonalEWCPlugin(2.0, fisher_type=score)
    torch.manual_seed(0)
    model = nn.Linear(N_FEATURES, 1).double()
    learner = strategy(model, plugin, criterion=nn.MSELoss())
    train(learner, stream)
    x = Points(12, seed=1, dtype=torch.float64).x
    residual = ((2 * x[:, :1] - model(x)) / 0.25).detach()
    torch.testing.assert_close(plugin.fisher["weight"], (residual * x).square().mean(0)[None])
    torch.testing.assert_close(plugin.fisher["bias"], residual.square().mean(0))


# ---- odd sizes


def test_an_experience_of_one_sample_and_of_one_class():
    dataset = stream_of()[0].dataset
    one = dataset.subset([3])
    zeros = dataset.subset([i for i, y in enumerate(dataset.targets) if y == 0])
    stream = benchmark_from_datasets(train=[one, zeros]).train_stream
    plugin = DiagonalEWCPlugin(2.0, keep_importance_data=True)
    learner = strategy(double_mlp(), plugin)
    train(learner, stream[:1])
    assert relative_error(plugin.fisher, expected_fisher(learner.model, one)) < 1e-9
    train(learner, stream[1:])
    assert relative_error(plugin.fisher, expected_fisher(learner.model, zeros)) < 1e-9


def test_an_empty_experience_is_refused():
    stream = benchmark_from_datasets(train=[stream_of()[0].dataset.subset([])]).train_stream
    with pytest.raises(
        ValueError, match="Experience 0 has no samples, so there is nothing to trai"
    ):
        train(strategy(double_mlp(), DiagonalEWCPlugin(1)), stream)

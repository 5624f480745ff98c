"""Small Avalanche benchmarks and strategies that tests of the plugin share."""

import random
from types import SimpleNamespace

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.distributed.distributed_helper import DistributedHelper
from avalanche.logging import BaseLogger
from avalanche.models import MTSimpleMLP, SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import Dataset

from ewc_plugin import DiagonalEWCPlugin
from ewc_plugin.avalanche.placement import Placement

N_FEATURES = 6


class Blobs(Dataset):
    """Four classes of noisy points."""

    def __init__(self, n=48, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(n) % 4
        centres = torch.randn(4, N_FEATURES, generator=generator)
        noise = torch.randn(n, N_FEATURES, generator=generator)
        self.x = (centres[self.targets] + noise).to(dtype)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.x[index], int(self.targets[index])


def benchmark(*, task_labels=False, dtype=torch.float32, n_experiences=2):
    """Two experiences of two classes each, or four of one."""
    return nc_benchmark(
        Blobs(dtype=dtype),
        Blobs(seed=1, dtype=dtype),
        n_experiences=n_experiences,
        task_labels=task_labels,
        shuffle=False,
        class_ids_from_zero_in_each_exp=task_labels,
    )


def mlp(seed=0):
    torch.manual_seed(seed)
    return SimpleMLP(num_classes=4, input_size=N_FEATURES, hidden_size=8, drop_rate=0.3)


def multi_head(seed=0):
    torch.manual_seed(seed)
    return MTSimpleMLP(input_size=N_FEATURES, hidden_size=8)


def quiet():
    """An evaluator that logs nothing, and does not warn of it."""
    # In a distributed run the main process alone may have loggers.
    return EvaluationPlugin(loggers=[BaseLogger()] if DistributedHelper.is_main_process else None)


def strategy(model, *plugins, kind=Naive, optimizer=torch.optim.Adam, lr=1e-2, **options):
    """A quiet strategy over the model."""
    defaults = {"criterion": nn.CrossEntropyLoss(), "train_mb_size": 8, "evaluator": quiet()}
    return kind(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr),
        plugins=list(plugins),
        **defaults | options,
    )


def train(learner, stream, seed=1):
    """Trains on every experience of `stream`, from a seed."""
    torch.manual_seed(seed)
    random.seed(seed)  # A-GEM draws from it
    for experience in stream:
        learner.train(experience)
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


class InTheLoss(DiagonalEWCPlugin):
    """The reference: the penalty goes through autograd's own graph, written out."""

    def before_backward(self, strategy, **kwargs):
        self._hooks_called = True
        self._placement = Placement(self.penalty)  # does nothing more
        if not self._is_active:
            return
        for parameter, q in self.penalty.pairs(strategy.model):
            e = parameter - q.anchor + (0 if q.offset is None else q.offset)
            strategy.loss = strategy.loss + self.ewc_lambda * (q.fisher * e.square()).sum()


class Tokens(nn.Module):
    """A classifier with the interface of a language model's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, input_ids, attention_mask):
        e = self.embedding(input_ids) * attention_mask[..., None]
        return SimpleNamespace(logits=self.head(e.sum(1) / attention_mask.sum(1, keepdim=True)))

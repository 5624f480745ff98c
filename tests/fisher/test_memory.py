"""Nothing outlives a call: neither tensors nor the memory of an autograd graph."""

import gc

import psutil
import pytest
import torch
from torch import nn

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from support.problems import BareParameter, DataDependent, mlp


def live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def data(n=7):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=generator), torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("build", [mlp, BareParameter, DataDependent])
@pytest.mark.parametrize("kind", ["exact", "batched"])
def test_no_tensor_outlives_a_call(build, engine, kind):
    if (build, engine) == (DataDependent, "vmap"):
        pytest.skip("refused")
    model, batch = build(), data()
    counts = []
    for _ in range(3):
        diagonal_fisher(model, [batch], kind, engine=engine)
        explain(model, batch, engine=engine)
        counts.append(live_tensors())
    assert counts == counts[:1] * 3


def test_resident_memory_is_flat_over_a_hundred_calls():
    model = nn.Sequential(nn.Linear(6, 500), nn.ReLU(), nn.Linear(500, 500), nn.Linear(500, 4))
    batch, process = data(), psutil.Process()
    for _ in range(5):
        diagonal_fisher(model, [batch])
        explain(model, batch)
    before = process.memory_info().rss
    for _ in range(100):
        diagonal_fisher(model, [batch])
        explain(model, batch)
    one_copy = 4 * sum(p.numel() for p in model.parameters())
    assert process.memory_info().rss - before < 10 * one_copy

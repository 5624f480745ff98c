"""The documented first lambda protects the old task, and lets the new one be learned."""

import copy
import functools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from ewc_plugin import QuadraticPenalty, diagonal_fisher
from support.pages import run_page
from support.paths import ROOT

NORMALIZATIONS = (None, "mean", "trace", "max")


def permuted_digits():
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 16
    for order in (torch.arange(64), torch.randperm(64, generator=torch.Generator().manual_seed(0))):
        yield (x[:1437, order], y[:1437]), (x[1437:, order], y[1437:])


def clusters():
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):
        centres = 1.5 * torch.randn(4, 20, generator=draw)
        y = torch.randint(0, 4, (800,), generator=draw)
        x = centres[y] + torch.randn(800, 20, generator=draw)
        yield (x[:600], y[:600]), (x[600:], y[600:])


def train(model, x, y, penalty, ewc_lambda):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(10):
        for rows in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            penalty.add_gradient_(model, ewc_lambda)
            optimizer.step()


def accuracy(model, x, y):
    return float((model(x).argmax(1) == y).float().mean())


@functools.cache
def trained_on_the_first(make_tasks):
    tasks = list(make_tasks())
    (x, y), _ = tasks[0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 100), nn.ReLU(), nn.Linear(100, int(y.max()) + 1))
    train(model, x, y, QuadraticPenalty(), 0.0)
    return tasks, model, diagonal_fisher(model, [(x, y)], "predicted")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("make_tasks", [permuted_digits, clusters])
def test_first_lambda_protects(make_tasks, normalize, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first_lambda = run_page(ROOT / "docs/pages/how-to/choose-lambda.md")["first_lambda"]
    (old, new), model, fisher = trained_on_the_first(make_tasks)
    naive, protected = copy.deepcopy(model), copy.deepcopy(model)
    train(naive, *new[0], QuadraticPenalty(), 0.0)
    penalty = QuadraticPenalty(normalize=normalize)
    penalty.consolidate(protected, fisher)
    train(protected, *new[0], penalty, first_lambda(fisher, normalize))
    before = accuracy(model, *old[1])
    assert accuracy(naive, *old[1]) < before - 0.08  # there is something to protect
    assert accuracy(protected, *old[1]) > before - 0.05
    assert accuracy(protected, *new[1]) > accuracy(naive, *new[1]) - 0.1

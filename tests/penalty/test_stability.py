"""The lambda that a step can bear, and the step that bears all."""

import pytest
import torch
from torch import nn

from ewc_plugin.penalty.implicit_step import implicit_step_
from ewc_plugin.penalty.penalty import QuadraticPenalty
from ewc_plugin.penalty.stability import largest_stable_lambda

SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "dampening": 0.3},
    {"weight_decay": 0.4},
    {"momentum": 0.9, "weight_decay": 0.4},
]


def problem(*fishers):
    """Parameters that were left at 0 with these Fishers and have moved to 1."""
    model = nn.ParameterList([torch.zeros(len(f)) for f in fishers])
    penalty = QuadraticPenalty()
    penalty.consolidate(model, {str(i): torch.tensor(f) for i, f in enumerate(fishers)})
    with torch.no_grad():
        for p in model:
            p.fill_(1)
    return model.double(), penalty


def descend(model, penalty, optimizer, ewc_lambda, steps=400):
    for _ in range(steps):
        optimizer.zero_grad()
        penalty.add_gradient_(model, ewc_lambda)
        optimizer.step()
    return max(float(p.detach().abs().max()) for p in model)


@pytest.mark.parametrize("options", SGD_OPTIONS)
def test_descent_converges_just_below_the_bound_and_diverges_just_above(options):
    model, penalty = problem([3.0, 0.1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    bound = largest_stable_lambda(optimizer, penalty.pairs(model))
    assert descend(model, penalty, optimizer, 0.97 * bound) < 1
    model, penalty = problem([3.0, 0.1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    assert descend(model, penalty, optimizer, 1.03 * bound) > 100


def test_bound_is_that_of_the_worst_parameter_group():
    model, penalty = problem([3.0], [1.0])
    groups = [{"params": [model[0]], "lr": 0.1}, {"params": [model[1]], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert largest_stable_lambda(optimizer, penalty.pairs(model)) == pytest.approx(2.0)


def test_adam_has_no_bound():
    model, penalty = problem([3.0])
    optimizer = torch.optim.Adam(model.parameters())
    assert largest_stable_lambda(optimizer, penalty.pairs(model)) == float("inf")


@pytest.mark.parametrize("lr", [0.01, 1.0])
def test_implicit_step_is_the_proximal_point(lr):
    """Its optimality: theta' - theta + lr lambda d penalty(theta') / d theta' = 0."""
    model, penalty = problem([3.0, 0.1, 0.0], [2.0])
    penalty.consolidate(model, {"0": torch.tensor([1.0, 2.0, 0.5]), "1": torch.zeros(1)})
    with torch.no_grad():
        model[0].add_(0.7)
    before = [p.detach().clone() for p in model]
    optimizer = torch.optim.SGD([{"params": [model[0]]}, {"params": [model[1]], "lr": 9.0}], lr=lr)
    implicit_step_(optimizer, penalty.pairs(model), ewc_lambda=5.0)
    gradients = torch.autograd.grad(penalty(model), list(model.parameters()))
    for old, new, gradient, rate in zip(before, model, gradients, [lr, 9.0], strict=True):
        assert torch.allclose(new - old + rate * 5.0 * gradient, torch.zeros_like(old), atol=1e-12)
    assert not torch.equal(before[1], model[1])


@pytest.mark.parametrize("ewc_lambda", [1.0, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_implicit_step_only_ever_comes_closer(optimizer, ewc_lambda):
    model, penalty = problem([300.0, 1e-9, 0.0])
    stepper = optimizer(model.parameters(), lr=0.1)
    previous = torch.ones(3, dtype=torch.float64)
    for _ in range(20):
        implicit_step_(stepper, penalty.pairs(model), ewc_lambda)
        now = model[0].detach().clone()
        assert bool((now <= previous).all()) and bool((now >= 0).all())
        previous = now
    assert now[2] == 1


def test_implicit_step_leaves_a_parameter_at_its_anchor_alone():
    model, penalty = problem([3.0])
    with torch.no_grad():
        model[0].fill_(0)
    implicit_step_(torch.optim.SGD(model.parameters(), lr=0.1), penalty.pairs(model), 10.0)
    assert torch.equal(model[0], torch.zeros(1, dtype=torch.float64))


def test_implicit_step_follows_the_learning_rate_to_the_last_digit():
    """Large and small parameters, after two experiences, beside float64."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(20_000), torch.randn(3, 2), torch.randn(5)])
    penalty = QuadraticPenalty()
    S, pull = ([torch.zeros_like(p, dtype=torch.float64) for p in model] for _ in range(2))
    for _ in range(2):
        fisher = {str(i): 10 ** (9 * torch.rand_like(p) - 6) for i, p in enumerate(model)}
        penalty.consolidate(model, fisher)
        for i, p in enumerate(model):
            S[i] += fisher[str(i)].double()
            pull[i] += (fisher[str(i)].double() * p).detach()
            p.data += torch.randn_like(p)
    optimizer = torch.optim.SGD(model.parameters())
    for lr in (0.1, 0.1, 0.003, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        before = [p.detach().double() for p in model]
        implicit_step_(optimizer, penalty.pairs(model), ewc_lambda=5.0)
        for p, x, s, sm in zip(model, before, S, pull, strict=True):
            expected = (x + 10 * lr * sm) / (1 + 10 * lr * s)
            tolerance = torch.finfo(torch.float32).eps * (2 + x.abs() + (sm / s).abs())
            assert bool(((p.detach().double() - expected).abs() <= tolerance).all())
            p.data += 0.1 * torch.randn_like(p)

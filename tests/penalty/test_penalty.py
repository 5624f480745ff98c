"""The folded penalty against the unfolded float64 sum over all experiences."""

import pytest
import torch
from torch import nn

from ewc_plugin.penalty.implicit_step import implicit_step_
from ewc_plugin.penalty.pairs import BLOCK
from ewc_plugin.penalty.penalty import QuadraticPenalty
from support.penalties import Unfolded, gradient_of, model, random_fisher, wander


@pytest.mark.parametrize("decay_factor", [None, 1.0, 0.9])
@pytest.mark.parametrize("n_experiences", [1, 2, 100])
def test_folded_penalty_is_the_unfolded_sum(n_experiences, decay_factor):
    generator = torch.Generator().manual_seed(3)
    net = model()
    mode = "separate" if decay_factor is None else "online"
    penalty, unfolded = QuadraticPenalty(mode, decay_factor), Unfolded(decay_factor)
    for _ in range(n_experiences):
        fisher = random_fisher(net, generator)
        for p in (penalty, unfolded):
            p.consolidate(net, fisher)
        wander(net, generator)
    value = penalty(net)
    exact_value, exact_gradient = unfolded(net)
    assert float(value.detach()) == pytest.approx(exact_value, rel=1e-6)
    error = gradient_of(value, net).double() - exact_gradient
    assert float(error.norm() / exact_gradient.norm()) < 1e-6


def test_memory_does_not_grow_with_experiences():
    generator = torch.Generator().manual_seed(0)
    net = model()
    P = sum(p.numel() for p in net.parameters())
    penalty, sizes = QuadraticPenalty(), []
    for _ in range(20):
        penalty.consolidate(net, random_fisher(net, generator))
        wander(net, generator)
        sizes.append(penalty.nbytes)
    assert sizes[0] == 2 * 4 * P  # S and the anchor
    assert sizes[1:] == [3 * 4 * P] * 19  # and B


def test_add_gradient_is_the_gradient_of_the_value():
    generator = torch.Generator().manual_seed(0)
    net, penalty = model().double(), QuadraticPenalty()
    for _ in range(3):
        penalty.consolidate(net, {n: f.double() for n, f in random_fisher(net, generator).items()})
        wander(net.float(), generator)
        net.double()
    expected = gradient_of(7 * penalty(net), net)
    for p in list(net.parameters())[1:]:
        p.grad = torch.ones_like(p)
    penalty.add_gradient_(net, scale=7)
    first, *others = [p.grad for p in net.parameters()]
    found = torch.cat([first.flatten(), *(g.flatten() - 1 for g in others)])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_blocks_of_a_large_parameter_and_other_layouts_agree_with_autograd(layout):
    generator = torch.Generator().manual_seed(0)
    net = nn.Conv2d(64, BLOCK // 500, 3, bias=False)  # not a multiple of a block
    net = net.to(memory_format=layout).double()
    assert net.weight.numel() > BLOCK
    penalty = QuadraticPenalty()
    for _ in range(2):
        penalty.consolidate(net, {"weight": torch.rand(net.weight.shape, generator=generator)})
        wander(net, generator)
    value = penalty(net)
    expected = gradient_of(value, net)
    net.weight.grad = torch.zeros_like(net.weight)
    added = penalty.add_gradient_(net, scale=1.0)
    assert float(added) == pytest.approx(float(value.detach()), rel=1e-12)
    assert torch.allclose(net.weight.grad.flatten(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.2)], ids=["one rate", "two rates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_parameters_step_by_step_beside_float64(rates, dtype):
    """One preparation serves gradients and implicit steps at parameters that move and change."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 3), nn.Linear(3, 2)).to(dtype)
    penalty, past = QuadraticPenalty(), []
    for t in range(2):
        fisher = {n: torch.rand(p.shape, generator=generator) for n, p in net.named_parameters()}
        if t == 0:  # no offset for one of the small ones
            fisher["2.bias"].zero_()
        penalty.consolidate(net, fisher)
        past.append([
            (f.double(), p.detach().double().clone())
            for f, p in zip(fisher.values(), net.parameters(), strict=True)
        ])
        wander(net, generator)
    *rest, last = net.parameters()
    groups = [{"params": rest, "lr": rates[0]}, {"params": [last], "lr": rates[1]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for step in range(3):
        wander(net, generator)
        if step == 2:
            net[0].weight.data = net[0].weight.data.t().contiguous().t()
        net.zero_grad()
        value = penalty.add_gradient_(net, scale=0.5)
        expected_value = 0.0
        for i, p in enumerate(net.parameters()):
            theta = p.detach().double()
            pulls = [(F[i][0], theta - F[i][1]) for F in past]
            expected_value += 0.5 * sum(float((S * d * d).sum()) for S, d in pulls)
            expected = sum(S * d for S, d in pulls)
            tolerance = 1e-5 if dtype is torch.float32 else 1e-12
            assert torch.allclose(p.grad.double(), expected, rtol=tolerance, atol=tolerance)
        assert 0.5 * float(value) == pytest.approx(expected_value, rel=tolerance)
        before = [p.detach().double().clone() for p in net.parameters()]
        implicit_step_(optimizer, penalty.pairs(net), ewc_lambda=3.0)
        for i, (p, x) in enumerate(zip(net.parameters(), before, strict=True)):
            c = 2 * 3.0 * (rates[1] if p is last else rates[0])
            S = past[0][i][0] + past[1][i][0]
            target = sum(F[i][0] * F[i][1] for F in past)
            assert torch.allclose(p.double(), (x + c * target) / (1 + c * S), atol=tolerance)


def test_parameter_where_it_was_left_gets_no_gradient():
    net, penalty = model(), QuadraticPenalty()
    penalty.consolidate(net, {n: torch.ones_like(p) for n, p in net.named_parameters()})
    with torch.no_grad():
        net[0].weight += 1
    penalty(net).backward()
    assert torch.allclose(net[0].weight.grad, torch.full((4, 5), 2.0))
    assert [net[0].bias.grad, net[2].weight.grad, net[2].bias.grad] == [None] * 3


def test_penalty_without_experience_is_zero():
    assert float(QuadraticPenalty()(model())) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, r"`mode` must be one of 'separate', 'online', got 'both'"),
        ({"decay_factor": 0.5}, r"`decay_factor` must be None unless mode='online', got 0.5"),
        ({"mode": "online"}, r"`decay_factor` must be set with mode='online'"),
        ({"mode": "online", "decay_factor": -1}, r"finite and >= 0, got -1"),
        ({"mode": "online", "decay_factor": float("nan")}, r"finite and >= 0, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuadraticPenalty(**arguments)


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ({"9.weight": torch.ones(4, 5)}, r"`fisher` has '9.weight'; the model has"),
        ({"0.weight": torch.ones(5, 4)}, r"is \(5, 4\), the parameter \(4, 5\)"),
        ({"0.weight": -torch.ones(4, 5)}, r"must be finite and >= 0, got -1.0"),
        ({"0.weight": torch.full((4, 5), float("inf"))}, r"must be finite and >= 0, got inf"),
    ],
)
def test_bad_fisher(fisher, message):
    with pytest.raises(ValueError, match=message):
        QuadraticPenalty().consolidate(model(), fisher)


def test_fisher_of_zeros_is_not_passed_over_in_silence():
    net = model()
    with pytest.warns(UserWarning, match="zero everywhere"):
        QuadraticPenalty().consolidate(net, {n: 0 * p for n, p in net.named_parameters()})


@pytest.mark.parametrize("n", [10_000, 500_000])  # together; in blocks
def test_value_of_many_entries_is_summed_without_drift(n):
    generator = torch.Generator().manual_seed(0)
    net, penalty = nn.ParameterList([torch.zeros(n)]), QuadraticPenalty()
    F = torch.rand(n, generator=generator)
    penalty.consolidate(net, {"0": F})
    with torch.no_grad():
        net[0].copy_(torch.rand(n, generator=generator))
    exact = float((F.double() * net[0].detach().double().square()).sum())
    assert float(penalty(net).detach()) == pytest.approx(exact, rel=2e-7)
    assert float(penalty.add_gradient_(net, 1.0)) == pytest.approx(exact, rel=2e-7)

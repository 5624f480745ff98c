"""The Fisher of models that are no softmax classifiers, by the caller's own score."""

import functools

import pytest
import torch
from torch import nn

from ewc_plugin import bernoulli_score, diagonal_fisher, gaussian_score
from support.reference import relative_error


def model(outputs=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def data(N=7, outputs=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(N, outputs, generator=generator, dtype=torch.float64)


def expected(net, x, log_likelihoods):
    """1/N sum_n sum_k w_k (d log p_k / d theta)^2, one autograd call per term."""
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for n in range(len(x)):
        for weight, log_p in log_likelihoods(net(x[n : n + 1])[0], n):
            grads = torch.autograd.grad(log_p, list(net.parameters()), retain_graph=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += weight * grad.square() / len(x)
    return total


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_regression(engine, outputs):
    net, (x, y) = model(outputs), data(outputs=outputs)

    def log_likelihoods(mean, n):
        # E over y = mean + sigma eps; the score is eps / sigma: two points per axis have its
        # covariance.
        for d in range(outputs):
            for sign in (1, -1):
                target = mean.detach().clone()
                target[d] += sign * outputs**0.5 * 2
                yield 0.5 / outputs, -(target - mean).square().sum() / (2 * 4)

    score = functools.partial(gaussian_score, variance=4.0)
    found = diagonal_fisher(net, [(x, y)], score, engine=engine)
    assert relative_error(found, expected(net, x, log_likelihoods)) < 1e-12


@pytest.mark.parametrize("outputs", [1, 3])
def test_binary_labels(outputs):
    net, (x, y) = model(outputs), data(outputs=outputs)

    def log_likelihoods(logits, n):
        for label in torch.cartesian_prod(*[torch.arange(2.0)] * outputs).view(-1, outputs):
            log_p = -nn.functional.binary_cross_entropy_with_logits(
                logits, label.double(), reduction="sum"
            )
            yield float(log_p.detach().exp()), log_p

    found = diagonal_fisher(net, [(x[:3], y[:3]), (x[3:], y[3:])], bernoulli_score)
    assert relative_error(found, expected(net, x, log_likelihoods)) < 1e-12


def test_own_empirical_score():
    net, (x, y) = model(), data()
    found = diagonal_fisher(net, [(x, y)], lambda outputs, batch: batch[1] - outputs)
    wanted = expected(net, x, lambda mean, n: [(1.0, -(y[n] - mean).square().sum() / 2)])
    assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda outputs, batch: outputs.sum(1), r"\[S, N, D\] or \[N, D\] .* \(7, 2\), got \(7,\)"),
        (lambda outputs, batch: outputs / 0, "a vector that is not finite"),
    ],
)
def test_bad_scores(score, message):
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(model(), [data()], score)


def test_options_of_the_softmax_types_are_refused():
    with pytest.raises(ValueError, match="`n_draws` enters fisher_type 'sampled' alone, got a sco"):
        diagonal_fisher(model(), [data()], gaussian_score, n_draws=2)

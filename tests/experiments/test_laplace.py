"""The Laplace view: precisions, optima, the weight that Bayes' rule gives, and the integrals."""

import math

import pytest
import torch
import torch.nn.functional as F

from ewc_plugin import QuadraticPenalty, diagonal_fisher
from experiments.results import tables
from experiments.studies.laplace.problems import (
    PROBLEMS,
    Solved,
    TwoParameters,
    nats,
    solve,
    total_variations,
)
from experiments.studies.laplace.study import LAPLACE, compare


@pytest.fixture(scope="module", params=list(PROBLEMS), ids=["logistic", "network"])
def solved(request):
    return solve(PROBLEMS[request.param], n=60, seed=0)


def gradient(function, theta):
    (found,) = torch.autograd.grad(function(t := theta[None].requires_grad_()).sum(), t)
    return found[0]


def test_full_precision_has_the_packages_exact_diagonal(solved):
    full, diagonal = (solved.precisions[name] for name in ("full", "diagonal, exact"))
    torch.testing.assert_close(full.diagonal(), diagonal.diagonal(), rtol=1e-10, atol=0)
    off = full - torch.diag(full.diagonal())
    assert float(off.abs().max()) > 1


def test_logistic_regressions_posterior_has_the_curvature_n_f_and_the_priors():
    solved = solve(PROBLEMS["logistic regression"], n=60, seed=0)
    second = torch.autograd.functional.hessian(
        lambda t: solved.posterior_nats(t[None])[0], solved.anchor
    )
    prior = torch.eye(2, dtype=torch.float64) / 9
    torch.testing.assert_close(second, solved.precisions["full"] + prior, rtol=1e-9, atol=0)


def test_optima_are_stationary(solved):
    assert float(gradient(solved.posterior_nats, solved.anchor).abs().max()) < 1e-3
    assert float(gradient(solved.joint_nats, solved.joint).abs().max()) < 1e-3


def test_bayes_weight_is_half_a_lambda_in_the_training_loss(solved):
    model = TwoParameters(solved.problem.logit)
    model.theta.data = solved.anchor.clone()
    penalty = QuadraticPenalty()
    fisher = diagonal_fisher(model, [(solved.a.x, solved.a.y)], "exact")
    penalty.consolidate(model, fisher)
    model.theta.data = solved.ewc("diagonal, exact", factor=1.0)
    loss = F.cross_entropy(model(solved.b.x), solved.b.y) + 0.5 * penalty(model)
    (found,) = torch.autograd.grad(loss, [model.theta])
    assert float(found.abs().max()) < 1e-4


def test_nats_are_the_cross_entropy(solved):
    model = TwoParameters(solved.problem.logit)
    model.theta.data = solved.joint.clone()
    expected = F.cross_entropy(model(solved.a.x), solved.a.y, reduction="sum")
    found = nats(solved.problem, solved.a, solved.joint[None])[0]
    torch.testing.assert_close(found, expected.detach())


class Normal(Solved):
    """A posterior that is normal, with the given multiple of the full precision."""

    scale = 1.0

    def posterior_nats(self, theta):
        return self.scale * self.quadratic(theta, "full")


def test_total_variation_of_normal_densities():
    solved = solve(PROBLEMS["logistic regression"], n=60, seed=0)
    normal = Normal(**vars(solved))
    assert total_variations(normal)["full"] < 1e-3
    Normal.scale = 4.0  # in two dimensions: exp(-r / 2) - exp(-2 r) at r = ln(4) / 1.5
    r = math.log(4) / 1.5
    expected = math.exp(-r / 2) - math.exp(-2 * r)
    try:
        assert total_variations(normal)["full"] == pytest.approx(expected, abs=2e-3)
    finally:
        Normal.scale = 1.0


def test_rows(solved):
    rows = ({"problem": "p", "n": 60, "seed": 0, **row} for row in compare(solved, (0.1, 1.0)))
    table = tables.frame(rows, LAPLACE)
    assert len(table) == 1 + 3 * 2
    assert table["total_variation"].notna().sum() == 3
    assert table.loc[table["factor"] == 1, "ewc_lambda"].tolist() == [0.5] * 3

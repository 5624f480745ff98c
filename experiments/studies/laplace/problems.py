"""Two tasks of two parameters, small enough to integrate: optima, precisions and posteriors.

log p(theta | A, B) = log p(B | theta) + log p(theta | A) - log p(B | A). EWC puts a normal density
in the place of p(theta | A), centred at theta*_A, with the precision N_A diag(F).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from ewc_plugin.fisher.diagonal import diagonal_fisher

PRIOR_STD = 3.0
QUADRATICS = ("diagonal, exact", "diagonal, predicted", "full")
GRID = 161  # points per axis
NEGLIGIBLE = 20.0  # nats below the maximum


class TwoParameters(nn.Module):
    """Binary labels with the logits [0, f(theta, x)] and theta [2]."""

    def __init__(self, logit: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.logit = logit

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 2]."""
        z = self.logit(self.theta[None], x)[0]
        return torch.stack([torch.zeros_like(z), z], dim=1)


@dataclass(frozen=True)
class Problem:
    """The model and the parameters that both tasks' labels are drawn with.

    Attributes:
        logit: (theta [G, 2], x [N, I]) -> [G, N].
        truth: The theta that each task's labels are drawn with.
        correlation: Of the inputs' two features, by task; None for a single feature.
    """

    logit: Callable[[Tensor, Tensor], Tensor]
    truth: tuple[tuple[float, float], tuple[float, float]]
    correlation: tuple[float, float] | None = None


PROBLEMS = {
    "logistic regression": Problem(
        lambda theta, x: theta @ x.T, truth=((2.0, -1.0), (0.5, 1.5)), correlation=(0.8, -0.5)
    ),
    "two-weight network": Problem(
        lambda theta, x: theta[:, 1:] * torch.tanh(theta[:, :1] * x.T),
        truth=((1.5, 2.0), (0.5, 4.0)),
    ),
}


@dataclass(frozen=True)
class Data:
    """A task's inputs [N, I] and labels [N] in 0, 1."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Solved:
    """One draw of both tasks.

    Attributes:
        anchor: theta*_A, [2].
        alone: The optimum of B with the prior, [2].
        joint: The optimum of A, B and the prior, [2].
        precisions: N_A F by name, [2, 2] each.
    """

    problem: Problem
    a: Data
    b: Data
    anchor: Tensor
    alone: Tensor
    joint: Tensor
    precisions: dict[str, Tensor]

    def joint_nats(self, theta: Tensor) -> Tensor:
        """- log p(A, B, theta) for theta [G, 2], up to a constant, [G]."""
        return nats(self.problem, self.a, theta) + nats(self.problem, self.b, theta) + prior(theta)

    def posterior_nats(self, theta: Tensor) -> Tensor:
        """- log p(theta | A) up to a constant, [G]."""
        return nats(self.problem, self.a, theta) + prior(theta)

    def quadratic(self, theta: Tensor, name: str) -> Tensor:
        """1/2 (theta - theta*)^T N_A F (theta - theta*), [G]."""
        d = theta - self.anchor
        return 0.5 * torch.einsum("gi,ij,gj->g", d, self.precisions[name], d)

    def ewc(self, name: str, factor: float) -> Tensor:
        """EWC's optimum on B, reached from theta*_A, [2]."""
        return optimum(
            lambda t: nats(self.problem, self.b, t) + factor * self.quadratic(t, name), self.anchor
        )


def solve(problem: Problem, n: int, seed: int) -> Solved:
    """Draw both tasks, n samples each, and find the optima and the precisions."""
    a, b = (draw(problem, task, n, seed) for task in (0, 1))
    start = torch.tensor(problem.truth[0], dtype=torch.float64)
    anchor = optimum(lambda t: nats(problem, a, t) + prior(t), start)
    return Solved(
        problem,
        a,
        b,
        anchor=anchor,
        alone=optimum(lambda t: nats(problem, b, t) + prior(t), anchor),
        joint=optimum(lambda t: nats(problem, a, t) + nats(problem, b, t) + prior(t), anchor),
        precisions=precisions(problem, a, anchor),
    )


def draw(problem: Problem, task: int, n: int, seed: int) -> Data:
    """Normal inputs, and labels from the task's own theta."""
    generator = torch.Generator().manual_seed(1000 * seed + task)
    n_features = 1 if problem.correlation is None else 2
    x = torch.randn(n, n_features, generator=generator, dtype=torch.float64)
    if problem.correlation is not None:
        r = problem.correlation[task]
        x[:, 1] = r * x[:, 0] + (1 - r * r) ** 0.5 * x[:, 1]
    theta = torch.tensor([problem.truth[task]], dtype=torch.float64)
    p = problem.logit(theta, x)[0].sigmoid()
    return Data(x, (torch.rand(n, generator=generator, dtype=torch.float64) < p).long())


def nats(problem: Problem, data: Data, theta: Tensor) -> Tensor:
    """- log p(data | theta) for theta [G, 2], [G]."""
    sign = 2.0 * data.y - 1
    return -F.logsigmoid(sign * problem.logit(theta, data.x)).sum(1)


def prior(theta: Tensor) -> Tensor:
    """- log of a normal density with `PRIOR_STD`, up to a constant, [G]."""
    return 0.5 * (theta / PRIOR_STD).square().sum(1)


def precisions(problem: Problem, a: Data, anchor: Tensor) -> dict[str, Tensor]:
    """N_A F at theta*_A: the package's diagonals, and the full matrix."""
    model = TwoParameters(problem.logit)
    model.theta.data = anchor.clone()
    N = len(a.x)
    found = {
        f"diagonal, {kind}": N * torch.diag(diagonal_fisher(model, [(a.x, a.y)], kind)["theta"])
        for kind in ("exact", "predicted")
    }
    J = torch.func.jacrev(lambda t: problem.logit(t[None], a.x)[0])(anchor)  # [N, 2]
    p = problem.logit(anchor[None], a.x)[0].sigmoid()
    return found | {"full": torch.einsum("n,ni,nj->ij", p * (1 - p), J, J)}


def optimum(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The minimum of objective([1, 2]) -> [1] that BFGS reaches from `start`, [2]."""

    def value_and_gradient(theta: Any) -> tuple[float, Any]:
        t = torch.tensor(theta[None], requires_grad=True)
        value = objective(t).sum()
        (gradient,) = torch.autograd.grad(value, t)
        return float(value.detach()), gradient[0].numpy()

    found = minimize(value_and_gradient, start.numpy(), jac=True, method="BFGS")
    return torch.from_numpy(found.x)


def total_variations(solved: Solved) -> dict[str, float]:
    """Half the integral of |p(theta | A) - normal density|, by quadratic; a fraction in 0-1."""
    axes = box(solved.posterior_nats)
    points = torch.cartesian_prod(*axes)
    cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    p = torch.softmax(-solved.posterior_nats(points), 0)  # mass per cell
    found = {}
    for name, precision in solved.precisions.items():
        density = torch.exp(-solved.quadratic(points, name)) * precision.det().sqrt() / (2 * np.pi)
        q = density * cell
        outside = max(0.0, 1 - float(q.sum()))
        found[name] = 0.5 * (float((p - q).abs().sum()) + outside)
    return found


def box(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Axes of a grid over where the function is within `NEGLIGIBLE` of its minimum."""
    limits = [(-4 * PRIOR_STD, 4 * PRIOR_STD)] * 2
    for _ in range(2):  # coarse, then fine
        axes = [torch.linspace(*limit, GRID, dtype=torch.float64) for limit in limits]
        points = torch.cartesian_prod(*axes)
        values = function(points)
        inside = points[values < values.min() + NEGLIGIBLE]
        steps = [float(axis[1] - axis[0]) for axis in axes]
        limits = [
            (float(column.min()) - step, float(column.max()) + step)
            for column, step in zip(inside.T, steps, strict=True)
        ]
    first, second = (torch.linspace(*limit, GRID, dtype=torch.float64) for limit in limits)
    return first, second

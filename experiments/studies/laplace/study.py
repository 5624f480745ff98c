"""EWC as a Laplace approximation, on problems of two parameters, small enough to integrate.

log p(theta | A, B) = log p(B | theta) + log p(theta | A) - log p(B | A). EWC puts a normal density
in the place of p(theta | A), centred at theta*_A, with the precision N_A diag(F). Beside it: the
true posterior of A, and the joint optimum of A and B, which EWC's optimum stands in for.

With the mean loss over B's samples that training uses, the weight that Bayes' rule gives the
penalty is ewc_lambda = N_A / (2 N_B), Avalanche's lambda; 1/2 for tasks of equal size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from torch import Tensor

from experiments.reporting.study_output import columns, study_output
from experiments.results.schemas import PROVENANCE
from experiments.settings.run import require
from experiments.settings.values import Between, Count, Seed, check_values
from experiments.studies.laplace.figure import NAIVE, draw_densities, draw_weights
from experiments.studies.laplace.problems import (
    PROBLEMS,
    QUADRATICS,
    Solved,
    solve,
    total_variations,
)

_AMOUNT = pa.Check.ge(-1e-6)
LAPLACE = pa.DataFrameSchema(
    {
        **columns(str, "problem"),
        **columns(int, "n", check=pa.Check.ge(1)),
        **columns(int, "seed"),
        **columns(str, "quadratic", check=pa.Check.isin([NAIVE, *QUADRATICS])),
        **columns(float, "factor", "ewc_lambda", check=pa.Check.ge(0)),
        **columns(float, "theta_1", "theta_2"),
        **columns(float, "distance_to_joint", check=pa.Check.ge(0)),
        **columns(float, "excess_nats", check=_AMOUNT),
        **columns(
            float, "total_variation", check=pa.Check.in_range(-1e-6, 1 + 1e-6), nullable=True
        ),
        **PROVENANCE,
    },
    unique=["problem", "n", "seed", "quadratic", "factor"],
    strict=True,
    name="laplace.csv",
)


# Fewer can be so alike that F is singular; more need gigabytes for the posterior on its grid.
Samples = Annotated[int, Between(10, 10_000)]


@dataclass(frozen=True)
class Laplace:
    """EWC's quadratic beside the true posterior; its optimum beside the joint one."""

    n: tuple[Samples, ...] = (30, 100, 300, 1000)
    """Samples per task."""
    pictured: Samples = 100
    """Which of them the picture shows, and the penalty's weight is varied for."""
    factors: Count = 25
    """Weights of the penalty from 0.001 to 1,000 times Bayes' own."""
    seeds: tuple[Seed, ...] = tuple(range(10))
    """Each draws the tasks' data anew; the first is pictured."""
    out: str = "runs/laplace"
    """Folder of the table and the plot."""

    def __post_init__(self) -> None:
        check_values(self)
        require(self.pictured in self.n, "pictured", f"one of `n` {self.n}", self.pictured)
        require(
            self.factors % 2, "factors", "odd, so that Bayes' own is in the middle", self.factors
        )


def run(settings: Laplace) -> pd.DataFrame:
    """Solve every problem for every number of samples and seed; write `laplace.csv` and figures."""
    output = study_output(settings)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    pictured: dict[str, Solved] = {}
    for name, problem in PROBLEMS.items():
        for n in settings.n:
            for seed in settings.seeds:
                solved = solve(problem, n, seed)
                if n == settings.pictured and seed == settings.seeds[0]:
                    pictured[name] = solved
                factors = np.logspace(-3, 3, settings.factors) if n == settings.pictured else (1.0,)
                base = {"problem": name, "n": n, "seed": seed}
                rows += ({**base, **row} for row in compare(solved, factors))
    table = output.table(rows, LAPLACE)
    n_draws = len(settings.seeds)
    output.figure(draw_densities(pictured, table[table["n"] == settings.pictured]), "laplace")
    output.figure(draw_weights(table, settings.pictured, n_draws), "laplace_lambda")
    shown = ["distance_to_joint", "excess_nats", "total_variation"]
    at_bayes = table[table["factor"].isin([0.0, 1.0])]
    by = at_bayes.groupby(["problem", "n", "quadratic"], sort=False)[shown].median()
    output.console.print("Medians over the seeds, the penalty weighted as Bayes' rule has it:")
    output.show(by)
    return table


def compare(solved: Solved, factors: Any) -> Iterator[dict[str, Any]]:
    """A row for B alone, and one per quadratic and weight of the penalty relative to Bayes'."""
    yield _row(solved, NAIVE, 0.0, solved.alone, float("nan"))
    variations = total_variations(solved)
    for name in QUADRATICS:
        for factor in map(float, factors):
            theta = solved.ewc(name, factor)
            at_bayes = abs(factor - 1) < 1e-9
            variation = variations[name] if at_bayes else float("nan")
            yield _row(solved, name, 1.0 if at_bayes else factor, theta, variation)


def _row(
    solved: Solved, name: str, factor: float, theta: Tensor, variation: float
) -> dict[str, Any]:
    both = solved.joint_nats(torch.stack([theta, solved.joint]))
    return {
        "quadratic": name,
        "factor": factor,
        "ewc_lambda": factor * len(solved.a.x) / (2 * len(solved.b.x)),
        "theta_1": float(theta[0]),
        "theta_2": float(theta[1]),
        "distance_to_joint": float((theta - solved.joint).norm()),
        "excess_nats": float(both[0] - both[1]),
        "total_variation": variation,
    }

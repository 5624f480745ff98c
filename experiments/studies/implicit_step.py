"""Accuracy with the implicit penalty step, over six orders of magnitude of lambda.

Permuted MNIST, SGD and Adam, the penalty in the gradient beside the implicit step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import get_args

import pandas as pd
import pandera.pandas as pa
from matplotlib.figure import Figure

from experiments.reporting.figures.over_lambda import Line, over_lambda
from experiments.reporting.figures.style import PENALTY_COLOURS
from experiments.reporting.labels import number, stream_title
from experiments.reporting.study_output import CURVE_COLUMNS, columns
from experiments.results.statistics import by_lambda
from experiments.settings.grids import Job
from experiments.settings.run import STREAM, Dataset, Optimizer, RunSettings
from experiments.settings.unset import UNSET
from experiments.settings.values import Count, Lambda, Seed
from experiments.studies.completed import completed_study

METRICS = ("average_accuracy", "learning_accuracy", "forgetting")
LEARNING_RATE: dict[Optimizer, float] = {"sgd": 0.1, "adam": 1e-3}
STEPS = {"in the gradient": "gradient", "implicit step": "implicit"}


IMPLICIT_STEP = pa.DataFrameSchema(
    {
        **columns(str, "optimizer", "penalty"),
        **CURVE_COLUMNS,
    },
    unique=["optimizer", "penalty", "metric", "ewc_lambda"],
    strict=True,
    name="implicit_step.csv",
)


@dataclass(frozen=True)
class ImplicitStep(Job):
    """The penalty in the gradient beside the implicit step, for every lambda."""

    ewc_lambda: tuple[Lambda, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
    """Penalty strengths."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Each seeds the permutations, the initial weights and the order of the samples."""
    experiences: Count = 3
    """Number of permutations."""
    hidden_size: Count = 100
    """Units in each of the two hidden layers: small, since the sweep has many runs."""

    name = "implicit-step"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Settings for both optimizers, both placements of the penalty, all lambdas and seeds."""
        ways = product(self.seeds, get_args(Optimizer), STEPS.values(), self.ewc_lambda)
        for seed, optimizer, step, ewc_lambda in ways:
            yield RunSettings(
                *("permuted", dataset, "domain", "ewc", seed),
                fisher_type="predicted",
                ewc_lambda=ewc_lambda,
                mode="separate",
                n_experiences=self.experiences,
                epochs=1 if dataset != "digits" else 20,
                optimizer=optimizer,
                learning_rate=LEARNING_RATE[optimizer],
                data_path=self.data_path,
                device=self.device,
                penalty_step=None if step == UNSET["penalty_step"] else step,
                hidden_size=self.hidden_size,
            )


def run(settings: ImplicitStep) -> pd.DataFrame:
    """Run the sweep; write `implicit_step.csv` and `implicit_step.png` beside the run tables."""
    runs, output = completed_study(settings)
    parts = [
        part.assign(optimizer=optimizer, penalty=way)
        for (optimizer, way, _), part in curves(runs).items()
    ]
    table = output.table(pd.concat(parts, ignore_index=True), IMPLICIT_STEP)
    output.figure(draw_steps(runs), "implicit_step")
    output.show(table[table["metric"] == METRICS[0]], "%.4f", index=False)
    return table


def curves(runs: pd.DataFrame) -> dict[tuple[str, str, str], pd.DataFrame]:
    """The curve over lambda of every optimizer, way and metric."""
    return {
        (optimizer, way, metric): by_lambda(_runs_of(runs, optimizer, way), metric)
        for optimizer in get_args(Optimizer)
        for way in STEPS
        for metric in METRICS
    }


def _runs_of(runs: pd.DataFrame, optimizer: str, way: str) -> pd.DataFrame:
    chosen = runs["penalty_step"] == STEPS[way]
    return runs[chosen & (runs["optimizer"] == optimizer)]


def draw_steps(runs: pd.DataFrame) -> Figure:
    """A row per metric, a column per optimizer."""
    panels = {
        f"{optimizer}, learning rate {number(LEARNING_RATE[optimizer])}": [
            Line(way, PENALTY_COLOURS[way], _runs_of(runs, optimizer, way)) for way in STEPS
        ]
        for optimizer in get_args(Optimizer)
    }
    first = runs.iloc[0]
    stream = stream_title(*(first[name] for name in STREAM))
    return over_lambda(panels, f"The implicit step over λ: {stream}", METRICS)

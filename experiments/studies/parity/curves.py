"""Accuracy and forgetting over lambda: every Fisher type, and Avalanche's with other mini-batches.

Permuted MNIST with plain SGD, where too large a lambda diverges, in a small network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import pandera.pandas as pa
from matplotlib.figure import Figure

from experiments.reporting.figures import style
from experiments.reporting.figures.over_lambda import METRICS, Line, over_lambda, shaded
from experiments.reporting.labels import number, stream_title
from experiments.reporting.study_output import CURVE_COLUMNS
from experiments.results.schemas import RUNS
from experiments.results.statistics import by_lambda
from experiments.settings.grids import Job
from experiments.settings.run import STREAM, Dataset, RunSettings
from experiments.settings.unset import UNSET
from experiments.settings.values import Count, Seed
from experiments.studies.completed import completed_study

LAMBDAS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
NAIVE = "naive"
TYPES = ("predicted", "empirical", "sampled", "exact")
# Mini-batches of Avalanche's importances, their order, and how their line is told apart.
BUILTIN = {
    (32, None): ("-", "o"),
    (32, "shuffled"): ("-", "s"),
    (128, None): ("--", "o"),
    (128, "shuffled"): ("--", "s"),
}
WAY = ("method", "fisher_type", "importance_batch", "importance_order")
NETWORK = (
    *("n_experiences", "hidden_layers", "hidden_size"),
    *("optimizer", "learning_rate", "batch_size"),
)
LAMBDA_CURVES = pa.DataFrameSchema(
    {**{name: RUNS.columns[name] for name in (*WAY, *NETWORK)}, **CURVE_COLUMNS},
    unique=[*WAY, "metric", "ewc_lambda"],
    strict=True,
    name="lambda_curves.csv",
)


@dataclass(frozen=True)
class Curves(Job):
    """A grid of lambda for each way to compute F."""

    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Each seeds the permutations, the initial weights and the order of the samples."""
    hidden_size: Count = 100
    """Units in each of the two hidden layers."""
    experiences: Count = 5
    """Number of permutations."""

    name = "parity/curves"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Every way at every lambda, and no protection, seed by seed."""
        for seed in self.seeds:
            base = RunSettings(
                *("permuted", dataset, "domain", NAIVE, seed),
                n_experiences=self.experiences,
                epochs=1 if dataset != "digits" else 20,
                batch_size=256 if dataset != "digits" else 32,
                optimizer="sgd",
                learning_rate=0.1,
                hidden_size=self.hidden_size,
                device=self.device,
                data_path=self.data_path,
            )
            yield base
            for ewc_lambda in LAMBDAS:
                for way in WAYS.values():
                    yield replace(base, ewc_lambda=ewc_lambda, mode="separate", **way)


WAYS: dict[str, dict[str, Any]] = {
    **{name: {"method": "ewc", "fisher_type": name} for name in TYPES},
    **{
        f"avalanche-ewc, batch {size}, {order or 'sorted by class'}": {
            "method": "avalanche-ewc",
            "importance_batch": size,
            "importance_order": order,
        }
        for size, order in BUILTIN
    },
}


def run_curves(settings: Curves, *, make: bool = True) -> pd.DataFrame:
    """Run the grid; write `lambda_curves.csv` and `lambda_curves.png`."""
    runs, output = completed_study(settings, make=make)
    table = output.table(curves(runs), LAMBDA_CURVES)
    output.figure(draw_ways(runs), "lambda_curves")
    return table


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval of both metrics over lambda, for each way."""
    parts = []
    for name in (*WAYS, NAIVE):
        rows = _runs_of(runs, name)
        for metric in METRICS if len(rows) else ():
            settings = {name: rows[name].iloc[0] for name in (*WAY, *NETWORK)}
            parts.append(by_lambda(rows, metric).assign(**settings))
    return pd.concat(parts, ignore_index=True)


def _runs_of(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    for column, value in WAYS.get(name, {"method": NAIVE}).items():
        runs = runs[runs[column].eq(value or UNSET[column])]
    return runs


def _setting(runs: pd.DataFrame) -> str:
    first = runs.iloc[0]
    return (
        f"{first['n_experiences']} experiences, {first['hidden_layers']}x{first['hidden_size']}, "
        f"{first['optimizer']} {number(first['learning_rate'])}, mini-batches of "
        f"{first['batch_size']}"
    )


def draw_ways(runs: pd.DataFrame) -> Figure:
    """Ours on the left, Avalanche's EWC on the right, with no protection as a level in both."""
    naive = Line("Naive", style.colour_of(NAIVE), _runs_of(runs, NAIVE))
    ours = [Line(name, style.colour_of("ewc", name), _runs_of(runs, name)) for name in TYPES]
    theirs = []
    for (name, way), look in zip(list(WAYS.items())[len(TYPES) :], BUILTIN.values(), strict=True):
        colour = style.colour_of(way["method"])
        words = name.removeprefix("avalanche-ewc, ")
        theirs.append(Line(words, colour, _runs_of(runs, name), *look))
    panels = {
        "This package, by Fisher type": [*ours, naive],
        "Avalanche's EWC, by importance mini-batch and order": [*shaded(theirs), naive],
    }
    stream = stream_title(*(runs.iloc[0][name] for name in STREAM))
    return over_lambda(panels, f"Accuracy over λ: {stream}\n{_setting(runs)}", METRICS)

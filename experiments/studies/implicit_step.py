"""What the implicit penalty step does to accuracy over six orders of magnitude of lambda.

Permuted MNIST, SGD and Adam, the penalty in the gradient beside the implicit step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import matplotlib.pyplot as plt
import pandas as pd
from rich.console import Console

from experiments.reporting.figures.over_lambda import draw_curve
from experiments.reporting.figures.style import DPI
from experiments.results.statistics import by_lambda
from experiments.results.tables import replace_file
from experiments.settings.grids import Job
from experiments.settings.run import Dataset, Optimizer, RunSettings
from experiments.sweeps.jobs import completed_runs

METRICS = ("average_accuracy", "learning_accuracy", "forgetting")
LEARNING_RATE: dict[Optimizer, float] = {"sgd": 0.1, "adam": 1e-3}
STEPS = {"in the gradient": (None, "#0072B2"), "implicit step": ("implicit", "#D55E00")}


@dataclass(frozen=True)
class ImplicitStep(Job):
    """The penalty in the gradient beside the implicit step, for every lambda."""

    ewc_lambda: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
    """Penalty strengths."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds the permutations, the initial weights and the order of the samples."""
    experiences: int = 3
    """Number of permutations."""
    hidden_size: int = 100
    """Units in each of the two hidden layers: small, since the sweep has many runs."""

    name = "implicit-step"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Both optimizers, both ways, every lambda and seed."""
        for seed in self.seeds:
            for optimizer in get_args(Optimizer):
                for step, _ in STEPS.values():
                    for ewc_lambda in self.ewc_lambda:
                        yield RunSettings(
                            "permuted",
                            dataset,
                            "domain",
                            "ewc",
                            seed,
                            fisher_type="predicted",
                            ewc_lambda=ewc_lambda,
                            mode="separate",
                            n_experiences=self.experiences,
                            epochs=1 if dataset == "mnist" else 20,
                            optimizer=optimizer,
                            learning_rate=LEARNING_RATE[optimizer],
                            data_path=self.data_path,
                            device=self.device,
                            penalty_step=step,
                            hidden_size=self.hidden_size,
                        )


def run(settings: ImplicitStep) -> pd.DataFrame:
    """Runs the sweep; writes `implicit_step.csv` and `implicit_step.png` beside the run tables.

    Args:
        settings: The sweep.

    Returns:
        A row per optimizer, way, metric and lambda.
    """
    console = Console(quiet=settings.quiet)
    runs, folder = completed_runs(settings, console)
    parts = []
    for (optimizer, way, metric), part in curves(runs).items():
        labels = {"optimizer": optimizer, "penalty": way, "metric": metric}
        parts.append(part.assign(**labels)[[*labels, *part.columns]])
    table = pd.concat(parts, ignore_index=True)
    replace_file(folder / "implicit_step.csv", table.to_csv(index=False))
    plot(runs).savefig(folder / "implicit_step.png", dpi=DPI, metadata={"Software": None})
    console.print(table[table["metric"] == METRICS[0]].to_string(index=False), highlight=False)
    return table


def curves(runs: pd.DataFrame) -> dict[tuple[str, str, str], pd.DataFrame]:
    """The curve over lambda of every optimizer, way and metric."""
    found = {}
    for optimizer in get_args(Optimizer):
        for way, (step, _) in STEPS.items():
            chosen = runs["penalty_step"].isna() if step is None else runs["penalty_step"] == step
            rows = runs[chosen & (runs["optimizer"] == optimizer)]
            for metric in METRICS:
                found[optimizer, way, metric] = by_lambda(rows, metric)
    return found


def plot(runs: pd.DataFrame) -> plt.Figure:
    """A row per metric, a column per optimizer."""
    optimizers = get_args(Optimizer)
    figure, axes = plt.subplots(
        len(METRICS),
        len(optimizers),
        figsize=(9, 8),
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for (optimizer, way, metric), curve in curves(runs).items():
        axis = axes[METRICS.index(metric), optimizers.index(optimizer)]
        axis.set(xscale="log", ylim=(-0.05, 0.6) if metric == "forgetting" else (0, 1))
        draw_curve(axis, curve, way, STEPS[way][1])
        axis.grid(alpha=0.3)
        axis.set_ylabel(metric.replace("_", " ") if optimizer == optimizers[0] else "")
        if metric == METRICS[0]:
            axis.set_title(f"{optimizer}, lr {LEARNING_RATE[optimizer]:g}")  # type: ignore[index]
            axis.legend(fontsize=8)
        if metric == METRICS[-1]:
            axis.set_xlabel("ewc_lambda")
    n = runs["seed"].nunique()
    figure.suptitle(f"Permuted {runs['dataset'].iloc[0]}: mean over {n} seeds, band: 95 % interval")
    return figure

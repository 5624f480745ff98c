"""Pictures of a protocol: accuracies as tasks come, or over lambda."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.reporting.figures.over_lambda import draw_curve
from experiments.reporting.figures.style import DPI
from experiments.results.statistics import by_lambda, interval
from experiments.studies.reproduce.protocol import Protocol

COLOURS = ("#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#000000", "#56B4E9")


def plot_protocol(
    protocol: Protocol, accuracy: pd.DataFrame, runs: pd.DataFrame, folder: Path
) -> list[Path]:
    """Draws what suits the protocol.

    Args:
        protocol: Whose runs they are.
        accuracy: Rows of `accuracy.csv`.
        runs: Rows of `runs.csv`; only complete ones are drawn.
        folder: Where the PNG files go.

    Returns:
        The files.
    """
    figures = {}
    if protocol.name == "kirkpatrick2017":
        figures["tasks"] = _over_tasks(protocol, accuracy, runs)
    if protocol.name == "vandeven2025":
        figures["lambda"] = _over_lambda(runs)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=DPI, metadata={"Software": None})
        plt.close(figure)
    return files


def curves_over_tasks(
    protocol: Protocol, accuracy: pd.DataFrame, runs: pd.DataFrame
) -> pd.DataFrame:
    """Accuracy of task 1 and the mean over tasks seen, as tasks come.

    Args:
        protocol: Whose runs they are.
        accuracy: Rows of `accuracy.csv`.
        runs: Rows of `runs.csv`.

    Returns:
        Columns `arm`, `quantity`, `tasks`, and those of `tables.interval`.
    """
    rows = []
    done = runs[runs["status"] == "ok"]
    seen = accuracy[(accuracy["train_exp"] >= 0) & (accuracy["eval_exp"] <= accuracy["train_exp"])]
    for arm in protocol.arms:
        hashes = [protocol.run_of(arm, d, 0).config_hash for d in ("mnist", "digits")]
        ids = done.loc[done["config_hash"].isin(hashes), "run_id"]
        mine = seen[seen["run_id"].isin(ids)]
        for quantity, part in (("task 1", mine[mine["eval_exp"] == 0]), ("tasks seen", mine)):
            per_run = part.groupby(["train_exp", "run_id"])["accuracy"].mean()
            for train_exp, values in per_run.groupby("train_exp"):
                found = interval(np.asarray(values, float))
                rows.append(
                    {"arm": arm.label, "quantity": quantity, "tasks": train_exp + 1} | found
                )
    return pd.DataFrame(rows)


def _over_tasks(protocol: Protocol, accuracy: pd.DataFrame, runs: pd.DataFrame) -> plt.Figure:
    table = curves_over_tasks(protocol, accuracy, runs)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    colours = dict(zip((arm.label for arm in protocol.arms), COLOURS, strict=False))
    for axis, quantity in zip(axes, ("task 1", "tasks seen"), strict=True):
        for label, curve in table[table["quantity"] == quantity].groupby("arm", sort=False):
            n = int(curve["n"].min())
            axis.plot(
                curve["tasks"],
                curve["mean"],
                marker="o",
                color=colours[label],
                label=f"{label} (n = {n})",
            )
            axis.fill_between(
                curve["tasks"],
                curve["ci_low"],
                curve["ci_high"],
                color=colours[label],
                alpha=0.15,
                lw=0,
            )
        axis.set(title=f"accuracy on {quantity}", xlabel="tasks trained on", ylim=(0, 1))
        axis.grid(alpha=0.3)
    for reference in {arm.reference.value for arm in protocol.arms if arm.reference}:
        axes[1].axhline(reference, color="grey", linestyle="--", label=f"published, {reference:g}")
    axes[1].legend(fontsize=8)
    return figure


def _over_lambda(runs: pd.DataFrame) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set_xscale("log")
    penalised = runs[runs["method"] == "ewc"]
    for (name, part), colour in zip(penalised.groupby("fisher_type"), COLOURS, strict=False):
        draw_curve(axis, by_lambda(part, "average_accuracy"), name, colour)
    naive = runs.loc[runs["method"] == "naive", "average_accuracy"]
    axis.axhline(naive.mean(), color="grey", linestyle="--", label="Naive")
    # Student's intervals of few seeds know no bounds.
    axis.set_ylim(np.floor(20 * runs["average_accuracy"].min()) / 20, 1.0)
    axis.set(xlabel="ewc_lambda", ylabel="average accuracy", title=f"n = {runs['seed'].nunique()}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return figure

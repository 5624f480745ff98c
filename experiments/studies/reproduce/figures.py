"""A protocol's own figure: accuracy on the first task and on all seen, as tasks come."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reporting.figures import style
from experiments.reporting.figures.over_lambda import seeds_text
from experiments.results.statistics import interval
from experiments.studies.reproduce.protocol import Protocol

TASKS_DRAWN = ("kirkpatrick2017",)  # protocols whose source shows accuracies as tasks come


def curves_over_tasks(
    protocol: Protocol, accuracy: pd.DataFrame, runs: pd.DataFrame
) -> pd.DataFrame:
    """Accuracy of task 1 and the mean over tasks seen, as tasks come.

    Args:
        protocol: Whose runs they are.
        accuracy: Rows of `accuracy.csv`.
        runs: Rows of `runs.csv`.

    Returns:
        Columns `arm`, `colour`, `quantity`, `tasks`, and those of `statistics.interval`.
    """
    rows = []
    done = runs[runs["status"] == "ok"]
    seen = accuracy[(accuracy["train_exp"] >= 0) & (accuracy["eval_exp"] <= accuracy["train_exp"])]
    for arm in protocol.arms:
        settings = [protocol.run_of(arm, dataset, 0) for dataset in ("mnist", "digits")]
        hashes = [run.config_hash for run in settings]
        ids = done.loc[done["config_hash"].isin(hashes), "run_id"]
        mine = seen[seen["run_id"].isin(ids)]
        colour = style.colour_of(settings[0].method, settings[0].fisher_type)
        for quantity, part in (("task 1", mine[mine["eval_exp"] == 0]), ("tasks seen", mine)):
            per_run = part.groupby(["train_exp", "run_id"])["accuracy"].mean()
            for train_exp, values in per_run.groupby("train_exp"):
                row = {"arm": arm.label, "colour": colour, "quantity": quantity}
                found = interval(np.asarray(values, float))
                rows.append({**row, "tasks": train_exp + 1, **found})
    return pd.DataFrame(rows)


def draw_tasks(protocol: Protocol, accuracy: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Accuracy on task 1 on the left, the mean over those seen on the right."""
    table = curves_over_tasks(protocol, accuracy, runs)
    figure, axes = plt.subplots(1, 2, figsize=(10.6, 4), sharey=True, layout="constrained")
    references = {arm.reference.value for arm in protocol.arms if arm.reference}
    axes[0].set_ylim(style.limits([*table["mean"], *references]))
    for axis, quantity in zip(axes, ("task 1", "tasks seen"), strict=True):
        ends = []
        part = table[table["quantity"] == quantity]
        for (label, colour), curve in part.groupby(["arm", "colour"], sort=False):
            look = {"color": colour, "marker": "o", "markersize": 3.5}
            axis.plot(curve["tasks"], curve["mean"], **look)
            low, high = curve["ci_low"], curve["ci_high"]
            axis.fill_between(curve["tasks"], low, high, color=colour, alpha=0.13, lw=0)
            ends.append(style.EndLabel(label, float(curve["mean"].iloc[-1]), colour))
        if quantity == "tasks seen":
            for value in references:
                axis.axhline(value, color=style.INK, linestyle="--", lw=1)
                ends.append(style.EndLabel(f"published, {value:g}", value, style.INK))
        axis.set(title=f"accuracy on {quantity}", xlabel="tasks trained on")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.label_ends(axis, ends)
    note = f"mean over seeds ({seeds_text(runs)}), band: 95 % interval"
    style.title(figure, protocol.source, note)
    return figure

"""The demonstration's figure: accuracy and loss on each task while training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.reporting.figures import style
from experiments.reporting.labels import DATASETS

METHODS = {
    "sgd": ("plain SGD", style.METHOD_COLOURS["naive"]),
    "ewc": ("EWC", style.METHOD_COLOURS["ewc"]),
    "ewc-renewed": ("EWC, anchor renewed every epoch", style.PALETTE["indigo"][0]),
}
QUANTITIES = {"accuracy": "test accuracy", "loss": "test loss (nats)"}


def draw_curves(curves: pd.DataFrame) -> Figure:
    """A column per method, a line per task."""
    n_tasks = int(curves["eval_task"].max()) + 1
    length = curves["epoch"].max() // n_tasks
    figure, axes = plt.subplots(
        *(2, len(METHODS)), figsize=(11, 5.4), sharex=True, sharey="row", layout="constrained"
    )
    for (method, (label, colour)), column in zip(METHODS.items(), axes.T, strict=True):
        rows = curves[curves["method"] == method]
        for axis, quantity in zip(column, QUANTITIES, strict=True):
            ends = []
            for task, shade in enumerate(style.shades(colour, n_tasks)):
                by = rows[rows["eval_task"] == task].groupby("epoch")[quantity]
                mean, low, high = by.mean(), by.min(), by.max()
                axis.plot(mean.index, mean, color=shade, linewidth=1.4)
                axis.fill_between(mean.index, low, high, color=shade, alpha=0.2, linewidth=0)
                ends.append(style.EndLabel(f"task {task + 1}", float(mean.iloc[-1]), shade))
            axis.set_xlim(0, curves["epoch"].max())
            axis.set_ylim(0, 1 if quantity == "accuracy" else None)
            for boundary in range(1, n_tasks):
                axis.axvline(boundary * length, color="0.4", linewidth=0.8, linestyle=":")
            style.label_ends(axis, ends)
        column[0].set_title(label, color=colour)
        column[1].set_xlabel("epoch")
    for axis, label in zip(axes[:, 0], QUANTITIES.values(), strict=True):
        axis.set_ylabel(label)
    dataset = curves["dataset"].iloc[0]
    n = curves["seed"].nunique()
    spread = f"mean of n = {n} seeds, band: their range" if n > 1 else "one seed"
    note = f"{spread}; dotted: the next task begins"
    style.title(figure, f"Permuted {DATASETS.get(dataset, dataset)}, each task tested", note)
    return figure

"""The figures of the Laplace view: densities and optima; what the penalty's weight does."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.reporting.figures import style
from experiments.studies.laplace.problems import QUADRATICS, Solved

NAIVE = "none"
NAMES = {
    "diagonal, exact": "diagonal F, exact",
    "diagonal, predicted": "diagonal F, predicted",
    "full": "full F",
    NAIVE: "B alone",
}
COLOURS = {
    "diagonal, exact": style.FISHER_COLOURS["exact"],
    "diagonal, predicted": style.FISHER_COLOURS["predicted"],
    "full": style.PALETTE["indigo"][0],
    NAIVE: style.METHOD_COLOURS["naive"],
}
LINES = dict(zip(QUADRATICS, ("-", "--", ":"), strict=True))
LEVELS = (0.5, 2.0, 4.5)  # nats: one, two and three standard deviations of a normal density


def draw_densities(pictured: dict[str, Solved], rows: pd.DataFrame) -> Figure:
    """A row per problem: EWC's normal densities on p(θ | A); EWC's optima on p(θ | A, B)."""
    figure, axes = plt.subplots(
        len(pictured), 2, figsize=(9.4, 4.2 * len(pictured)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Artist] = {}
    for row, (name, solved) in zip(axes, pictured.items(), strict=True):
        _draw_posterior(row[0], solved)
        first = rows[rows["problem"] == name]
        _draw_joint(row[1], solved, first[first["seed"] == first["seed"].iloc[0]])
        row[0].set_title(f"{name}: p(θ | A) and its stand-ins")
        row[1].set_title(f"{name}: p(θ | A, B), EWC's optima over λ")
        for axis in row:
            axis.set(xlabel="$\\theta_1$", ylabel="$\\theta_2$")
            axis.grid(False)
            found, names = axis.get_legend_handles_labels()
            handles |= dict(zip(names, found, strict=True))
    figure.legend(
        list(handles.values()), list(handles), ncols=4, fontsize=9, loc="outside lower center"
    )
    n = int(rows["n"].iloc[0])
    style.title(
        figure,
        "EWC as a Laplace approximation, two parameters",
        f"one draw of {n} samples per task; contours and shades: 1, 2, 3 standard deviations",
    )
    return figure


def draw_weights(table: pd.DataFrame, n: int, n_draws: int) -> Figure:
    """A row per problem: distance from the joint optimum over λ; error of the density over n."""
    problems = list(dict.fromkeys(table["problem"]))
    figure, axes = plt.subplots(
        len(problems), 2, figsize=(10.4, 3.3 * len(problems)), squeeze=False, layout="constrained"
    )
    for row, name in zip(axes, problems, strict=True):
        rows = table[table["problem"] == name]
        _draw_excess(row[0], rows[rows["n"] == n])
        _draw_variation(row[1], rows)
        row[0].set_title(f"{name}: -log p(A, B, θ) above the joint optimum")
        row[1].set_title(f"{name}: error of the normal density")
    style.title(
        figure,
        "What the penalty's weight and the number of samples do, two parameters",
        f"medians over {n_draws} draws, band: quartiles; left: {n} samples per task",
    )
    return figure


def _axes_around(points: Sequence[Tensor], half: Tensor) -> tuple[Tensor, Tensor]:
    around = torch.stack(list(points))
    centre = (around.max(0).values + around.min(0).values) / 2
    first, second = (
        torch.linspace(float(c - h), float(c + h), 161, dtype=torch.float64)
        for c, h in zip(centre, half, strict=True)
    )
    return first, second


def _grid(nats: Tensor, first: Tensor) -> Tensor:
    """Nats above their minimum, in the shape that contours want."""
    return (nats - nats.min()).view(len(first), -1).T


def _draw_posterior(axis: Axes, solved: Solved) -> None:
    deviation = solved.precisions["full"].inverse().diagonal().sqrt()
    first, second = _axes_around([solved.anchor], 5 * deviation)
    points = torch.cartesian_prod(first, second)
    truth = solved.posterior_nats(points) - solved.posterior_nats(solved.anchor[None])
    values = truth.view(len(first), -1).T
    axis.contourf(first, second, values, levels=(0.0, *LEVELS), cmap="Greys_r", alpha=0.7)
    for name in QUADRATICS:
        look = {"colors": COLOURS[name], "linestyles": LINES[name], "linewidths": 1.5}
        nats = _grid(solved.quadratic(points, name), first)
        axis.contour(first, second, nats, levels=LEVELS, **look)
        axis.plot([], [], color=COLOURS[name], linestyle=LINES[name], label=NAMES[name])
    axis.plot(*solved.anchor, "k+", ls="", markersize=9, label="optimum of A")


def _draw_joint(axis: Axes, solved: Solved, rows: pd.DataFrame) -> None:
    corners = [solved.anchor, solved.alone, solved.joint]
    spread = torch.stack(corners)
    half = (spread.max(0).values - spread.min(0).values).clamp_min(1.0) * 0.8
    first, second = _axes_around(corners, half)
    nats = solved.joint_nats(torch.cartesian_prod(first, second))
    values = _grid(nats, first)
    axis.contourf(first, second, values, levels=(0.0, *LEVELS), cmap="Greys_r", alpha=0.7)
    for name in QUADRATICS:
        path = rows[rows["quadratic"] == name].sort_values("factor")
        axis.plot(path["theta_1"], path["theta_2"], LINES[name], color=COLOURS[name], lw=1.5)
        bayes = path[path["factor"] == 1]
        axis.plot(bayes["theta_1"], bayes["theta_2"], "o", color=COLOURS[name], markersize=6)
    axis.plot([], [], "o", color=style.INK, markersize=6, label="EWC at Bayes' λ = 1/2")
    axis.plot(*solved.anchor, "k+", ls="", markersize=9, label="optimum of A")
    axis.plot(*solved.alone, "x", color=COLOURS[NAIVE], markersize=8, label="optimum of B alone")
    axis.plot(*solved.joint, "k*", ls="", markersize=11, label="joint optimum")
    axis.set(xlim=(first[0], first[-1]), ylim=(second[0], second[-1]))


def _draw_excess(axis: Axes, rows: pd.DataFrame) -> None:
    labels, medians = [], []
    for name in QUADRATICS:
        by = rows[rows["quadratic"] == name].groupby("factor")["excess_nats"]
        middle = by.median()
        medians += list(middle)
        axis.plot(middle.index, middle, LINES[name], color=COLOURS[name])
        low, high = by.quantile(0.25).clip(lower=1e-4), by.quantile(0.75)
        axis.fill_between(low.index, low, high, color=COLOURS[name], alpha=0.12, lw=0)
        labels.append(style.EndLabel(NAMES[name], float(middle.iloc[-1]), COLOURS[name]))
    naive = float(rows.loc[rows["quadratic"] == NAIVE, "excess_nats"].median())
    axis.axhline(naive, color=COLOURS[NAIVE], linewidth=1)
    axis.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    style.log_axis(axis, "x")
    style.log_axis(axis, "y")
    axis.set(xlabel="λ as a multiple of Bayes' own, N_A / (2 N_B)", ylabel="nats")
    axis.set_ylim(min(medians) / 1.5, 1.5 * max(*medians, naive))
    axis.set_xlim(rows.loc[rows["factor"] > 0, "factor"].min(), rows["factor"].max())
    style.label_ends(axis, [*labels, style.EndLabel(NAMES[NAIVE], naive, COLOURS[NAIVE])])


def _draw_variation(axis: Axes, rows: pd.DataFrame) -> None:
    labels = []
    for name in QUADRATICS:
        at_bayes = rows[(rows["quadratic"] == name) & (rows["factor"] == 1)]
        by = at_bayes.groupby("n")["total_variation"]
        middle = by.median()
        axis.plot(middle.index, middle, LINES[name], color=COLOURS[name], marker="o", ms=4)
        low, high = by.quantile(0.25), by.quantile(0.75)
        axis.fill_between(low.index, low, high, color=COLOURS[name], alpha=0.12, lw=0)
        labels.append(style.EndLabel(NAMES[name], float(middle.iloc[-1]), COLOURS[name]))
    style.log_axis(axis, "x", rows["n"])
    axis.set(ylim=(0, 1), xlabel="samples per task", ylabel="total variation from p(θ | A)")
    style.label_ends(axis, labels)

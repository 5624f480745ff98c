"""The picture of the Laplace view: densities, optima, and what the penalty's weight does."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.studies.laplace.study import NAIVE, QUADRATICS, Solved

COLOURS = dict(zip((NAIVE, *QUADRATICS), ("#D55E00", "#009E73", "#CC79A7", "#0072B2"), strict=True))
LINES = dict(zip(QUADRATICS, ("-", "--", ":"), strict=True))
LEVELS = (0.5, 2.0, 4.5)  # nats: one, two and three standard deviations of a normal density
FILLED = (0.0, *LEVELS)


def plot(table: pd.DataFrame, pictured: dict[str, Solved], n: int) -> plt.Figure:
    """A row per problem: posterior of A, joint posterior, penalty's weight, number of samples."""
    figure, axes = plt.subplots(
        len(pictured), 4, figsize=(17, 4.1 * len(pictured)), squeeze=False, layout="constrained"
    )
    for row, (name, solved) in zip(axes, pictured.items(), strict=True):
        rows = table[table["problem"] == name]
        _draw_posterior(row[0], solved)
        _draw_joint(row[1], solved, rows[(rows["n"] == n)])
        _draw_excess(row[2], rows[rows["n"] == n])
        _draw_variation(row[3], rows)
        row[0].set_ylabel(f"{name}\n$\\theta_2$")
    seeds = table["seed"].nunique()
    figure.suptitle(
        f"Left: one draw of {n} samples per task. Right: medians and quartiles over {seeds} draws."
    )
    return figure


def _contours(axis: Axes, first: Tensor, second: Tensor, nats: Tensor, **style: object) -> None:
    values = (nats - nats.min()).view(len(first), len(second)).T
    axis.contour(first, second, values, levels=LEVELS, **style)


def _window(solved: Solved, points: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Axes around the joint posterior and the points, widened a little."""
    around = torch.stack(points)
    centre = (around.max(0).values + around.min(0).values) / 2
    half = (around.max(0).values - around.min(0).values).clamp_min(1.0) * 0.8
    first, second = (
        torch.linspace(float(c - h), float(c + h), 161, dtype=torch.float64)
        for c, h in zip(centre, half, strict=True)
    )
    return first, second


def _draw_posterior(axis: Axes, solved: Solved) -> None:
    deviation = solved.precisions["full"].inverse().diagonal().sqrt()
    first, second = (
        torch.linspace(float(c - 5 * s), float(c + 5 * s), 161, dtype=torch.float64)
        for c, s in zip(solved.anchor, deviation, strict=True)
    )
    points = torch.cartesian_prod(first, second)
    truth = solved.posterior_nats(points)
    values = (truth - solved.posterior_nats(solved.anchor[None])).view(len(first), -1).T
    axis.contourf(first, second, values, levels=FILLED, cmap="Greys_r", alpha=0.7)
    for name in QUADRATICS:
        style = {"colors": COLOURS[name], "linestyles": LINES[name], "linewidths": 1.3}
        _contours(axis, first, second, solved.quadratic(points, name), **style)
        axis.plot([], [], color=COLOURS[name], linestyle=LINES[name], label=f"N F, {name}")
    axis.plot(*solved.anchor, "k+", markersize=9, label="$\\theta^*_A$")
    axis.set(title="p(θ | A), shaded to 1, 2, 3 deviations", xlabel="$\\theta_1$")
    axis.legend(fontsize=7)


def _draw_joint(axis: Axes, solved: Solved, rows: pd.DataFrame) -> None:
    first, second = _window(solved, [solved.anchor, solved.alone, solved.joint])
    points = torch.cartesian_prod(first, second)
    nats = solved.joint_nats(points) - solved.joint_nats(solved.joint[None])
    values = nats.view(len(first), -1).T
    axis.contourf(first, second, values, levels=FILLED, cmap="Greys_r", alpha=0.7)
    seed = rows["seed"].min()
    for name in QUADRATICS:
        path = rows[(rows["quadratic"] == name) & (rows["seed"] == seed)].sort_values("factor")
        axis.plot(
            path["theta_1"], path["theta_2"], color=COLOURS[name], linestyle=LINES[name], lw=1.3
        )
        at_bayes = path[path["factor"] == 1]
        axis.plot(
            at_bayes["theta_1"],
            at_bayes["theta_2"],
            "o",
            color=COLOURS[name],
            label=f"EWC, {name}, λ = 1/2",
        )
    axis.plot(*solved.anchor, "k+", markersize=9, label="$\\theta^*_A$")
    axis.plot(*solved.alone, "x", color=COLOURS[NAIVE], markersize=8, label="B alone")
    axis.plot(*solved.joint, "k*", markersize=11, label="joint optimum")
    axis.set(
        title="p(θ | A, B), and EWC's optima over λ",
        xlabel="$\\theta_1$",
        xlim=(first[0], first[-1]),
        ylim=(second[0], second[-1]),
    )
    axis.legend(fontsize=7)


def _draw_excess(axis: Axes, rows: pd.DataFrame) -> None:
    for name in QUADRATICS:
        by = rows[rows["quadratic"] == name].groupby("factor")["excess_nats"]
        axis.plot(by.median().index, by.median(), LINES[name], color=COLOURS[name], label=name)
        low, high = by.quantile(0.25).clip(lower=1e-4), by.quantile(0.75)
        axis.fill_between(low.index, low, high, color=COLOURS[name], alpha=0.15, lw=0)
    naive = rows.loc[rows["quadratic"] == NAIVE, "excess_nats"].median()
    axis.axhline(naive, color=COLOURS[NAIVE], linewidth=1, label="B alone")
    axis.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    axis.set(
        xscale="log",
        yscale="log",
        title="-log p(A, B, θ) above the joint optimum",
        xlabel="λ, of Bayes' N_A / (2 N_B)",
        ylabel="nats",
    )
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def _draw_variation(axis: Axes, rows: pd.DataFrame) -> None:
    for name in QUADRATICS:
        at_bayes = rows[(rows["quadratic"] == name) & (rows["factor"] == 1)]
        by = at_bayes.groupby("n")["total_variation"]
        axis.plot(by.median().index, by.median(), color=COLOURS[name], marker="o", label=name)
        low, high = by.quantile(0.25), by.quantile(0.75)
        axis.fill_between(low.index, low, high, color=COLOURS[name], alpha=0.15, lw=0)
    axis.set(
        xscale="log",
        ylim=(0, 1),
        title="total variation, normal density and p(θ | A)",
        xlabel="samples per task",
    )
    axis.set_xticks(sorted(rows["n"].unique()), [str(n) for n in sorted(rows["n"].unique())])
    axis.minorticks_off()
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)

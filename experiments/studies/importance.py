"""Where the Fisher lies: which layers, and which pixels of the first one, an experience needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.pandas as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ewc_plugin.avalanche.metrics import share_holding
from ewc_plugin.fisher.scores import FisherType
from experiments.reporting.figures import style
from experiments.reporting.labels import number, stream_title
from experiments.reporting.study_output import OnImages, columns, study_on_images
from experiments.results.schemas import PROVENANCE
from experiments.settings.grids import DEFAULT_EPOCHS
from experiments.settings.run import RunSettings
from experiments.settings.values import Count, Lambda, Seed
from experiments.training.trained import train

FLOOR = 1e-3  # of the largest pixel: what is below is drawn as this
MOST_NARROW = 4  # percent; a narrower part has no number
HELD = 0.9  # of the trace, whose smallest share of parameters is reported


IMPORTANCE = pa.DataFrameSchema(
    {
        **columns(int, "experience", check=pa.Check.ge(0)),
        **columns(str, "parameter"),
        **columns(int, "n", check=pa.Check.ge(1)),
        **columns(float, "trace", "mean", "max", check=pa.Check.ge(0)),
        **columns(
            float,
            "share_of_trace",
            "share_holding_90_percent",
            check=pa.Check.in_range(0, 1 + 1e-9),
        ),
        **PROVENANCE,
    },
    unique=["experience", "parameter"],
    strict=True,
    name="importance.csv",
)


@dataclass(frozen=True)
class Importance(OnImages):
    """Per-layer and per-pixel importance of split MNIST's experiences."""

    fisher_type: FisherType = FisherType.PREDICTED
    """Labels that the Fisher averages over."""
    ewc_lambda: Lambda = 1e4
    """Strength of the penalty that the network is trained with."""
    seed: Seed = 0
    """Seeds the initial weights and the order of the samples."""
    hidden_size: Count = 256
    """Units in each of the two hidden layers."""
    out: str = "runs/importance"
    """Folder of the table and the plot."""


def run(settings: Importance) -> pd.DataFrame:
    """Train on split MNIST with a head per task; write F by layer to `importance.csv`."""
    source, output = study_on_images(settings)
    cell = RunSettings(
        *("split", source.name, "task", "ewc", settings.seed),
        fisher_type=FisherType(settings.fisher_type).value,
        ewc_lambda=settings.ewc_lambda,
        mode="separate",
        epochs=DEFAULT_EPOCHS["split", source.name],
        hidden_size=settings.hidden_size,
    )
    trained = train(cell, source)
    fishers = [trained.fisher(t, settings.fisher_type) for t in range(cell.n_experiences)]
    table = output.table(
        (row for t, f in enumerate(fishers) for row in layer_rows(t, f)), IMPORTANCE
    )
    pictures = [e[:][0].mean(dim=(0, 1)) for e in trained.experiences]
    maps = [pixel_map(f, p) for f, p in zip(fishers, pictures, strict=True)]
    figure = draw_importance(table, maps, pictures)
    style.title(
        figure,
        f"Where the {cell.fisher_type} Fisher lies: {stream_title('split', source.name, 'task')}",
        f"one network, after all experiences; its test accuracy is {trained.accuracy:.3f}",
    )
    output.figure(figure, "importance")
    output.show(table, index=False)
    return table


def layer_rows(experience: int, fisher: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Sums of F per parameter tensor, and what part of the network's trace they are."""
    total = sum(float(f.double().sum()) for f in fisher.values())
    return [
        {
            "experience": experience,
            "parameter": name,
            "n": f.numel(),
            "trace": float(f.double().sum()),
            "mean": float(f.double().mean()),
            "max": float(f.max()),
            "share_of_trace": float(f.double().sum()) / total,
            "share_holding_90_percent": share_holding(fisher, HELD),
        }
        for name, f in fisher.items()
    ]


def pixel_map(fisher: dict[str, Tensor], picture: Tensor) -> Tensor:
    """F of the first layer's weights, summed over its units, in the shape of an image."""
    first = next(iter(fisher.values()))  # [units, pixels]
    return first.sum(0).view_as(picture)


def draw_importance(table: pd.DataFrame, maps: list[Tensor], pictures: list[Tensor]) -> Figure:
    """Mean image and pixel importance per experience; below, what part each layer has of F."""
    n = len(maps)
    figure = plt.figure(figsize=(1.9 * n + 1, 6.6), layout="constrained")
    grid = figure.add_gridspec(3, n, height_ratios=[1, 1, 1.25])
    image, axes = None, []
    for t, (pixels, picture) in enumerate(zip(maps, pictures, strict=True)):
        above, below = (figure.add_subplot(grid[i, t]) for i in (0, 1))
        axes += [above, below]
        above.imshow(picture, cmap="gray")
        above.set_title(f"experience {t + 1}", fontsize=9)
        # Each relative to its own maximum: the experiences' F differ by orders of magnitude.
        relative = (pixels / pixels.max()).clamp_min(FLOOR)
        image = below.imshow(relative, cmap="magma", norm="log", clim=(FLOOR, 1))
        below.set_title(f"sum of F: {float(pixels.sum()):.2g}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.5, label="F of a pixel's weights,\nlargest = 1")
    bar.ax.yaxis.set_major_formatter(lambda value, _: number(value))
    draw_shares(figure.add_subplot(grid[2, :]), table)
    return figure


def draw_shares(axis: Axes, table: pd.DataFrame) -> None:
    """A bar per experience that adds up to the trace of F, cut by layer."""
    layers = table.assign(layer=layer_names(table["parameter"]))
    shares = layers.groupby(["experience", "layer"], sort=False)["share_of_trace"].sum().unstack()
    left = np.zeros(len(shares))
    for layer, colour in zip(shares, ("#cfe8df", "#8fcfb5", "#009e73", "#777777"), strict=False):
        values = 100 * shares[layer].fillna(0).to_numpy()
        axis.barh(shares.index + 1, values, left=left, color=colour, label=layer, height=0.7)
        for place, (start, value) in enumerate(zip(left, values, strict=True)):
            if value >= MOST_NARROW:
                at = (start + value / 2, place + 1)
                axis.text(*at, f"{value:.0f} %", ha="center", va="center", fontsize=8)
        left += values
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), xlabel="part of the trace of F (percent)", ylabel="experience")
    axis.set_yticks(shares.index + 1)
    axis.grid(False)
    axis.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def layer_names(parameters: pd.Series[str]) -> list[str]:
    """A layer's name in words for each parameter of the network: heads and biases together."""
    hidden = list(dict.fromkeys(p for p in parameters if "weight" in p and "classifier" not in p))
    names = []
    for parameter in parameters:
        if parameter.endswith("bias"):
            names.append("all biases")
        elif "classifier" in parameter:
            names.append("weights of the heads")
        else:
            names.append(f"weights of hidden layer {hidden.index(parameter) + 1}")
    return names

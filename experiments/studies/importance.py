"""Where the Fisher lies: which layers, and which pixels of the first one, an experience needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console
from torch import Tensor

from ewc_plugin.avalanche.metrics import share_holding
from ewc_plugin.fisher.scores import FisherType
from experiments.data.sources import find_data
from experiments.reporting.figures.style import DPI
from experiments.results.environment import write_environment
from experiments.results.tables import replace_file
from experiments.settings.grids import DEFAULT_EPOCHS
from experiments.settings.run import Dataset, RunSettings
from experiments.training.trained import train

FLOOR = 1e-3  # of the largest pixel: what is below is drawn as this
HELD = 0.9  # of the trace, whose smallest share of parameters is reported


@dataclass(frozen=True)
class Importance:
    """Per-layer and per-pixel importance of split MNIST's experiences."""

    fisher_type: FisherType = FisherType.PREDICTED
    """Labels that the Fisher averages over."""
    ewc_lambda: float = 1e4
    """Strength of the penalty that the network is trained with."""
    seed: int = 0
    """Seeds the initial weights and the order of the samples."""
    hidden_size: int = 256
    """Units in each of the two hidden layers."""
    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw."""
    out: str = "runs/importance"
    """Folder of the table and the plot."""


def run(settings: Importance) -> pd.DataFrame:
    """Trains on split MNIST with a head per task, then takes F of every experience.

    Args:
        settings: What to look at.

    Returns:
        A row per experience and parameter tensor; also in `importance.csv`.
    """
    console = Console()
    source = find_data(settings.dataset, settings.data_root)
    cell = RunSettings(
        "split",
        source.name,
        "task",
        "ewc",
        settings.seed,
        fisher_type=FisherType(settings.fisher_type).value,
        ewc_lambda=settings.ewc_lambda,
        mode="separate",
        epochs=DEFAULT_EPOCHS["split", source.name],
        hidden_size=settings.hidden_size,
    )
    trained = train(cell, source)
    fishers = [trained.fisher(t, settings.fisher_type) for t in range(cell.n_experiences)]
    table = pd.DataFrame([row for t, f in enumerate(fishers) for row in layer_rows(t, f)])
    pictures = [e[:][0].mean(dim=(0, 1)) for e in trained.experiences]
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "importance.csv", table.to_csv(index=False))
    maps = [pixel_map(f, p) for f, p in zip(fishers, pictures, strict=True)]
    figure = plot(table, maps, pictures)
    figure.suptitle(
        f"{settings.fisher_type.value} Fisher, split {source.name}, network after all experiences "
        f"(test accuracy {trained.accuracy:.3f})"
    )
    figure.savefig(folder / "importance.png", dpi=DPI, metadata={"Software": None})
    write_environment(folder, source)
    console.print(table.to_string(index=False, float_format="%.3g"), highlight=False)
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


def plot(table: pd.DataFrame, maps: list[Tensor], pictures: list[Tensor]) -> plt.Figure:
    """Mean image and pixel importance per experience; below, what every layer holds."""
    n = len(maps)
    figure = plt.figure(figsize=(2.3 * n, 8.6), layout="constrained")
    grid = figure.add_gridspec(3, n, height_ratios=[1, 1, 1.8])
    image, row = None, []
    for t, (pixels, picture) in enumerate(zip(maps, pictures, strict=True)):
        axis = figure.add_subplot(grid[0, t])
        axis.imshow(picture, cmap="gray")
        axis.set_title(f"experience {t + 1}", fontsize=9)
        axis.set_axis_off()
        row.append(figure.add_subplot(grid[1, t]))
        # Each relative to its own maximum: the experiences' F differ by orders of magnitude.
        relative = (pixels / pixels.max()).clamp_min(FLOOR)
        image = row[-1].imshow(relative, cmap="magma", norm="log", clim=(FLOOR, 1))
        row[-1].set_title(f"sum {float(pixels.sum()):.2g}", fontsize=9)
        row[-1].set_axis_off()
    assert image is not None
    figure.colorbar(image, ax=row, label="F of the first layer,\nof its largest pixel")
    axis = figure.add_subplot(grid[2, :])
    shares = table.pivot(index="parameter", columns="experience", values="share_of_trace")
    shares = shares.loc[list(dict.fromkeys(table["parameter"]))]
    places, width = np.arange(len(shares)), 0.8 / n
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, n))
    for t in range(n):
        axis.barh(
            places + (t - (n - 1) / 2) * width,
            shares[t],
            width,
            color=colours[t],
            label=f"experience {t + 1}",
        )
    axis.set_yticks(places, shares.index, fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="share of the trace of F")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3, axis="x")
    return figure

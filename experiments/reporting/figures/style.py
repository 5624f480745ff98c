"""One style for every figure: colours, number format, limits, labels at the lines, and the file."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from experiments.reporting.labels import number, wrapped
from experiments.results.files import replace_file
from experiments.settings.run import WITH_FISHER

matplotlib.use("Agg")  # files only; no display is needed

DPI = 150
INK = "#111111"  # of words and axes
MOST_LINES = 8  # in a panel

# Name -> on a light ground, on a dark one. Okabe and Ito's colours and some of Tol's, which the
# colour-blind can tell apart.
PALETTE = {
    "orange": ("#d55e00", "#ff8a3d"),
    "blue": ("#0072b2", "#58b0f0"),
    "green": ("#009e73", "#2fcf9f"),
    "yellow": ("#e69f00", "#f2b632"),
    "sky": ("#56b4e9", "#8fd0f7"),
    "pink": ("#cc79a7", "#e8a3cb"),
    "brown": ("#8c6d31", "#c9a961"),
    "indigo": ("#332288", "#9d90f0"),
    "violet": ("#9a4fd0", "#c79bf5"),
    "rose": ("#cc6677", "#f0959f"),
    "wine": ("#882255", "#e07bb0"),
    "olive": ("#7a7a1a", "#c8c85a"),
    "teal": ("#117777", "#5cc4c4"),
    "grey": ("#777777", "#a0a0a0"),
}


def _light(name: str) -> str:
    return PALETTE[name][0]


METHOD_COLOURS = {
    "naive": _light("orange"),
    "avalanche-ewc": _light("blue"),
    "ewc": _light("green"),
    "joint": INK,
    "l2": _light("grey"),
    "si": _light("rose"),
    "mas": _light("olive"),
    "lwf": _light("brown"),
    "replay": _light("violet"),
    "ewc+replay": _light("wine"),
}
OTHER_COLOURS = [_light(name) for name in ("pink", "sky", "yellow", "wine", "brown")]
FISHER_COLOURS = {
    "predicted": _light("green"),  # the default, hence the colour of our EWC
    "empirical": _light("yellow"),
    "sampled": _light("sky"),
    "exact": _light("pink"),
    "batched": _light("brown"),
    "class_mean": _light("indigo"),
    "class_mean_empirical": _light("teal"),
    "reversed": _light("wine"),
    "class_mean_reversed": _light("olive"),
    "batched_reversed": _light("grey"),
}
# Ways to apply the penalty, beside Avalanche's.
PENALTY_COLOURS = {
    "in the gradient": _light("green"),
    "in the loss": _light("sky"),
    "implicit step": _light("wine"),
    "one compiled kernel": _light("grey"),
    "one compiled kernel, with the value": _light("brown"),
    "the plugin's calls alone": _light("orange"),
    "Avalanche": _light("blue"),
}
STYLE: dict[str, Any] = {
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.1,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.titlesize": 11,
    "figure.max_open_warning": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
plt.rcParams.update(STYLE)


def colour_of(method: str, fisher_type: Any = None) -> str:
    """The colour of a cell in every figure: its Fisher type's if it is our EWC, else its method's.

    Args:
        method: As in `runs.csv`.
        fisher_type: Likewise; anything but a known type counts as none.

    Returns:
        A colour in hexadecimal; a method that is not ours has one of `OTHER_COLOURS` by its name.
    """
    if method == "ewc" and fisher_type in FISHER_COLOURS:
        return FISHER_COLOURS[fisher_type]
    other = OTHER_COLOURS[zlib.crc32(method.encode()) % len(OTHER_COLOURS)]
    return METHOD_COLOURS.get(method, other)


def panel_of(row: Mapping[str, Any]) -> tuple[bool, str]:
    """Where a cell goes if one panel can't hold all: by whose EWC it is, if any, and by the loss.

    Args:
        row: With the settings of a run.

    Returns:
        Whether the method is not ours, and the loss.
    """
    return row["method"] not in WITH_FISHER, str(row.get("loss_classes"))


def shades(colour: str, n: int) -> list[str]:
    """`n` colours from a pale one to a dark one of the same hue; `colour` itself if n is 1."""
    if n == 1:
        return [colour]
    base = np.array(matplotlib.colors.to_rgb(colour))
    found = []
    for t in np.linspace(-0.35, 0.5, n):  # towards white, then towards black
        mixed = base + (1 - base) * -t if t < 0 else base * (1 - t)
        found.append(matplotlib.colors.to_hex(mixed))
    return found


def limits(values: Iterable[float], *, bounds: tuple[float, float] = (0, 1)) -> tuple[float, float]:
    """Return axis limits around `values` with a margin, clipped slightly outside `bounds`.

    Bands and intervals do not count: they may be cut off, the means may not.

    Args:
        values: What has to be seen; NaN is left out.
        bounds: What the quantity can't leave.

    Returns:
        Lower and upper limit.
    """
    finite = np.array([v for v in values if np.isfinite(v)])
    if not finite.size:
        return bounds
    low, high = float(finite.min()), float(finite.max())
    margin = max(0.08 * (high - low), 0.01)
    hair = 0.02 * (high - low + 2 * margin)  # so that a line on the bound is seen whole
    return max(low - margin, bounds[0] - hair), min(high + margin, bounds[1] + hair)


def log_axis(axis: Axes, which: str, values: Iterable[float] | None = None) -> None:
    """A logarithmic axis with ticks such as 0.1, 100 and 1e6.

    Args:
        axis: To change.
        which: "x" or "y".
        values: Where the ticks go if they are few; the powers of ten otherwise.
    """
    getattr(axis, f"set_{which}scale")("log")
    scale = getattr(axis, f"{which}axis")
    ticks = sorted(set(values)) if values is not None else []
    if 0 < len(ticks) <= 6:
        scale.set_ticks(ticks)
    else:
        scale.set_major_locator(LogLocator(numticks=6))
    scale.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    scale.set_minor_formatter(NullFormatter())


def plain_log_y(axis: Axes) -> None:
    """A logarithmic y axis over few decades, with ticks such as 1, 1.5, 2, 3 and 5."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    steps = (
        (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8)
        if decades < 0.6
        else (1, 2, 5)
        if decades < 2.5
        else (1,)
    )
    axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class EndLabel:
    """Words beside the last point of a line."""

    text: str
    y: float
    colour: str


def label_ends(axis: Axes, labels: Sequence[EndLabel], *, size: float = 8) -> None:
    """Write each line's name to the right of the axes, at its height, none over another.

    Args:
        axis: Whose limits are final.
        labels: What to write; heights in data.
        size: Of the letters, in points.
    """
    if not labels:
        return
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    grid = axis.get_subplotspec()
    n_rows = grid.get_gridspec().nrows if grid else 1
    height = 0.72 * figure.get_figheight() * 72 / n_rows  # of the axes, in points, about
    width = 26 if max(len(label.text) for label in labels) <= 52 else 44
    texts = [wrapped(label.text, width) for label in labels]
    lines = sum(text.count("\n") + 1 for text in texts)
    size = min(size, max(5.5, height / (1.3 * lines)))
    entries = []
    for label, text in zip(labels, texts, strict=True):
        y = label.y if np.isfinite(label.y) else axis.get_ylim()[0]
        at = float(axis.transAxes.inverted().transform(axis.transData.transform((1, y)))[1])
        need = 1.3 * size * (text.count("\n") + 1) / height
        entries.append((min(max(at, 0.0), 1.0), need, text, label.colour))
    entries.sort(key=lambda entry: entry[0])
    places = _apart([(at, need) for at, need, _, _ in entries])
    for place, (at, _, text, colour) in zip(places, entries, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5)}
        axis.annotate(
            text,
            xy=(1.0, at),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=colour,
            annotation_clip=False,
            arrowprops={**arrow, "shrinkA": 0, "shrinkB": 1},
        )


def _apart(entries: Sequence[tuple[float, float]]) -> list[float]:
    """Heights near those wanted, ascending, each with the room that it needs."""
    places: list[float] = []
    bottom = -math.inf
    for at, need in entries:
        places.append(max(at, bottom + need / 2))
        bottom = places[-1] + need / 2
    top = max(1.0, sum(need for _, need in entries))
    for i in range(len(entries) - 1, -1, -1):  # push back down what left the top
        need = entries[i][1]
        places[i] = min(places[i], top - need / 2)
        top = places[i] - need / 2
    return places


def title(figure: Figure, what: str, note: str = "") -> None:
    """Says what is shown and on what, and below it what n and the band are."""
    figure.suptitle("\n".join(part for part in (what, note) if part))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG by rename, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=DPI, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    # A palette makes a file of a third of the size. It covers all colours, also the rare ones: the
    # common ones are greys of letters' edges, which would leave no room for a method's few dots.
    picture = Image.open(drawn).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    replace_file(path, small.getvalue())
    return path


def save_for_papers(figure: Figure, path: Path) -> None:
    """Write a fine PNG and an SVG whose words are outlines, so that it looks alike everywhere.

    Args:
        figure: To write; stays open.
        path: Of the files, without their endings.
    """
    white = {"facecolor": "white", "bbox_inches": "tight"}
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=2 * DPI, metadata={"Software": None}, **white)
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(svg, format="svg", metadata={"Date": None}, **white)
    replace_file(path.with_suffix(".png"), png.getvalue())
    replace_file(path.with_suffix(".svg"), svg.getvalue())

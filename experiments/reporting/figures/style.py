"""One style for every figure: colours, lines, markers, resolution."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed

DPI = 150
INK = "#111111"  # of words and axes
# Okabe and Ito's colours, told apart by the colour-blind; one per method in every picture.
COLOURS = {"naive": "#D55E00", "avalanche-ewc": "#0072B2", "ewc": "#009E73", "joint": INK}
# Nothing but ink on the page's own ground.
STYLE: dict[str, Any] = {
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
MARKERS = "os^Dv<>PX*"  # tell the cells of one method apart
MOST_BANDS = 6  # more curves are drawn without bands

# Where a folder has several Fisher types, colours tell those apart, not the methods.
FISHER_COLOURS = {
    "predicted": "#009E73",
    "empirical": "#E69F00",
    "sampled": "#56B4E9",
    "exact": "#CC79A7",
    "batched": "#8C6D31",
}
LINES = ("-", "--", ":", "-.")

LONG_NAME = 30  # letters; longer ones stand below each other in a legend

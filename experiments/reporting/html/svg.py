"""Matplotlib figures as SVG inside a page, legible on a light and on a dark ground."""

from __future__ import annotations

import io
import re

import matplotlib.pyplot as plt

from experiments.reporting.figures.style import INK

# Words stay words, in the page's font; names of parts depend on the figure alone.
INLINE = {"svg.fonttype": "none", "svg.hashsalt": "ewc"}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
FONT = re.compile(r"'DejaVu Sans'(?:, [^;\"]*?sans-serif)?")
# The colours of the data, each lighter on a dark ground: the page's style defines them.
VARIABLES = {
    INK: "currentColor",
    "#d55e00": "var(--orange)",
    "#0072b2": "var(--blue)",
    "#009e73": "var(--green)",
    "#e69f00": "var(--yellow)",
    "#56b4e9": "var(--sky)",
    "#cc79a7": "var(--pink)",
    "#8c6d31": "var(--brown)",
}


def inline_svg(figure: plt.Figure, name: str, title: str) -> str:
    """The figure as an SVG element that takes its inks and font from the page.

    Args:
        figure: Drawn in `plots.STYLE`.
        name: Unique in the page, of letters, digits and hyphens; begins the ids of its parts.
        title: What a screen reader says.

    Returns:
        `<svg ...>...</svg>`.
    """
    buffer = io.StringIO()
    with plt.rc_context(INLINE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<(metadata|style)[ >].*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = FONT.sub("var(--sans)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])  # type: ignore[index]
    head = f'<svg role="img" aria-label="{title}" style="--width: {width:.0f}px"'
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg', head, text, count=1)
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", text, count=2)

"""Matplotlib figures as SVG inside a page, legible on a light and on a dark ground."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib.pyplot as plt

from experiments.reporting.figures.style import INK, PALETTE

# Words stay words, in the page's font; names of parts depend on the figure alone.
INLINE = {"svg.fonttype": "none", "svg.hashsalt": "ewc"}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
LEFT_OUT = (f"{SVG}metadata", f"{SVG}style")
# The page's style defines each colour of the data once for a light and once for a dark ground.
COLOURS = {INK: "currentColor"} | {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}
COLOUR = re.compile("|".join(COLOURS))
FONT = re.compile(r" ?font-family: [^;]*;?| ?font: (?=\d)")  # the page's own is inherited
REFERENCE = re.compile(r"(?:url\()?#([\w.-]+)")
DECIMALS = re.compile(r"(\d+\.\d)\d+")


def inline_svg(figure: plt.Figure, name: str, title: str, styles: dict[str, str]) -> str:
    """The figure as an SVG element that takes its inks and font from the page.

    Args:
        figure: In the style of `figures.style`.
        name: Unique in the page, of letters, digits and hyphens; begins the ids of its parts.
        title: What a screen reader says, escaped for an attribute.
        styles: Classes of the page by the style that each stands for; those of the figure are
            added. A few hundred styles are on ten thousand elements.

    Returns:
        `<svg ...>...</svg>`.
    """
    buffer = io.BytesIO()
    with plt.rc_context(INLINE):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=NO_METADATA, bbox_inches="tight"
        )
    root = ElementTree.fromstring(buffer.getvalue())
    used = {
        found[1]
        for element in root.iter()
        for key, value in element.attrib.items()
        if key != "d" and (found := REFERENCE.search(value))
    }
    ids = {old: f"{name}-{i}" for i, old in enumerate(sorted(used))}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in LEFT_OUT:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.tail = None
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        _adapt(element.attrib, ids)
        if style := element.attrib.pop("style", ""):
            element.set("class", styles.setdefault(style, f"s{len(styles)}"))
    for element in root.iter():
        element[:] = [part for child in element for part in _unwrapped(child)]
    box = root.get("viewBox", "0 0 0 0")
    inner = "".join(ElementTree.tostring(child, encoding="unicode") for child in root)
    width = float(box.split()[2])
    head = f'role="img" aria-label="{title}" style="--width: {width:.0f}px"'
    return f'<svg {head} viewBox="{box}">{inner}</svg>'


def _unwrapped(element: ElementTree.Element) -> list[ElementTree.Element]:
    """The element, or what it holds if it is a group without attributes."""
    if element.tag == "g" and not element.attrib:
        return [part for child in element for part in _unwrapped(child)]
    return [element]


def _adapt(attributes: dict[str, str], ids: dict[str, str]) -> None:
    """Rename the ids of an element and its references; give inks and font to the page."""
    if link := attributes.pop(f"{XLINK}href", None):
        attributes["href"] = f"#{ids[link[1:]]}" if link.startswith("#") else link
    if old := attributes.pop("id", None):
        attributes |= {"id": ids[old]} if old in ids else {}
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    for key in ("style", "clip-path", "fill", "stroke", "d", "transform", "x", "y"):
        if key in attributes:
            value = attributes[key]
            if key == "clip-path" and (found := REFERENCE.search(value)):
                value = f"url(#{ids[found[1]]})"
            value = FONT.sub("", COLOUR.sub(lambda m: COLOURS[m[0]], value))
            attributes[key] = (
                value.replace(": ", ":").replace("; ", ";")
                if key == "style"
                else " ".join(DECIMALS.sub(r"\1", value).split())
            )

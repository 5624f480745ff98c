"""One page about results folders: the answers, then tables that sort, figures and settings.

The page needs no network and no other file.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
import tyro
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from experiments.reporting import comparison
from experiments.reporting.cells import summary_cells
from experiments.reporting.figures import style
from experiments.reporting.figures.accuracy import draw_curves, draw_matrices, matrices_of
from experiments.reporting.figures.runs import draw_differences
from experiments.reporting.figures.runs import figures as figures_of_runs
from experiments.reporting.folders import given_or_newest, notes
from experiments.reporting.html import tables as page_tables
from experiments.reporting.html.svg import inline_svg
from experiments.reporting.html.tables import PageTable
from experiments.results import schemas, statistics, tables
from experiments.results.logged import load_results, logged_files
from experiments.results.store import PARTS, has_parts

TEMPLATES = Path(__file__).parent / "templates"
CAPTIONS = {
    "accuracy": "Average accuracy on the experiences seen so far, as they come.",
    "matrix": "Accuracy after each experience: row trained through, column tested on.",
    "lambda": "Average accuracy and forgetting over λ.",
    "trade-off": "What learning costs: forgetting against accuracy just after each experience.",
    "differences": "Paired differences of average accuracy, with their intervals.",
}


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about results folders."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders with tables, and those below them; or files of `TidyCSVLogger`. Unset: your newest
    below runs/."""
    out: Path = Path("runs/report/report.html")
    """The page."""
    figures: Path | None = None
    """Folder for the same figures as PNG and SVG files, for papers. Unset: none are written."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    caption: str
    svg: str
    wide: bool = False


@dataclass(frozen=True)
class StreamPart:
    """Table, figures and settings of one stream of a folder."""

    id: str
    title: str
    summary: PageTable
    pictures: Sequence[Picture]
    settings: dict[str, str]


@dataclass(frozen=True)
class Folder:
    """One results folder, ready to be shown."""

    id: str
    name: str
    environment: dict[str, str]
    others: Sequence[PageTable]
    images: Sequence[dict[str, str]]
    answers: Sequence[str] = ()
    differences: PageTable | None = None
    more_differences: PageTable | None = None
    differences_picture: Picture | None = None
    streams: Sequence[StreamPart] = ()
    n_runs: int = 0
    note: str = ""
    troubles: PageTable | None = None
    checks: PageTable | None = None
    runs: PageTable | None = field(default=None, repr=False)


def run(settings: Report) -> Path:
    """Write the page and the figures; return the page's path.

    Raises:
        ValueError: A folder holds no table, or the page can't be written.
    """
    out, console = settings.out, Console()
    named = settings.folders or (given_or_newest(None, "*"),)
    folders = [folder for given in named for folder in _with_tables(given)]
    shown: list[Folder] = []
    styles: dict[str, str] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for i, folder in enumerate(folders):
            line = f"{i + 1} of {len(folders)}: {folder}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
            shown.append(_folder(folder, i, settings.figures, styles))
        is_new = not out.exists()
        tables.replace_file(out, _render(shown, styles))
    except OSError as error:
        raise ValueError(
            f"`out` must be a file that can be written, got {out} ({error})."
        ) from None
    line = f"Report: {out}" + ("" if is_new else ", in the place of the page that was there")
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    return out


def _with_tables(folder: Path) -> list[Path]:
    """A file of a logger; or the folder and all below it, as far as they hold tables.

    Raises:
        ValueError: None does.
    """
    if folder.is_file():
        return [folder]
    found = sorted(
        {file.parent for file in folder.rglob("*.csv")}
        | {parts.parent for parts in folder.rglob(PARTS) if has_parts(parts.parent)}
    )
    if not found:
        raise ValueError(f"`folders` must hold result tables (*.csv), got {folder}.")
    return found


def _render(folders: Sequence[Folder], styles: Mapping[str, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    name = folders[0].name if len(folders) == 1 else f"{len(folders)} folders"
    return environment.get_template("report.html").render(
        title=f"Results of {name}",
        folders=folders,
        palette=style.PALETTE,
        styles={name: Markup(style) for style, name in styles.items()},  # matplotlib's and ours
        margin=statistics.MARGIN,
        written=datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes"),
    )


def _folder(path: Path, index: int, figures: Path | None, styles: dict[str, str]) -> Folder:
    known = {str(s.name) for s in schemas.SCHEMAS.values() if (path / str(s.name)).exists()}
    logged = [file.name for file in logged_files(path)]
    tabled = known >= {str(schemas.RUNS.name), str(schemas.ACCURACY.name)}
    has_runs = logged or tabled or has_parts(path)
    hidden = (*HIDDEN, *logged) if has_runs else ()
    common: dict[str, Any] = {
        "id": f"f{index}",
        "name": path.as_posix(),
        "environment": _environment(path),
        "others": [
            page_tables.from_frame(pd.read_csv(file), file.name)
            for file in sorted(path.glob("*.csv"))
            if file.name not in hidden
        ],
        "images": [
            {"name": file.name, "base64": _png(file)} for file in sorted(path.glob("*.png"))
        ],
    }
    if not has_runs:
        return Folder(**common)
    found = load_results(path)
    runs, accuracy = found["runs"], found["accuracy"]
    draw = Draw(common["id"], figures and figures / _slug(path.as_posix()), styles)
    comparisons = statistics.paired_differences(runs)
    figure = draw_differences(comparisons)
    checks = found.get("checks")
    return Folder(
        **common,
        answers=[words for words in comparison.answers(comparisons) if "[" in words],
        differences=page_tables.differences_table(comparisons, "average_accuracy"),
        more_differences=page_tables.differences_table(comparisons, "forgetting"),
        differences_picture=draw(figure, "differences", "") if figure else None,
        streams=list(_streams(runs, accuracy, draw)),
        n_runs=len(runs),
        note=notes(path, runs),
        troubles=page_tables.trouble_table(runs),
        checks=None if checks is None else page_tables.checks_page_table(checks),
        runs=page_tables.runs_table(runs),
    )


# Shown in tables of their own.
HIDDEN = ("accuracy.csv", "runs.csv", "summary.csv", "comparisons.csv", "checks.csv")


def _png(file: Path) -> str:
    """A figure's file in base64; `style.save` has made it small."""
    return base64.b64encode(file.read_bytes()).decode()


def _streams(runs: pd.DataFrame, accuracy: pd.DataFrame, draw: Draw) -> Iterator[StreamPart]:
    for title, cells in summary_cells(runs).items():
        group = runs[runs["config_hash"].isin([cell.config_hash for cell in cells])]
        matrices = matrices_of(accuracy, group)
        drawn: list[tuple[str, Figure]] = []
        if matrices:
            drawn.append(("accuracy", draw_curves(matrices, title)))
        drawn += figures_of_runs(group, title)
        if matrices:
            drawn.append(("matrix", draw_matrices(matrices, title)))
        yield StreamPart(
            id=f"{draw.id}-{_slug(title)}",
            title=title,
            summary=page_tables.summary_table(cells),
            pictures=[draw(figure, kind, title) for kind, figure in drawn],
            settings=page_tables.constant_settings(group),
        )


@dataclass(frozen=True)
class Draw:
    """Puts figures into the page, and into files for papers.

    Attributes:
        id: Of the folder; begins the ids of the figures' parts.
        target: Folder of the files; None: there are none.
        styles: Classes of the page by style.
        drawn: Names of the figures so far.
    """

    id: str
    target: Path | None
    styles: dict[str, str]
    drawn: list[str] = field(default_factory=list)

    def __call__(self, figure: Figure, kind: str, title: str) -> Picture:
        """The figure as an SVG of the page; closes it."""
        name = _slug(f"{kind} {title}")
        if self.target is not None:
            figure.draw_without_rendering()  # arranges the parts once for all files
            figure.set_layout_engine("none")
            self.target.mkdir(parents=True, exist_ok=True)
            style.save_for_papers(figure, self.target / name)
        words = html.escape(f"{title}: {CAPTIONS[kind]}".removeprefix(": "), quote=True)
        self.drawn.append(name)
        svg = inline_svg(figure, f"{self.id}-{len(self.drawn)}", words, self.styles)
        plt.close(figure)
        wide = figure.get_figwidth() > WIDE
        return Picture(CAPTIONS[kind], Markup(svg), wide)  # matplotlib escapes the words in it


WIDE = 7.0  # inches; a wider figure needs the page's width


def _environment(path: Path) -> dict[str, str]:
    """Return the contents of environment.json in words; empty if there is none.

    Raises:
        ValueError: It is no JSON object.
    """
    file = path / "environment.json"
    if not file.exists():
        return {}
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{file}` can't be read ({error}); restore or delete it.") from None
    return {name.replace("_", " "): _said(value) for name, value in found.items()}


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    return str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

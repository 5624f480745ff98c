"""One page with everything that results folders hold: tables that sort, pictures, settings.

The page needs no network and no other file; the pictures are also written as PNG and SVG files for
papers.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
import tyro
from markupsafe import Markup
from rich.console import Console

from experiments.reporting import labels
from experiments.reporting.figures import accuracy as plots
from experiments.reporting.figures import runs as plots_runs
from experiments.reporting.figures import style
from experiments.reporting.html import tables as page_tables
from experiments.reporting.html.svg import inline_svg
from experiments.reporting.html.tables import PageTable
from experiments.results import schemas, tables

TEMPLATES = Path(__file__).parent / "templates"
CAPTIONS = {
    "accuracy": "Average accuracy on the experiences seen so far, as they come.",
    "matrix": "Accuracy matrices R, mean over seeds: row trained through, column tested on.",
    "lambda": "Average accuracy and forgetting over λ.",
    "trade-off": "What learning costs: forgetting against accuracy just after each experience.",
    "time": "Average accuracy against time. Runs share the machine: compare with care.",
}
WIDE = ("lambda", "matrix")


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about results folders."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with tables; those below them count as well."""
    out: Path = Path("runs/report/report.html")
    """The page."""
    figures: Path | None = None
    """Folder of the PNG and SVG files. Unset: named as the page, with "-figures"."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: one SVG, or a grid of small ones."""

    caption: str
    svgs: Sequence[str]
    wide: bool = False
    matrices: bool = False


@dataclass(frozen=True)
class Benchmark:
    """What a folder has about one stream."""

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
    benchmarks: Sequence[Benchmark] = ()
    n_runs: int = 0
    troubles: PageTable | None = None
    parity: PageTable | None = None
    runs: PageTable | None = field(default=None, repr=False)


def run(settings: Report) -> Path:
    """Writes the page and the figures.

    Args:
        settings: Which folders, and where to.

    Returns:
        The page.

    Raises:
        ValueError: A folder holds no table, or the page can't be written.
    """
    out, console = settings.out, Console()
    figures = settings.figures or out.with_name(f"{out.stem}-figures")
    folders = [folder for given in settings.folders for folder in _with_tables(given)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figures.mkdir(parents=True, exist_ok=True)
        with plt.rc_context(style.STYLE):
            shown = [_folder(folder, i, figures) for i, folder in enumerate(folders)]
        tables.replace_file(out, _render(shown, figures))
    except OSError as error:
        raise ValueError(
            f"`out` must be a file that can be written, got {out} ({error})."
        ) from None
    console.print(
        f"Report: {out}   Pictures for papers: {figures}", highlight=False, soft_wrap=True
    )
    return out


def _with_tables(folder: Path) -> list[Path]:
    """The folder and all below it, as far as they hold tables.

    Raises:
        ValueError: None does.
    """
    found = sorted({file.parent for file in folder.rglob("*.csv")})
    if not found:
        raise ValueError(f"`folders` must hold result tables (*.csv), got {folder}.")
    return found


def _render(folders: Sequence[Folder], figures: Path) -> str:
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
        figures=figures,
        written=datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes"),
    )


def _folder(path: Path, index: int, figures: Path) -> Folder:
    name = path.as_posix()
    has_runs = all(
        (path / str(schema.name)).exists() for schema in (schemas.RUNS, schemas.ACCURACY)
    )
    known = schemas.SCHEMAS if has_runs else ()
    others = [
        page_tables.from_frame(pd.read_csv(file, float_precision="round_trip"), file.name)
        for file in sorted(path.glob("*.csv"))
        if file.name not in known
    ]
    common: dict[str, Any] = {
        "id": f"f{index}-{_slug(path.name)}",
        "name": name,
        "environment": _environment(path),
        "others": others,
        "images": [
            {"name": file.name, "base64": base64.b64encode(file.read_bytes()).decode()}
            for file in sorted(path.glob("*.png"))
        ],
    }
    if not has_runs:
        return Folder(**common)
    found = tables.load(path)
    runs = found["runs"]
    accuracy = found["accuracy"].merge(runs[["run_id", "config_hash", "status"]], on="run_id")
    target = figures / _slug(name)
    target.mkdir(parents=True, exist_ok=True)
    benchmarks = [
        Benchmark(
            title,
            summary,
            list(_pictures(title, group, accuracy, f"{common['id']}-{i}", target)),
            page_tables.constant_settings(group),
        )
        for i, (title, group, summary) in enumerate(page_tables.summary_tables(runs))
    ]
    parity = found.get("parity")
    return Folder(
        **common,
        benchmarks=benchmarks,
        n_runs=len(runs),
        troubles=page_tables.trouble_table(runs),
        parity=None if parity is None else page_tables.parity_page_table(parity),
        runs=page_tables.runs_table(runs),
    )


def _pictures(
    title: str, runs: pd.DataFrame, accuracy: pd.DataFrame, name: str, target: Path
) -> Iterator[Picture]:
    """Draws what the runs of one benchmark allow, into the page and into files."""
    done = accuracy[(accuracy["status"] == "ok") & accuracy["run_id"].isin(runs["run_id"])]
    cells = plots.matrices_of(done, labels.cell_labels(runs))
    drawn = []
    if cells:
        drawn.append(("accuracy", plots.draw_curves(cells, title)))
    drawn += plots_runs.figures(runs, title)
    for kind, figure in drawn:
        _settle(figure)
        _save(figure, target / f"{kind}-{_slug(title)}")
        svg = _inline(figure, f"{name}-{kind}", f"{title}: {CAPTIONS[kind]}")
        # A picture with its legend beside it, or with two panels, needs the page's width.
        wide = kind in WIDE or figure.get_figwidth() > 7
        yield Picture(CAPTIONS[kind], [svg], wide=wide)
    if cells:
        together = plots.draw_matrices(cells, title)
        _settle(together)
        _save(together, target / f"matrix-{_slug(title)}")
        plt.close(together)
        svgs = [
            _inline(_one_matrix(label, matrices), f"{name}-matrix-{i}", f"{title}: R of {label}")
            for i, (label, (_, matrices)) in enumerate(cells.items())
        ]
        yield Picture(CAPTIONS["matrix"], svgs, wide=True, matrices=True)


def _one_matrix(label: str, matrices: Any) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(3.0, 3.4), layout="constrained")
    plots.draw_matrix(axis, label, matrices)
    axis.set(xlabel="tested on experience", ylabel="trained through experience")
    return figure


def _settle(figure: plt.Figure) -> None:
    """Arranges the figure's parts once for all its files, which takes longer than drawing them."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _save(figure: plt.Figure, path: Path) -> None:
    """PNG on white, and SVG whose words are outlines, so that it looks alike everywhere."""
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    figure.savefig(png, dpi=2 * style.DPI, facecolor="white", metadata={"Software": None})
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(svg, facecolor="white", metadata={"Date": None})


def _inline(figure: plt.Figure, name: str, title: str) -> Markup:
    svg = inline_svg(figure, name, html.escape(title, quote=True))
    plt.close(figure)
    return Markup(svg)  # ours: every word in it was escaped by matplotlib


def _environment(path: Path) -> dict[str, str]:
    """What environment.json says, as words; empty where there is none.

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

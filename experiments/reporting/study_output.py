"""Write a study's output: checked tables, figures and `environment.json`."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
from matplotlib.figure import Figure
from rich.console import Console

from ewc_plugin.penalty.stability import DivergedError
from experiments.data.sources import DataSource, find_data
from experiments.reporting.figures.style import save
from experiments.results import tables
from experiments.results.environment import write_environment
from experiments.results.files import make_folder, replace_file
from experiments.results.provenance import ENTRY, NOT_RECORDED, provenance
from experiments.results.schemas import PROVENANCE, Schema
from experiments.settings.run import Dataset

CELLS = "cells"  # folder of the rows that a study has measured before its table is written


@dataclass(frozen=True)
class StudyOutput:
    """The output folder of a study.

    Attributes:
        folder: Which is there.
        source: The images; None where a study draws its own data.
        console: Where progress and tables are printed.
        code: File of the study's module, which `code_hash` starts from.
        settings: All that decides what a cell's rows are, besides the code and the cell.
    """

    folder: Path
    source: DataSource | None
    console: Console
    code: Path = ENTRY
    settings: str = ""

    def cell(
        self, name: str, measure: Callable[[], Iterable[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Measure one cell's rows and keep them, so that they outlive a kill.

        The same command with the same code takes them from the disk, until `table` is written.

        Args:
            name: Of the cell, unique in the study.
            measure: Makes the rows.

        Returns:
            The rows, with the columns that say which code and commit made them, and when.
        """
        code = str(provenance(self.code)["code_hash"])
        identity = hashlib.sha256("\n".join([name, self.settings, code]).encode()).hexdigest()
        file = self.folder / CELLS / f"{identity[:16]}.json"
        if rows := _rows_in(file):
            return rows
        rows = [{**row, **provenance(self.code)} for row in measure()]
        make_folder(file.parent)
        replace_file(file, json.dumps(rows, default=lambda number: number.item()))
        return rows

    def table(self, rows: Iterable[dict[str, Any]] | pd.DataFrame, schema: Schema) -> pd.DataFrame:
        """Write rows as the file that the schema names, with the environment.

        Rows that do not say which code and commit made them, and when, are of this code, now.

        Args:
            rows: Of the table; columns in any order.
            schema: Of the table.

        Returns:
            The rows with the schema's types.

        Raises:
            TableError: They do not fit the schema.
            DivergedError: They hold a number that is not finite where the schema has none.
        """
        rows = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
        now = provenance(self.code)
        old = rows.reindex(columns=list(now)).astype(object)
        rows = rows.assign(**{n: old[n].fillna(value or NOT_RECORDED) for n, value in now.items()})
        columns = [name for name, c in schema.columns.items() if c.required or name in rows]
        rows = rows.reindex(columns=columns)
        for name, values in rows.select_dtypes("number").items():
            if not schema.columns[name].nullable and not np.isfinite(values).all():
                raise DivergedError(
                    f"The training diverged: `{name}` of {schema.name} is not finite. Use a "
                    "smaller learning rate or `ewc_lambda`."
                )
        table = tables.check(rows, schema)
        tables.write(table, self.folder, schema)
        write_environment(self.folder, self.source)
        shutil.rmtree(self.folder / CELLS, ignore_errors=True)
        return table

    def figure(self, figure: Figure, name: str) -> Path:
        """Write `name`.png and close the figure."""
        return save(figure, self.folder / f"{name}.png")

    def show(self, table: pd.DataFrame, form: str = "%.3g", *, index: bool = True) -> None:
        """Print a table."""
        text = table.to_string(float_format=lambda value: form % value, index=index)
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows in a file; none if there is no such file, or something else in it."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    is_table = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return rows if is_table else []


@dataclass(frozen=True)
class OnImages:
    """Options of a study on images."""

    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw."""


def study_output(settings: Any, source: DataSource | None = None) -> StudyOutput:
    """The output of a study whose data are drawn, or found already.

    Args:
        settings: Of the study; its folder `out` is made if it isn't there.
        source: The images, if it has any.

    Returns:
        The output.

    Raises:
        ValueError: The folder can't be made or written to.
    """
    console, out = Console(), settings.out
    if source is not None and source.note:
        console.print(f"NOTE: {source.note}", style="bold yellow", markup=False, soft_wrap=True)
    make_folder(Path(out))
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings)}
    identity = {**chosen, "dataset": source and source.name, "data_root": None, "out": None}
    code = Path(inspect.getfile(type(settings)))
    return StudyOutput(Path(out), source, console, code, repr(identity))


def study_on_images(settings: Any) -> tuple[DataSource, StudyOutput]:
    """The images and the output of a study with the options `dataset`, `data_root` and `out`."""
    source = find_data(settings.dataset, settings.data_root)
    return source, study_output(settings, source)


def columns(kind: type, *names: str, check: pa.Check | None = None, **more: Any) -> dict[str, Any]:
    """Columns of a study's schema that share their type.

    Args:
        kind: Of the entries.
        names: Of the columns.
        check: Of each entry.
        more: Options of `pa.Column`, such as `nullable`.

    Returns:
        By name.
    """
    return {name: pa.Column(kind, check, coerce=True, **more) for name in names}


# Of `statistics.by_lambda`.
CURVE_COLUMNS = {
    **columns(float, "ewc_lambda", nullable=True, check=pa.Check.ge(0)),
    **columns(str, "metric", "unit"),
    **columns(bool, "validation"),
    **columns(int, "n", "diverged", check=pa.Check.ge(0)),
    **columns(float, "mean", "std", "ci_low", "ci_high", nullable=True),
    **PROVENANCE,
}

"""Run a published experiment and say whether its number comes out.

Each is a file in the folder `protocols` with its source, setting, reference numbers and rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro
from rich.console import Console

from experiments.reporting.figures.folder import plot_all
from experiments.reporting.figures.style import save
from experiments.results import schemas, tables
from experiments.results.store import PLOTS
from experiments.settings.grids import Job
from experiments.settings.run import Dataset, RunSettings
from experiments.settings.values import Seed
from experiments.studies.reproduce.figures import TASKS_DRAWN, draw_tasks
from experiments.studies.reproduce.protocol import Protocol, load_protocol
from experiments.studies.reproduce.table import arms_table
from experiments.sweeps.jobs import completed_runs

Name = Literal["kirkpatrick2017", "vandeven2022", "vandeven2025", "baselines"]


@dataclass(frozen=True)
class Reproduce(Job):
    """Run a published experiment beside its reference number."""

    protocol: Annotated[Name, tyro.conf.Positional] = "kirkpatrick2017"
    """Which one."""
    seeds: tuple[Seed, ...] = ()
    """Other seeds than the protocol's."""
    search: bool = False
    """Try the candidates for what the source leaves open, on validation images, instead."""

    tables_only: bool = False
    """Run nothing: write tables and pictures of the runs that are there."""

    compares = False

    @property
    def name(self) -> str:
        """The name of the command and of its output folder."""
        return f"reproduce/{self.protocol}" + ("/search" if self.search else "")

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The protocol's runs, or the candidates of its search."""
        protocol = load_protocol(self.protocol)
        if self.search:
            yield from protocol.search_cells(dataset)
        else:
            yield from protocol.cells(dataset, self.seeds)


def run(settings: Reproduce) -> pd.DataFrame:
    """Make the runs; write `reproduce.csv` and pictures beside the run tables."""
    console = Console(quiet=settings.quiet)
    protocol = load_protocol(settings.protocol)
    if settings.search:
        return _search(settings, console)
    console.print(f"{protocol.source}\n{protocol.in_words()}", highlight=False, markup=False)
    runs, folder = completed_runs(settings, console, make=not settings.tables_only)
    return report(protocol, runs, folder, console)


def report(protocol: Protocol, runs: pd.DataFrame, folder: Path, console: Console) -> pd.DataFrame:
    """Write and print what the runs say of the protocol."""
    table = arms_table(protocol, runs)
    tables.write(table, folder, schemas.REPRODUCE)
    accuracy = tables.read(folder, schemas.ACCURACY)
    accuracy = accuracy[accuracy["run_id"].isin(runs["run_id"])]
    plot_all(accuracy, runs, folder / PLOTS)
    if protocol.name in TASKS_DRAWN:
        save(draw_tasks(protocol, accuracy, runs), folder / PLOTS / "tasks.png")
    shown = ["arm", "reference", "n", "mean", "ci_low", "ci_high", "reproduced"]
    console.print(table[shown].to_string(index=False), highlight=False)
    return table


def _search(settings: Reproduce, console: Console) -> pd.DataFrame:
    completed_runs(settings, console, make=not settings.tables_only)
    summary = tables.load(settings.folder)["summary"]
    rows = summary[summary["metric"] == "average_accuracy"].sort_values("mean", ascending=False)
    console.print(rows[["config_hash", "method", "ewc_lambda", "n", "mean"]].to_string(index=False))
    return rows

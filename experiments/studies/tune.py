"""Choose lambda on validation images, by a search that stops by itself.

Each combination of method and settings is an arm with a search of its own, on the same seeds: at
most eight values, a factor of 10 apart, and of sqrt(10) around the best. The reporting command
takes what was chosen by `--tuned`, with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from rich.console import Console

from experiments.data.sources import DataSource
from experiments.reporting.figures.style import save
from experiments.reporting.terminal import print_troubles
from experiments.reporting.tuned import draw_tuned, print_edges, print_tuned
from experiments.results import schemas, statistics, tables
from experiments.results.files import replace_file
from experiments.results.provenance import provenance_of
from experiments.results.store import PLOTS, Store
from experiments.settings.grids import Sweep, axis
from experiments.settings.run import (
    WITH_LAMBDA,
    Benchmark,
    Dataset,
    Method,
    RunSettings,
    require,
)
from experiments.settings.tuned import (
    TUNED_FILE,
    TUNING_SEEDS,
    arm_of,
    start_lambda,
    tuned_content,
)
from experiments.settings.unset import given, used
from experiments.settings.values import Count, Lambda, Seed, is_own
from experiments.sweeps import exit_status
from experiments.sweeps.jobs import make_runs, prepare, write_run_tables
from experiments.sweeps.lambda_search import MOST_VALUES, WORSE, Arm, Search, search


@dataclass(frozen=True)
class Tune(Sweep):
    """Choose the lambda of each combination of the values below, on validation images."""

    methods: tuple[Method, ...] = axis("avalanche-ewc", "ewc")
    """Methods; those without a lambda are left out, so that a file of settings serves both this
    and the command that reports."""
    ewc_lambda: tuple[Lambda, ...] = axis()
    """Where every search starts. Empty: a value per method, Fisher type and normalisation."""
    seeds: tuple[Seed, ...] = axis(*TUNING_SEEDS)
    """Each seeds the stream, the initial weights and the order of the samples; a command that takes
    what was chosen refuses to report them."""
    benchmark: tuple[Benchmark, ...] = axis("split", "permuted")
    """As in `sweep`."""
    tuned: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    validation: Annotated[bool, tyro.conf.Suppress] = True
    eval_every: Annotated[Count, tyro.conf.Suppress] = 1  # the searches have their own

    name = "tune"
    compares = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.ewc_lambda) < 2, "ewc_lambda", "one value, or empty", self.ewc_lambda)
        require(0.0 not in self.ewc_lambda, "ewc_lambda", "above 0", self.ewc_lambda)
        some = [method for method in self.methods if method in WITH_LAMBDA or is_own(method)]
        require(some, "methods", f"among {', '.join(WITH_LAMBDA)}", ", ".join(self.methods))

    def _check_chosen_lambda(self) -> None:
        """There is a start for all settings."""

    def own_lambda(self, run: RunSettings) -> float:
        """Where the search of the run's arm starts."""
        return start_lambda(run)

    def arms(self, dataset: Dataset) -> list[Arm]:
        """Every arm."""
        one_seed = replace(self, seeds=self.seeds[:1])
        return [
            Arm(replace(cell, validation=True, eval_every=cell.n_experiences), self.seeds)
            for cell in super(Tune, one_seed).cells(dataset)
            if cell.ewc_lambda is not None
        ]

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The runs that the searches begin with."""
        for arm in self.arms(dataset):
            yield from search(arm, {}).pending

    @property
    def left_out(self) -> str:  # type: ignore[override]
        """A message on what `sweep` leaves out, and on methods without a lambda."""
        without = [m for m in self.methods if not (m in WITH_LAMBDA or is_own(m))]
        line = f"{', '.join(without)}: left out, as they have no lambda." if without else ""
        return " ".join(filter(None, (super().left_out, line)))


def run(settings: Tune) -> pd.DataFrame:
    """Search every arm; write `tuned.csv`, `tuned.json` and a figure per stream.

    Raises:
        ValueError: An arm has no lambda; those of the others are written.
    """
    console = Console(quiet=settings.quiet)
    if settings.dry_run:
        console.print(f"The first values of each search, which tries up to {MOST_VALUES}:")
    store, _, source = prepare(settings, console)
    arms = settings.arms(source.name)
    with_lambda = {arm.run.method for arm in arms}
    if without := [m for m in settings.methods if is_own(m) and m not in with_lambda]:
        line = f"no lambda to choose: {', '.join(without)} has no parameter `ewc_lambda`"
        require(arms, "methods", f"some with a lambda, there is {line}", ", ".join(without))
        console.print(f"NOTE: {line}.", style="bold yellow", markup=False, soft_wrap=True)
    _make_all(settings, arms, store, source, console)
    with store.lock:
        _, runs, _ = write_run_tables(store, source)
        searches = _searches(arms, store)
        chosen = [one for one in searches if not one.pending and math.isfinite(one.found[one.best])]
        table = tables.frame((_row(one, runs) for one in chosen), schemas.TUNED)
        _write(table, arms, store.folder)
    mine = runs[runs["run_id"].isin(_tried(searches))]
    for name, figure in draw_tuned(mine):
        save(figure, store.folder / PLOTS / f"{name}.png")
    print_tuned(table, mine, console)
    errors = Console(stderr=True) if settings.quiet else console
    print_edges(table, errors)
    exit_status.note(mine)
    print_troubles(mine[mine["status"] == "failed"], errors)
    others = f"with other seeds than {' '.join(map(str, settings.seeds))}"
    line = f"Take them by --tuned {store.folder}, {others}."
    console.print(line, highlight=False, soft_wrap=True)
    if n_missing := len(arms) - len(table):
        raise ValueError(
            f"{n_missing} of {len(arms)} arms have no lambda, since runs failed or all diverged: "
            "start from a smaller one by --ewc-lambda."
        )
    return table


def _write(table: pd.DataFrame, arms: Sequence[Arm], folder: Path) -> None:
    """Write both files; what an earlier command chose for other arms stays in them."""
    own = {arm_of(arm.run) for arm in arms}
    earlier = tables.read(folder, schemas.TUNED).to_dict("records")
    kept = [row for row in earlier if arm_of(_chosen_run(row)) not in own]
    rows = tables.write_rows([*kept, *table.to_dict("records")], folder, schemas.TUNED)
    seeds = sorted({int(seed) for text in rows["seeds"] for seed in text.split()})
    runs = [_chosen_run(row) for row in rows.to_dict("records")]
    at_edge = [i for i, place in enumerate(rows["place"]) if place != "inside"]
    replace_file(folder / TUNED_FILE, tuned_content(runs, seeds, at_edge))


def _chosen_run(row: Mapping[Any, Any]) -> RunSettings:
    """A run at the lambda in a row of `tuned.csv`; a row has no seed of its own."""
    return RunSettings(**{**given(row), "seed": 0})


def _make_all(
    settings: Tune, arms: Sequence[Arm], store: Store, source: DataSource, console: Console
) -> None:
    """Make the runs of every search until all have ended, a round of all searches at a time."""
    asked: set[str] = set()  # a run that failed is not tried again by the same command
    while True:
        searches = _searches(arms, store, asked if settings.force else None)
        cells = (cell for one in searches for cell in one.pending)
        wanted = [cell for cell in cells if cell.run_id not in asked]
        if not wanted:
            return
        asked |= {cell.run_id for cell in wanted}
        make_runs(settings, store, wanted, source, console)


def _searches(
    arms: Sequence[Arm], store: Store, counted: Collection[str] | None = None
) -> list[Search]:
    """How far the searches have come by the stored runs, or by those that are `counted`."""
    runs = store.results()[1]
    runs = runs[runs["status"] != "failed"]
    if counted is not None:
        runs = runs[runs["run_id"].isin(counted)]
    pairs = zip(runs["status"], runs["average_accuracy"], strict=True)
    outcomes = dict(zip(runs["run_id"], pairs, strict=True))
    return [search(arm, outcomes) for arm in arms]


def _tried(searches: Sequence[Search]) -> list[str]:
    """The ids of all runs of the searches, those that failed too."""
    tried = [cell for one in searches for step in one.found for cell in one.arm.cells(step)]
    return [cell.run_id for one in searches for cell in one.pending] + [c.run_id for c in tried]


def _row(one: Search, runs: pd.DataFrame) -> dict[str, Any]:
    """The row of `tuned.csv`."""
    cells = one.arm.cells(one.best)
    own = runs[runs["run_id"].isin([cell.run_id for cell in cells])]
    settings = {k: v for k, v in used(asdict(cells[0])).items() if k != "seed"}
    good = one.as_good
    return {
        **settings,
        "metric": "average_accuracy",
        "unit": "fraction",
        **statistics.interval(own["average_accuracy"].to_numpy(dtype=float)),
        "margin": WORSE,
        "lowest_as_good": one.arm.lambda_at(good[0]),
        "highest_as_good": one.arm.lambda_at(good[-1]),
        "smallest_tried": one.arm.lambda_at(min(one.found)),
        "largest_tried": one.arm.lambda_at(max(one.found)),
        "n_values": len(one.found),
        "place": one.place,
        "seeds": " ".join(map(str, one.arm.seeds)),
        "config_hash": cells[0].config_hash,
        **provenance_of(own),
    }

"""Studies whose lambdas are searched first, by `tune`, in the folder `tuning` of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Console

from experiments.data.sources import find_data
from experiments.settings.grids import Job, Sweep
from experiments.settings.run import Dataset, RunSettings
from experiments.settings.tuned import TUNING_SEEDS, check_unseen
from experiments.settings.values import Seed
from experiments.studies import tune
from experiments.sweeps.jobs import show_plan


@dataclass(frozen=True)
class TunedFirst(Job):
    """A study of runs with the lambdas that `tune` finds for its arms."""

    seeds: tuple[Seed, ...] = tuple(range(10))
    """Reported: each seeds the stream, the initial weights and the order of the samples."""
    tuning_seeds: tuple[Seed, ...] = TUNING_SEEDS
    """Lambda is chosen with them, on validation images; none of them is reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unseen(self.seeds, self.tuning_seeds)

    @property
    def grids(self) -> list[dict[str, Any]]:
        """Settings of `Sweep` that span the arms, a grid each."""
        raise NotImplementedError

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The runs that are reported, seed by seed; the lambdas must have been found."""
        where = {"data_path": self.data_path, "device": self.device}
        options: dict[str, Any] = {**where, "tuned": (str(self.folder / "tuning"),)}
        for seed in self.seeds:
            for grid in self.grids:
                yield from Sweep(**grid, **options, seeds=(seed,)).cells(dataset)

    def searches(self) -> list[tune.Tune]:
        """The search of each grid."""
        shared = {field.name: getattr(self, field.name) for field in fields(Job)}
        shared |= {"out": str(self.folder / "tuning"), "seeds": self.tuning_seeds}
        return [tune.Tune(**shared | grid) for grid in self.grids]


def search_lambdas(job: TunedFirst, console: Console) -> None:
    """Search the lambdas that are missing.

    Raises:
        SystemExit: It is a dry run, which is done.
    """
    if job.dry_run:
        source = find_data(job.dataset, job.data_root)
        for search in job.searches():
            show_plan(search, list(search.cells(source.name)), console)
        console.print("Those are the first values of each search; the paired runs come after it.")
        raise SystemExit(0)
    for search in job.searches():
        tune.run(search)

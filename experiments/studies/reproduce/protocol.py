"""A published experiment as data: its setting, the number it reports, and what counts as the same.

Each file in the folder `protocols` holds one. Rules and margins stand in those files, so that they
are fixed before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from experiments.settings.run import Dataset, RunSettings

PROTOCOLS = ("kirkpatrick2017", "vandeven2022", "vandeven2025", "baselines")


@dataclass(frozen=True)
class Reference:
    """A published average accuracy, as a fraction, and the rule for calling ours a reproduction.

    Attributes:
        value: As published.
        margin: Ours may be off by so much; None: ours must be at least `value`.
        where: Table or section it was read in.
    """

    value: float
    margin: float | None
    where: str

    @property
    def rule(self) -> str:
        """The rule in words, for the table."""
        if self.margin is None:
            return f"mean >= {self.value:g}"
        return f"mean within {self.margin:g} of {self.value:g}"

    def is_met(self, mean: float) -> bool:
        """Whether a mean over seeds reproduces it."""
        if self.margin is None:
            return mean >= self.value
        return abs(mean - self.value) <= self.margin


@dataclass(frozen=True)
class Arm:
    """One method in one setting.

    Attributes:
        label: Names the arm in tables and pictures.
        changes: What differs from the protocol's setting.
        reference: The published number, if there is one.
        against: Label of the arm that this one is compared with, seed by seed.
        seeds: Reported ones; empty: the protocol's.
    """

    label: str
    changes: Mapping[str, Any]
    reference: Reference | None = None
    against: str | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """A published experiment.

    Attributes:
        name: As on the command line.
        source: What is reproduced.
        setting: Fields of `RunSettings` that all arms share.
        arms: What is run and compared.
        seeds: Reported ones, where an arm has none of its own.
        reduced: In what the setting is smaller than the published one; empty if in nothing.
        search: Fields of `RunSettings`, one entry per candidate, tried on validation images with
            `search_seeds` to find what the source leaves open.
        search_seeds: Not among `seeds`.
        digits: What differs when it is tried out on the digits.
    """

    name: str
    source: str
    setting: Mapping[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    reduced: str = ""
    search: tuple[Mapping[str, Any], ...] = ()
    search_seeds: tuple[int, ...] = (100,)
    digits: Mapping[str, Any] = field(default_factory=dict)

    def cells(self, dataset: Dataset, seeds: tuple[int, ...] = ()) -> Iterator[RunSettings]:
        """Every run, seed by seed, so that what is cut short has complete seeds."""
        seeds_of = {arm.label: seeds or arm.seeds or self.seeds for arm in self.arms}
        for seed in sorted({seed for found in seeds_of.values() for seed in found}):
            for arm in self.arms:
                if seed in seeds_of[arm.label]:
                    yield self.run_of(arm, dataset, seed)

    def search_cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Every candidate of the search."""
        for seed in self.search_seeds:
            for changes in self.search:
                yield self._run(changes, dataset, seed, validation=True)

    def run_of(self, arm: Arm, dataset: Dataset, seed: int) -> RunSettings:
        """The settings of one run."""
        return self._run(arm.changes, dataset, seed)

    def _run(
        self, changes: Mapping[str, Any], dataset: Dataset, seed: int, **more: Any
    ) -> RunSettings:
        fields = {**self.setting, **changes, **more}
        if dataset == "digits":
            fields |= self.digits
        return RunSettings(dataset=dataset, seed=seed, **fields)

    def in_words(self) -> str:
        """The setting on one line, without what is unset."""
        run = asdict(replace(self.run_of(self.arms[0], "mnist", 0)))
        shared = {k: run[k] for k in self.setting if run[k] is not None}
        return ", ".join(f"{k}={v}" for k, v in shared.items())


def load_protocol(name: str) -> Protocol:
    """The protocol in `experiments/studies/reproduce/protocols/<name>.py`."""
    protocol: Protocol = import_module(f"experiments.studies.reproduce.protocols.{name}").PROTOCOL
    return protocol

"""The grids of runs that the commands span.

A command is a frozen dataclass that tyro turns into a command line, so each field's sentence is its
`--help`; `cells()` turns a command into the settings of single runs, which are pure data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ewc_plugin.fisher.scores import FisherType
from experiments.settings.run import (
    PENALISED,
    Benchmark,
    DataPath,
    Dataset,
    Method,
    Model,
    Optimizer,
    RunSettings,
    Scenario,
    _require,
)
from experiments.settings.tuned import TUNING_GRIDS, TUNING_SEEDS, chosen_lambda

OWN_SCENARIO: dict[Benchmark, Scenario] = {"split": "task", "permuted": "domain"}


# Enough passes for Naive to forget what it has learned.
DEFAULT_EPOCHS: dict[tuple[str, str], int] = {
    ("split", "mnist"): 4,
    ("split", "digits"): 40,
    ("permuted", "mnist"): 1,
    ("permuted", "digits"): 20,
}


DEFAULT_BATCH_SIZE: dict[str, int] = {"mnist": 512, "digits": 128}
DEFAULT_LEARNING_RATE: dict[str, float] = {"mnist": 2e-3, "digits": 1e-3}


@dataclass(frozen=True)
class Job:
    """What every command that runs experiments can be told."""

    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw. Unset: $EWC_DATA_ROOT, else the cache folder."""
    out: str | None = None
    """Folder of the tables and plots; runs found in it are not repeated. Unset: runs/COMMAND."""
    jobs: int = os.cpu_count() or 1
    """Runs at the same time, each a process with one torch thread."""
    force: bool = False
    """Repeat the runs that the output folder holds already."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""
    data_path: DataPath = "fast"
    """Tensors made once and fed in batches, or Avalanche's per-sample transforms: same bits."""
    config: str | None = None
    """TOML file of settings by these names, lists where several span a grid; what the command line
    says counts more."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers make the runs, instead of processes here."""
    checkpoint: bool = False
    """Store each run's state after every experience, so that a killed run goes on from there."""
    dry_run: bool = False
    """Say what would run, what exists already, and about how long it takes; run nothing."""
    quiet: bool = False
    """Print nothing but errors and runs that did not end well."""
    tensorboard: bool = False
    """Log the runs for TensorBoard, each in OUT/logs/RUN."""
    wandb: bool = False
    """Log the runs for Weights & Biases, offline, each in OUT/logs/RUN; `wandb sync` uploads."""

    def __post_init__(self) -> None:
        _require(self.jobs >= 1, "jobs", ">= 1", self.jobs)
        try:
            torch.zeros(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`device` must be one that torch can use here, got {self.device!r} "
                f"({str(error).splitlines()[0]}); use cpu."
            ) from None

    compares = True  # whether the report holds ours against the built-in
    left_out = ""  # what the grid's product has that is no run, and why

    @property
    def name(self) -> str:
        """The subcommand's name, which is also the default output folder's."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.out or f"runs/{self.name}")

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The settings of every run."""
        raise NotImplementedError


@dataclass(frozen=True)
class Grid(Job):
    """One run for each combination of the values below; what says the same twice is one run."""

    methods: tuple[Method, ...] = get_args(Method)
    """No regularisation, Avalanche's EWC, ours, and all data at once (the upper bound)."""
    fisher_type: tuple[FisherType, ...] = (FisherType.PREDICTED,)
    """Labels that our Fisher averages over."""
    ewc_lambda: tuple[float, ...] = ()
    """Penalty strengths, each tried with both EWC methods. Empty: each method's own, chosen on
    validation data."""
    mode: tuple[Literal["separate", "online"], ...] = ("separate",)
    """One quadratic per experience, or a single one that decays."""
    decay_factor: tuple[float, ...] = ()
    """Decay of the old Fisher, online mode only; 1 is Huszar's corrected Laplace."""
    normalize: tuple[Literal["none", "mean", "trace", "max", "avalanche"], ...] = ("none",)
    """What each Fisher of ours is divided by; needs its own ewc_lambda, such as 0.01 for mean."""
    penalty_step: tuple[Literal["gradient", "implicit"], ...] = ("gradient",)
    """Where our penalty acts: in the gradient, or as an implicit step after the optimizer's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds the stream, the initial weights and the order of the samples."""
    experiences: tuple[int, ...] = (5,)
    """Number of experiences (tasks) in the stream."""
    epochs: tuple[int, ...] = ()
    """Passes over the data of each experience. Empty: 4 on split MNIST (at one, Naive has not
    forgotten yet), 1 on permuted MNIST, 40 and 20 on the digits."""
    batch_size: tuple[int, ...] = ()
    """Samples per training mini-batch. Empty: 512 on MNIST, 128 on the digits."""
    optimizer: tuple[Optimizer, ...] = ("adam",)
    """Optimizer; no weight decay, no momentum for sgd."""
    learning_rate: tuple[float, ...] = ()
    """Step size of the optimizer. Empty: 2e-3 on MNIST, 1e-3 on the digits."""
    optimizer_state: tuple[Literal["kept", "reset"], ...] = ("kept",)
    """Whether the optimizer's moments outlive an experience, as Avalanche has it."""
    model: tuple[Model, ...] = ("mlp",)
    """Fully connected or small convolutional network; task-incremental gets a head per task."""
    hidden_size: tuple[int, ...] = (256,)
    """Units per hidden layer of the MLP."""
    hidden_layers: tuple[int, ...] = (1,)
    """Hidden layers of the MLP."""
    dropout: tuple[float, ...] = (0.0,)
    """Dropout rate while training; the Fisher is always taken without."""
    pixels: tuple[Literal["normalized", "unit"], ...] = ("normalized",)
    """By MNIST's mean and deviation, as Avalanche has it, or in [0, 1], as other papers do."""
    validation: bool = False
    """Evaluate on the last sixth of the training images, which then is not trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _listed(type(self)):  # a single value is a list of one
            object.__setattr__(self, name, _as_list(getattr(self, name)))
            _require(name in _MAY_BE_EMPTY or getattr(self, name), name, "a non-empty list", ())
        _require(self.streams, "scenario", "one that the benchmark has", self.scenario)
        useless = self.decay_factor and "online" not in self.mode
        _require(not useless, "decay_factor", "unset in mode separate", self.decay_factor)
        chosen = not self.ewc_lambda and "ewc" in self.methods
        for name, plain in (("normalize", "none"), ("penalty_step", "gradient")):
            others = [value for value in getattr(self, name) if value != plain]
            rule = f"given with `{name}` {', '.join(others)}: the chosen ones are for {plain}"
            _require(not (chosen and others), "ewc_lambda", rule, "none")

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """The benchmarks and scenarios of the grid."""
        raise NotImplementedError

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The settings of every run; each once, whatever combinations lead to it."""
        yield from {cell.run_id: cell for cell in self._combinations(dataset)}.values()

    def _combinations(self, dataset: Dataset) -> Iterator[RunSettings]:
        for seed, (benchmark, scenario) in product(self.seeds, self.streams):
            varied: dict[str, Any] = {
                "n_experiences": self.experiences,
                "epochs": self.epochs or (DEFAULT_EPOCHS[benchmark, dataset],),
                "batch_size": self.batch_size or (DEFAULT_BATCH_SIZE[dataset],),
                "learning_rate": self.learning_rate or (DEFAULT_LEARNING_RATE[dataset],),
                "optimizer_state": _unset(self.optimizer_state, "kept"),
                "pixels": _unset(self.pixels, "normalized"),
                **{name: getattr(self, name) for name in _SHARED_LISTS},
            }
            for values in product(*varied.values()):
                settings = dict(zip(varied, values, strict=True))
                if settings["model"] != "mlp":
                    settings |= _MLP_ONLY
                for method in self.methods:
                    base = RunSettings(
                        benchmark,
                        dataset,
                        scenario,
                        method,
                        seed,
                        **settings,
                        **{name: getattr(self, name) for name in _SHARED},
                    )
                    yield from self._penalties(base) if method in PENALISED else (base,)

    def _penalties(self, base: RunSettings) -> Iterator[RunSettings]:
        ours = base.method == "ewc"
        own = {
            "fisher_type": [FisherType(t).value for t in self.fisher_type],
            "normalize": _unset(self.normalize, "none"),
            "penalty_step": _unset(self.penalty_step, "gradient"),
        }
        varied: dict[str, Any] = {
            **(own if ours else {}),
            "ewc_lambda": self.ewc_lambda or (chosen_lambda(base),),
            "mode": self.mode,
        }
        for values in product(*varied.values()):
            settings = dict(zip(varied, values, strict=True))
            online = settings["mode"] == "online"
            for decay_factor in (self.decay_factor if online else ()) or (None,):
                yield replace(base, **settings, decay_factor=decay_factor)


# Fields of `Grid` and of `RunSettings` alike.
_SHARED = ("validation", "data_path", "device")
_SHARED_LISTS = (
    *("optimizer", "model"),
    *("hidden_size", "hidden_layers", "dropout"),
)


_MAY_BE_EMPTY = (
    *("ewc_lambda", "decay_factor", "epochs", "batch_size", "learning_rate"),
    "scenario",
)


_MLP_ONLY = {name: getattr(RunSettings, name) for name in ("hidden_size", "hidden_layers")}


def _listed(kind: type[Grid]) -> list[str]:
    """The fields of a grid that span it."""
    return [field.name for field in fields(kind) if str(field.type).startswith("tuple[")]


def _as_list(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _unset(values: tuple[str, ...], default: str) -> list[str | None]:
    """The values as `RunSettings` has them, where the default is None."""
    return [None if value == default else value for value in values]


@dataclass(frozen=True)
class SplitMnist(Grid):
    """Split MNIST: the ten digits in experiences of equally many classes."""

    scenario: tuple[Scenario, ...] = ("task",)
    """Task labels and a head each (task), one head shared by all (domain), ten outputs (class)."""

    name = "split-mnist"

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """Split MNIST in each scenario."""
        return [("split", scenario) for scenario in self.scenario]


@dataclass(frozen=True)
class PermutedMnist(Grid):
    """Permuted MNIST: all ten digits in every experience, the pixels permuted anew in each."""

    scenario: tuple[Literal["task", "domain"], ...] = ("domain",)
    """Task labels and a head each (task), or one head shared by all (domain)."""

    name = "permuted-mnist"

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """Permuted MNIST in each scenario."""
        return [("permuted", scenario) for scenario in self.scenario]


@dataclass(frozen=True)
class Sweep(Grid):
    """A grid over any settings, on one benchmark or both."""

    benchmark: tuple[Benchmark, ...] = ("permuted",)
    """Split MNIST has some of the digits in each experience, permuted MNIST all."""
    scenario: tuple[Scenario, ...] = ()
    """As the benchmarks' own commands have it; permuted MNIST has no class-incremental one. Empty:
    task-incremental split MNIST, domain-incremental permuted MNIST."""

    name = "sweep"

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """Every benchmark in every scenario that it has."""
        return [
            (benchmark, scenario)
            for benchmark in self.benchmark
            for scenario in self.scenario or (OWN_SCENARIO[benchmark],)
            if (benchmark, scenario) != ("permuted", "class")
        ]

    @property
    def left_out(self) -> str:
        """Says so where a benchmark has no such scenario."""
        if "permuted" in self.benchmark and "class" in self.scenario:
            return "Permuted MNIST has no class-incremental scenario; it is left out there."
        return ""


@dataclass(frozen=True)
class Main(Job):
    """The main job: split MNIST (task-incremental) and permuted MNIST, all methods."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds the stream, the initial weights and the order of the samples."""

    name = "main"

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Both benchmarks with the settings of their own commands."""
        for grid in (SplitMnist, PermutedMnist):
            settings = grid(seeds=self.seeds, device=self.device, data_path=self.data_path)
            yield from settings.cells(dataset)


@dataclass(frozen=True)
class Tune(Job):
    """Choose each EWC method's lambda for the main job, on validation images and other seeds."""

    name = "tune"
    compares = False

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """A grid of lambdas per benchmark and method, evaluated on held-out training images."""
        for (benchmark, grid_dataset, scenario, method), lambdas in TUNING_GRIDS.items():
            if grid_dataset != dataset:
                continue
            grid = SplitMnist if benchmark == "split" else PermutedMnist
            settings = grid(
                methods=(method,),  # type: ignore[arg-type]
                scenario=scenario,  # type: ignore[arg-type]
                ewc_lambda=lambdas,
                seeds=TUNING_SEEDS,
                validation=True,
                device=self.device,
                data_path=self.data_path,
            )
            yield from settings.cells(dataset)

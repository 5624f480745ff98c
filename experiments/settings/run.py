"""What can be set: the settings of one run, and the grids of runs that the commands span.

A command is a frozen dataclass that tyro turns into a command line, so each field's sentence is its
`--help`; `cells()` turns a command into the settings of single runs, which are pure data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ewc_plugin.fisher.scores import FisherType

Benchmark = Literal["split", "permuted"]
Scenario = Literal["task", "domain", "class"]
Method = Literal["naive", "avalanche-ewc", "ewc", "joint"]
Dataset = Literal["mnist", "digits"]
Model = Literal["mlp", "cnn"]
Optimizer = Literal["adam", "sgd"]
DataPath = Literal["fast", "classic"]
N_CLASSES = 10
PENALISED: tuple[Method, ...] = ("avalanche-ewc", "ewc")
STREAM = ("benchmark", "dataset", "scenario")  # the settings that name a stream
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
# What `python -m experiments tune` chose on validation data for the settings of the main job; a
# test holds these numbers to results/tuning.
CHOSEN_LAMBDA: dict[tuple[str, str, str, str], float] = {
    ("split", "mnist", "task", "ewc"): 1e3,
    ("split", "mnist", "task", "avalanche-ewc"): 1e6,
    ("permuted", "mnist", "domain", "ewc"): 30.0,
    ("permuted", "mnist", "domain", "avalanche-ewc"): 300.0,
    ("split", "digits", "task", "ewc"): 1e6,
    ("split", "digits", "task", "avalanche-ewc"): 1e4,
    ("permuted", "digits", "domain", "ewc"): 100.0,
    ("permuted", "digits", "domain", "avalanche-ewc"): 1e3,
}
# A network that fits its training data has little predicted-label Fisher left, hence the digits'.
TUNING_GRIDS: dict[tuple[str, str, str, str], tuple[float, ...]] = {
    ("split", "mnist", "task", "ewc"): (1e2, 1e3, 1e4, 1e5, 1e6),
    ("split", "mnist", "task", "avalanche-ewc"): (1e3, 1e4, 1e5, 1e6, 1e7),
    ("permuted", "mnist", "domain", "ewc"): (3.0, 10.0, 30.0, 100.0, 300.0),
    ("permuted", "mnist", "domain", "avalanche-ewc"): (30.0, 100.0, 300.0, 1000.0, 3000.0),
    ("split", "digits", "task", "ewc"): (1e5, 1e6, 1e7, 1e8, 1e9),
    ("split", "digits", "task", "avalanche-ewc"): (1e3, 1e4, 1e5, 1e6, 1e7),
    ("permuted", "digits", "domain", "ewc"): (30.0, 100.0, 300.0, 1e3, 3e3),
    ("permuted", "digits", "domain", "avalanche-ewc"): (300.0, 1e3, 3e3, 1e4, 3e4),
}
TUNING_SEEDS = (100, 101, 102)  # never reported


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what one run computes; the same settings give the same rows."""

    benchmark: Benchmark
    dataset: Dataset
    scenario: Scenario
    method: Method
    seed: int
    fisher_type: str | None = None  # None where the method has no choice of it
    ewc_lambda: float | None = None  # None where the method has no penalty
    mode: str | None = None
    decay_factor: float | None = None
    n_experiences: int = 5
    epochs: int = 1
    batch_size: int = 128
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-3
    model: Model = "mlp"
    hidden_size: int = 256
    hidden_layers: int = 2
    dropout: float = 0.0
    validation: bool = False
    data_path: DataPath = "fast"
    device: str = "cpu"
    normalize: str | None = None  # our EWC alone: what each Fisher is divided by
    penalty_step: str | None = None  # our EWC alone: "implicit", or in the gradient
    iterations: int | None = None  # of training per experience, instead of `epochs`
    # Mini-batches of Avalanche's definition of F alone; unset, those of training, in class order.
    importance_batch: int | None = None
    importance_order: str | None = None  # "shuffled"
    optimizer_state: str | None = None  # "reset" before each experience; unset, it is kept
    pixels: str | None = None  # "unit": in [0, 1]; unset, normalised as Avalanche has them

    def __post_init__(self) -> None:
        _check(self)

    @property
    def config_hash(self) -> str:
        """Ten hex digits of everything but the seed: the cell that the seeds repeat.

        What is unset does not count, so that a new optional setting leaves old ids as they are.
        """
        settings = {k: v for k, v in asdict(self).items() if v is not None and k != "seed"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def run_id(self) -> str:
        """Names the run: readable in front, unique behind."""
        name = f"{self.benchmark}-{self.dataset}-{self.scenario}-{self.method}"
        return f"{name}-{self.config_hash}-s{self.seed}"

    @property
    def stream(self) -> RunSettings:
        """The settings that decide the stream: what has the same ones can share it."""
        return RunSettings(
            self.benchmark,
            self.dataset,
            self.scenario,
            "naive",
            # The classes are split in the same order whatever the seed.
            self.seed if self.benchmark == "permuted" else 0,
            n_experiences=self.n_experiences,
            validation=self.validation,
            pixels=self.pixels,
        )


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
    normalize: tuple[Literal["none", "mean", "trace", "max"], ...] = ("none",)
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


def chosen_lambda(run: RunSettings) -> float:
    """The lambda chosen on validation data for this benchmark, scenario and method.

    Raises:
        ValueError: None was chosen for the scenario.
    """
    try:
        return CHOSEN_LAMBDA[run.benchmark, run.dataset, run.scenario, run.method]
    except KeyError:
        raise ValueError(
            f"`ewc_lambda` must be given for {run.method} on {run.benchmark} {run.dataset}, "
            f"scenario {run.scenario}: none was chosen on validation data; try --ewc-lambda 100."
        ) from None


def _require(condition: object, name: str, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {rule}, got {value}.")


def _check(run: RunSettings) -> None:
    """One clear line for each setting that no run can have."""
    if run.benchmark == "split":
        fits = 1 <= run.n_experiences <= N_CLASSES and N_CLASSES % run.n_experiences == 0
        rule = f"a divisor of {N_CLASSES} classes: 1, 2, 5 or 10"
        _require(fits, "experiences", rule, run.n_experiences)
    _require(run.n_experiences >= 1, "experiences", ">= 1", run.n_experiences)
    _require(0 <= run.seed < 2**32, "seeds", "between 0 and 2^32 - 1", run.seed)
    for name in ("epochs", "batch_size", "hidden_size", "hidden_layers"):
        _require(getattr(run, name) >= 1, name, ">= 1", getattr(run, name))
    positive = math.isfinite(run.learning_rate) and run.learning_rate > 0
    _require(positive, "learning_rate", "> 0 and finite", run.learning_rate)
    _require(0 <= run.dropout < 1, "dropout", "at least 0 and below 1", run.dropout)
    if run.ewc_lambda is not None:
        fits = math.isfinite(run.ewc_lambda) and run.ewc_lambda >= 0
        _require(fits, "ewc_lambda", ">= 0 and finite", run.ewc_lambda)
    for name, only in (("optimizer_state", "reset"), ("pixels", "unit")):
        value = getattr(run, name)
        _require(value in (None, only), name, f"unset or {only!r}", value)
    _check_importances(run)
    if run.mode == "online":
        given = run.decay_factor is not None and 0 <= run.decay_factor <= 1
        _require(given, "decay_factor", "between 0 and 1 in mode online", run.decay_factor)
    else:
        rule = "unset in mode separate"
        _require(run.decay_factor is None, "decay_factor", rule, run.decay_factor)


def _check_importances(run: RunSettings) -> None:
    for name in ("iterations", "importance_batch"):
        value = getattr(run, name)
        _require(value is None or value >= 1, name, ">= 1", value)
    order = run.importance_order
    _require(order in (None, "shuffled"), "importance_order", "unset or 'shuffled'", order)
    if run.importance_batch is not None or order is not None:
        batched = run.method == "avalanche-ewc" or run.fisher_type == "batched"
        name = "importance_batch" if order is None else "importance_order"
        rule = "unset where F is exact per sample"
        _require(batched, name, rule, run.importance_batch if order is None else order)
        _require(run.data_path == "fast", "data_path", f"fast with `{name}`", run.data_path)

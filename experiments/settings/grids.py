"""The grids of runs that the commands span.

A command is a frozen dataclass that tyro turns into a command line, so each field's sentence is its
`--help`; `cells()` turns a command into the settings of single runs, which are pure data.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from ewc_plugin.fisher.scores import FisherType
from experiments.settings.own import OPTIONS, OwnFile, OwnFunction, find_function
from experiments.settings.own_benchmark import size_and_scenario
from experiments.settings.run import (
    MAIN_METHODS,
    OWN,
    WITH_ALL_CLASSES,
    WITH_FISHER,
    WITH_LAMBDA,
    WITH_MEMORY,
    WITH_MODE,
    Benchmark,
    DataPath,
    Dataset,
    Decay,
    Dropout,
    Epochs,
    Experiences,
    HiddenLayers,
    HiddenSize,
    Method,
    Mode,
    Model,
    Normalize,
    Optimizer,
    RunSettings,
    Scenario,
    require,
    takes_mini_batches,
)
from experiments.settings.tuned import Tuned, chosen_lambda, read_tuned
from experiments.settings.unset import UNSET
from experiments.settings.values import (
    Count,
    Lambda,
    Positive,
    Processes,
    Seed,
    check_values,
    is_own,
    shown,
)

OWN_SCENARIO: dict[Benchmark, Scenario] = {
    "split": "task",
    "permuted": "domain",
    "rotated": "domain",
}
# Enough epochs for Naive to show forgetting.
DEFAULT_EPOCHS: dict[tuple[str, str], int] = {
    ("split", "mnist"): 4,
    ("split", "digits"): 40,
    ("split", "fashion-mnist"): 4,
    ("permuted", "mnist"): 1,
    ("permuted", "digits"): 20,
    ("permuted", "fashion-mnist"): 1,
    ("rotated", "mnist"): 1,
    ("rotated", "digits"): 20,
    ("rotated", "fashion-mnist"): 1,
}
DEFAULT_BATCH_SIZE: dict[str, int] = {"mnist": 512, "digits": 128, "fashion-mnist": 512}
DEFAULT_LEARNING_RATE: dict[str, float] = {"mnist": 2e-3, "digits": 1e-3, "fashion-mnist": 2e-3}


@dataclass(frozen=True)
class Job:
    """Settings that every command that runs experiments has."""

    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had. Fashion-MNIST
    makes the same streams of other images."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw and FashionMNIST/raw. Unset: $EWC_DATA_ROOT, else the
    cache folder."""
    out: str | None = None
    """Folder of the tables and plots; runs found in it are not repeated. Unset: runs/COMMAND."""
    processes: Processes = os.cpu_count() or 1
    """Runs at the same time, each in a process with one torch thread."""
    force: bool = False
    """Repeat the runs that the output folder holds already."""
    mix_code: bool = False
    """Add runs to a folder whose runs were computed by other code than this."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..., or auto, a GPU where torch finds one."""
    data_path: DataPath = "fast"
    """Tensors made once and fed in batches, or Avalanche's per-sample transforms: same bits."""
    config: str | None = None
    """TOML file of settings by these names, lists where several span a grid; options on the command
    line count more."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers make the runs, instead of processes here."""
    checkpoint: bool = False
    """Store each run's state after every experience, so that a killed run goes on from there. Runs
    of si, mas, lwf, replay and ewc+replay say that they would start anew."""
    dry_run: bool = False
    """Print what would run, what exists already, and about how long it takes; run nothing."""
    quiet: bool = False
    """Print nothing but errors and runs that did not end well."""
    tensorboard: bool = False
    """Log the runs for TensorBoard, each in OUT/logs/RUN."""
    wandb: bool = False
    """Log the runs for Weights & Biases, offline, each in OUT/logs/RUN; `wandb sync` uploads."""

    def __post_init__(self) -> None:
        check_values(self)
        check_device(self.device)

    compares = True  # whether the report compares ours with Avalanche's EWC
    left_out = ""  # message about combinations of the grid that are skipped
    needs_images = True  # whether a run is on one of the datasets

    @property
    def own_files(self) -> tuple[OwnFile, ...]:
        """The files of the functions that stand for a benchmark, model or method."""
        return ()

    @property
    def name(self) -> str:
        """The subcommand's name, which is also the default output folder's."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """The folder of all results."""
        return Path(self.out or f"runs/{self.name}")

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The settings of every run."""
        raise NotImplementedError


def check_device(device: str) -> None:
    """Raise a `ValueError` unless torch computes on the device here, by that name."""
    try:
        found = torch.ones(1, device=device)
        found.add(1).cpu()  # which the device `meta` can't do
        if torch.device(device) not in (found.device, torch.device(found.device.type)):
            raise ValueError(f"it is {found.device} here")
    except Exception as error:  # each backend raises its own
        reason = shown((str(error).splitlines() or [type(error).__name__])[0])
        raise ValueError(
            f"`device` must be one that torch can use here, got {shown(device)!r} ({reason}); use "
            "cpu."
        ) from None


def fastest_device() -> str:
    """The device that `--device auto` stands for."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    return next((name for name, found in backends.items() if found.is_available()), "cpu")


def axis(*default: Any, setting: str = "") -> Any:
    """A field with a list of values that span a grid.

    Args:
        default: Its values where none are given. Without any, an empty list is allowed.
        setting: The field of `RunSettings` that each value goes to; "": the grid places it itself.
    """
    return field(default=default, metadata={"axis": True, "setting": setting})


@dataclass(frozen=True)
class Grid(Job):
    """One run for each combination of the values below; equal combinations are one run."""

    methods: tuple[Method, ...] = axis(*MAIN_METHODS)
    """naive (no regularisation), avalanche-ewc, ewc (ours), joint (all data at once, the upper
    bound); through Avalanche's plugins si, mas, lwf, replay, ewc+replay; l2, F = 1 in our penalty;
    FILE.py:FUNCTION, which returns a list of plugins. Also called --method."""
    fisher_type: tuple[FisherType, ...] = axis(FisherType.PREDICTED)
    """Labels that our Fisher averages over."""
    ewc_lambda: tuple[Lambda, ...] = axis()
    """Penalty strengths, each tried with every method that has one: Avalanche's `ewc_lambda`, SI's
    `si_lambda`, MAS's `lambda_reg`, LwF's `alpha`. Empty: those of `tuned`, else each EWC method's
    own, chosen on validation data; the others have none."""
    tuned: tuple[str, ...] = ()
    """Folders or files of `python -m experiments tune` that hold a lambda for every method and
    setting of this command that has one."""
    mode: tuple[Mode, ...] = axis("separate")
    """One quadratic per experience, or a single one that decays."""
    decay_factor: tuple[Decay, ...] = axis()
    """Decay of the old Fisher, online mode only; 1 is Huszar's corrected Laplace."""
    normalize: tuple[Literal["none", Normalize], ...] = axis("none")
    """What each Fisher of ours is divided by; needs its own ewc_lambda, such as 0.01 for mean."""
    penalty_step: tuple[Literal["gradient", "implicit"], ...] = axis("gradient")
    """Where our penalty acts: in the gradient, or as an implicit step after the optimizer's."""
    seeds: tuple[Seed, ...] = axis(0, 1, 2)
    """Each seeds the stream, the initial weights and the order of the samples."""
    experiences: tuple[Experiences, ...] = axis(5, setting="n_experiences")
    """Number of experiences (tasks) in the stream."""
    epochs: tuple[Epochs, ...] = axis(setting="epochs")
    """Passes over the data of each experience. Empty: 4 on split MNIST (at one, Naive has not
    forgotten yet), 1 on permuted MNIST, 40 and 20 on the digits."""
    batch_size: tuple[Count, ...] = axis(setting="batch_size")
    """Samples per training mini-batch. Empty: 512 on MNIST, 128 on the digits."""
    optimizer: tuple[Optimizer, ...] = axis("adam", setting="optimizer")
    """Optimizer; no weight decay, no momentum for sgd."""
    learning_rate: tuple[Positive, ...] = axis(setting="learning_rate")
    """Step size of the optimizer. Empty: 2e-3 on MNIST, 1e-3 on the digits."""
    optimizer_state: tuple[Literal["kept", "reset"], ...] = axis("kept", setting="optimizer_state")
    """Whether the optimizer's moments outlive an experience, as Avalanche has it."""
    model: tuple[Model, ...] = axis("mlp", setting="model")
    """mlp, fully connected, or cnn, small and convolutional; task-incremental gets a head per task.
    Or FILE.py:FUNCTION, which returns a module."""
    hidden_size: tuple[HiddenSize, ...] = axis(256, setting="hidden_size")
    """Units per hidden layer of the MLP."""
    hidden_layers: tuple[HiddenLayers, ...] = axis(1, setting="hidden_layers")
    """Hidden layers of the MLP."""
    head: tuple[Literal["linear", "cosine"], ...] = axis("linear", setting="head")
    """Last layer: linear, or 10 times the cosine of features and weights (domain, class)."""
    loss: tuple[Literal["all", "current"], ...] = axis("all", setting="loss_classes")
    """Cross-entropy, and the Fisher, over all classes or those of the experience. Counts in
    scenario class, and not for joint and replay, whose experiences have all classes."""
    memory: tuple[Count, ...] = axis(200)
    """Samples that replay and ewc+replay keep."""
    importance_batch: tuple[Count, ...] = axis()
    """Mini-batches that Avalanche's EWC, and batched Fisher types, take their importances from.
    Empty: as large as in training."""
    importance_order: tuple[Literal["dataset", "shuffled"], ...] = axis("dataset")
    """Order of the samples in them: the dataset's, by class, as Avalanche has it, or at random."""
    dropout: tuple[Dropout, ...] = axis(0.0, setting="dropout")
    """Dropout rate while training; the Fisher is always taken without."""
    pixels: tuple[Literal["normalized", "unit"], ...] = axis("normalized", setting="pixels")
    """By MNIST's mean and deviation, as Avalanche has it, or in [0, 1], as other papers do."""
    eval_every: Count = 1
    """Experiences between two evaluations on all of them; in between, the one just trained on is
    evaluated. Training is the same; metrics that need what is left out are empty."""
    validation: bool = False
    """Evaluate on the last sixth of the training images, which then is not trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.streams, "scenario", "one that the benchmark has", self.scenario)  # type: ignore[attr-defined]
        useless = self.decay_factor and "online" not in self.mode
        require(not useless, "decay_factor", "unset in mode separate", self.decay_factor)
        both = self.tuned and self.ewc_lambda
        require(not both, "ewc_lambda", "empty with `tuned`, which says it", self.ewc_lambda)
        have_lambda = any(method in WITH_LAMBDA for method in self.methods)
        if have_lambda and not (self.ewc_lambda or self.tuned):
            self._check_chosen_lambda()

    def _check_chosen_lambda(self) -> None:
        """The lambdas of `settings.tuned` were chosen for these settings alone."""
        for name, plain in _AS_CHOSEN.items():
            others = ", ".join(str(value) for value in getattr(self, name) if value != plain)
            rule = f"given with `{name}` {others}, or chosen by `python -m experiments tune`: the "
            rule += f"λ of the main job are for `{name}` {plain} alone"
            require(not others, "ewc_lambda", rule, "nothing")

    def own_lambda(self, run: RunSettings) -> float:
        """The lambda of a run where the command line gives none."""
        return self._tuned.lambda_of(run) if self.tuned else chosen_lambda(run)

    @functools.cached_property
    def _tuned(self) -> Tuned:
        return read_tuned(self.tuned)

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """The benchmarks and scenarios of the grid."""
        raise NotImplementedError

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """The settings of every run; each once, whatever combinations lead to it."""
        yield from {cell.run_id: cell for cell in self._combinations(dataset)}.values()

    def _combinations(self, dataset: Dataset) -> Iterator[RunSettings]:
        own = {name: self._own(name) for name in OWN}
        for seed, (benchmark, scenario) in product(self.seeds, self.streams):
            images = dataset if benchmark not in own["benchmark"] else "own"
            where_empty = {
                "epochs": DEFAULT_EPOCHS.get((benchmark, images), RunSettings.epochs),
                "batch_size": DEFAULT_BATCH_SIZE.get(images, RunSettings.batch_size),
                "learning_rate": DEFAULT_LEARNING_RATE.get(images, RunSettings.learning_rate),
            }
            placed = [one.name for one in _axes(self) if one.metadata["setting"]]
            names = [name for name in placed if name != "loss"]
            for settings in self._spanned(names, where_empty):
                settings |= {
                    "benchmark": benchmark,
                    "dataset": images,
                    "scenario": scenario,
                    "data_path": self.data_path,
                }
                if function := own["benchmark"].get(benchmark):
                    settings |= self._of_own_benchmark(function, settings["n_experiences"])
                if settings["model"] != "mlp":
                    settings |= _of_other_model(own["model"].get(settings["model"]))
                if settings["scenario"] == "task":
                    settings["head"] = None
                base = RunSettings(
                    method="naive",
                    seed=seed,
                    validation=self.validation,
                    eval_every=None if self.eval_every == 1 else self.eval_every,
                    device=self.device,
                    **settings,
                )
                for method in self.methods:
                    yield from self._of_method(base, method, own["method"].get(method))

    def _of_own_benchmark(self, function: OwnFunction, n_experiences: int) -> dict[str, Any]:
        """The settings that follow from what the function returns for the first seed."""
        n, scenario = size_and_scenario(function, self.seeds[0], n_experiences, self.validation)
        default = type(self).experiences
        if "n_experiences" not in function.parameters and self.experiences != default:
            raise function.error("have an argument `n_experiences`, since --experiences is set")
        return {
            **_named(function),
            "n_experiences": n,
            "scenario": scenario,
            "data_path": "classic",
        }

    def _of_method(
        self, base: RunSettings, method: Method, own: OwnFunction | None
    ) -> Iterator[RunSettings]:
        """The runs of a method, each with what it has a choice of; `base` is Naive's."""
        names = [n for n, methods in _CHOICES.items() if method in methods]
        fixed: dict[str, Any] = {"method": method}
        if own is not None:
            names, fixed = [n for n in _CHOICES if n in own.parameters], _named(own)
        if base.scenario == "class" and method not in WITH_ALL_CLASSES:
            names.append("loss")
        finds_lambda = "ewc_lambda" in names and not self.ewc_lambda
        for settings in self._spanned(names, {"ewc_lambda": 0.0, "importance_batch": None}):
            if own is None and not takes_mini_batches(method, settings.get("fisher_type")):
                settings |= {"importance_batch": None, "importance_order": None}
            decays = self.decay_factor if settings.get("mode") == "online" else ()
            for decay_factor in decays or (None,):
                run = replace(base, **fixed, **settings, decay_factor=decay_factor)
                yield replace(run, ewc_lambda=self.own_lambda(run)) if finds_lambda else run

    def _own(self, setting: str) -> dict[str, OwnFunction]:
        """The functions of the user's own that a setting names, by its values."""
        axis_name = "methods" if setting == "method" else setting
        values = getattr(self, axis_name, ())
        return {value: find_function(setting, value) for value in values if is_own(value)}

    @property
    def needs_images(self) -> bool:  # type: ignore[override]
        """Whether a benchmark is one of the names."""
        return not all(is_own(benchmark) for benchmark, _ in self.streams)

    @property
    def own_files(self) -> tuple[OwnFile, ...]:
        """The files of all own functions."""
        functions = [one for name in OWN for one in self._own(name).values()]
        return tuple(dict.fromkeys(one.file for one in functions))

    def _spanned(
        self, names: Iterable[str], where_empty: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Every combination of the axes' values, by the names that they have in `RunSettings`."""
        axes = {one.name: one for one in _axes(self)}
        spanned = {}
        for name in names:
            values = getattr(self, name) or (where_empty[name],)
            setting = axes[name].metadata["setting"] or name
            plain = map(_plain, values)
            spanned[setting] = [None if v == UNSET.get(setting) else v for v in plain]
        for values in product(*spanned.values()):
            yield dict(zip(spanned, values, strict=True))


def _named(function: OwnFunction) -> dict[str, str]:
    """The settings that name a function."""
    return {function.setting: function.name, f"{function.setting}_sha256": function.file.sha256}


def _of_other_model(function: OwnFunction | None) -> dict[str, Any]:
    """The settings of a model that is no MLP; an own one has those that it has arguments for."""
    if function is None:
        return _MLP_ONLY
    unused = [name for name in OPTIONS["model"] if name not in function.parameters]
    # The grid's defaults: labels then name them beside an MLP's only where that has others.
    return _named(function) | {name: getattr(Grid, name)[0] for name in unused}


def _axes(grid: Grid) -> list[Any]:
    """The fields of a grid that span it."""
    return [one for one in fields(grid) if one.metadata.get("axis")]


def _plain(value: Any) -> Any:
    """The string of an enum's member; any other value as it is."""
    return value.value if isinstance(value, FisherType) else value


_CHOICES: dict[str, tuple[Method, ...]] = {  # axes, and the methods that have them
    **dict.fromkeys(("fisher_type", "normalize", "penalty_step"), WITH_FISHER),
    "ewc_lambda": WITH_LAMBDA,
    "mode": WITH_MODE,
    "memory": WITH_MEMORY,
    **dict.fromkeys(("importance_batch", "importance_order"), ("avalanche-ewc", *WITH_FISHER)),
}
_AS_CHOSEN = {
    **{"normalize": "none", "penalty_step": "gradient", "head": "linear", "loss": "all"},
    **{"importance_batch": "those of training", "importance_order": "dataset"},
}
_MLP_ONLY = {name: getattr(RunSettings, name) for name in ("hidden_size", "hidden_layers")}


@dataclass(frozen=True)
class SplitMnist(Grid):
    """Split MNIST: the ten digits in experiences of equally many classes."""

    scenario: tuple[Scenario, ...] = axis("task")
    """Task labels and a head each (task), one head shared by all (domain), ten outputs (class)."""

    name = "split-mnist"

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """Split MNIST in each scenario."""
        return [("split", scenario) for scenario in self.scenario]


@dataclass(frozen=True)
class PermutedMnist(Grid):
    """Permuted MNIST: all ten digits in every experience, the pixels permuted anew in each."""

    scenario: tuple[Literal["task", "domain"], ...] = axis("domain")
    """Task labels and a head each (task), or one head shared by all (domain)."""

    name = "permuted-mnist"

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """Permuted MNIST in each scenario."""
        return [("permuted", scenario) for scenario in self.scenario]


@dataclass(frozen=True)
class Sweep(Grid):
    """A grid over any settings, on one benchmark or several."""

    benchmark: tuple[Benchmark, ...] = axis("permuted")
    """split has some of the digits in each experience; permuted and rotated have all, with the
    pixels permuted, or the images rotated by an angle of the seed's, anew in each. Or
    FILE.py:FUNCTION, which returns an Avalanche benchmark."""
    scenario: tuple[Scenario, ...] = axis()
    """As the benchmarks' own commands have it; only split MNIST has a class-incremental one. Empty:
    task-incremental split MNIST, domain-incremental permuted and rotated MNIST. A benchmark of
    yours has the scenario of its labels."""

    name = "sweep"

    @property
    def streams(self) -> list[tuple[Benchmark, Scenario]]:
        """Every benchmark in every scenario that it has; an own one's is known from its labels."""
        return [
            (benchmark, scenario)
            for benchmark in self.benchmark
            for scenario in self._scenarios(benchmark)
            if scenario != "class" or benchmark == "split"
        ]

    def _scenarios(self, benchmark: Benchmark) -> tuple[Scenario, ...]:
        own: tuple[Scenario, ...] = (OWN_SCENARIO.get(benchmark, "domain"),)
        return own if is_own(benchmark) else self.scenario or own

    @property
    def left_out(self) -> str:  # type: ignore[override]
        """Says so where a benchmark has no such scenario, or a tuned lambda is at an edge."""
        said = []
        without = [name for name in self.benchmark if not (name == "split" or is_own(name))]
        if without and "class" in self.scenario:
            names = " and ".join(without).capitalize()
            verbs = ("has", "it is") if len(without) == 1 else ("have", "they are")
            said += [
                f"{names} MNIST {verbs[0]} no class-incremental scenario; {verbs[1]} left out."
            ]
        if self.tuned and (arms := self._tuned.at_edge):
            said += [
                f"In {self._tuned.files} the λ of {', '.join(arms)} is the smallest or largest "
                "tried: a better one may lie beyond."
            ]
        return " ".join(said)


@dataclass(frozen=True)
class Main(Job):
    """The main job: split MNIST (task-incremental) and permuted MNIST, all methods."""

    seeds: tuple[Seed, ...] = axis(0, 1, 2, 3, 4)
    """Each seeds the stream, the initial weights and the order of the samples."""
    tuned: tuple[str, ...] = ()
    """Folders or files of `python -m experiments tune`, instead of the lambdas chosen once."""

    name = "main"

    def cells(self, dataset: Dataset) -> Iterator[RunSettings]:
        """Both benchmarks with the settings of their own commands."""
        for grid in (SplitMnist, PermutedMnist):
            options: dict[str, Any] = {"seeds": self.seeds, "tuned": self.tuned}
            settings = grid(**options, device=self.device, data_path=self.data_path)
            yield from settings.cells(dataset)

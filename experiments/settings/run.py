"""The settings of one run, and their checks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from ewc_plugin.fisher.scores import BATCHED, FisherType
from experiments.settings.values import (
    Between,
    Count,
    Lambda,
    NameOrFile,
    OneOf,
    Positive,
    Seed,
    check_values,
    is_own,
)

Benchmark = Annotated[str, NameOrFile(("split", "permuted", "rotated"))]
Scenario = Literal["task", "domain", "class"]
METHODS = (
    *("naive", "avalanche-ewc", "ewc", "joint"),
    *("si", "mas", "lwf", "l2", "replay", "ewc+replay"),
)
Method = Annotated[str, NameOrFile(METHODS)]
Dataset = Literal["mnist", "digits", "fashion-mnist"]
AnyDataset = Literal["mnist", "digits", "fashion-mnist", "own"]  # that of an own benchmark
Model = Annotated[str, NameOrFile(("mlp", "cnn"))]
Optimizer = Literal["adam", "sgd"]
DataPath = Literal["fast", "classic"]
FisherName = Annotated[str, OneOf(FisherType)]
Mode = Literal["separate", "online"]
Normalize = Literal["mean", "trace", "max", "avalanche"]

Experiences = Annotated[int, Between(1, 1000)]
Epochs = Annotated[int, Between(1, 100_000)]
HiddenSize = Annotated[int, Between(1, 65_536)]
HiddenLayers = Annotated[int, Between(1, 100)]
Dropout = Annotated[float, Between(0, 1, open_high=True)]
Decay = Annotated[float, Between(0, 1)]

N_CLASSES = 10
MAIN_METHODS: tuple[Method, ...] = ("naive", "avalanche-ewc", "ewc", "joint")
PENALISED: tuple[Method, ...] = ("avalanche-ewc", "ewc")
WITH_FISHER: tuple[Method, ...] = ("ewc", "ewc+replay")
WITH_MODE: tuple[Method, ...] = ("avalanche-ewc", *WITH_FISHER, "l2")
WITH_LAMBDA: tuple[Method, ...] = (*WITH_MODE, "si", "mas", "lwf")
WITH_MEMORY: tuple[Method, ...] = ("replay", "ewc+replay")
WITH_ALL_CLASSES: tuple[Method, ...] = ("joint", *WITH_MEMORY)  # in every experience
STREAM = ("benchmark", "dataset", "scenario")  # the settings that name a stream


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what one run computes; the same settings give the same rows."""

    benchmark: Benchmark
    dataset: AnyDataset
    scenario: Scenario
    method: Method
    seed: Seed
    fisher_type: FisherName | None = None  # None where the method has no choice of it
    ewc_lambda: Lambda | None = None  # None where the method has no penalty
    mode: Mode | None = None
    decay_factor: Decay | None = None
    n_experiences: Experiences = 5
    epochs: Epochs = 1
    batch_size: Count = 128
    optimizer: Optimizer = "adam"
    learning_rate: Positive = 1e-3
    model: Model = "mlp"
    hidden_size: HiddenSize = 256
    hidden_layers: HiddenLayers = 2
    dropout: Dropout = 0.0
    validation: bool = False
    data_path: DataPath = "fast"
    device: str = "cpu"
    normalize: Normalize | None = None  # our EWC alone: what F is divided by
    penalty_step: Literal["implicit"] | None = None  # our EWC alone; unset, in the gradient
    iterations: Count | None = None  # of training per experience, instead of `epochs`
    # Mini-batches of Avalanche's definition of F alone; unset, those of training, in class order.
    importance_batch: Count | None = None
    importance_order: Literal["shuffled"] | None = None
    optimizer_state: Literal["reset"] | None = None  # before each experience; unset, it is kept
    pixels: Literal["unit"] | None = None  # in [0, 1]; unset, normalised as Avalanche has them
    loss_classes: Literal["current"] | None = None  # the experience's own; unset, all
    head: Literal["cosine"] | None = None  # unset, a linear layer
    memory: Count | None = None  # samples that replay keeps
    eval_every: Count | None = None  # experiences between evaluations on all; unset, 1
    # Of the files of own functions, FILE.py:FUNCTION without folders; unset for names.
    benchmark_sha256: str | None = None
    model_sha256: str | None = None
    method_sha256: str | None = None

    def __post_init__(self) -> None:
        check_values(self)
        _check_together(self)

    @property
    def config_hash(self) -> str:
        """Ten hex digits of everything but the seed: the cell that the seeds repeat."""
        return hash_of(asdict(self))

    @property
    def run_id(self) -> str:
        """Return the run's name: a readable prefix and a unique hash."""
        names = map(in_file_name, (self.benchmark, self.dataset, self.scenario, self.method))
        return f"{'-'.join(names)}-{self.config_hash}-s{self.seed}"

    @property
    def stream(self) -> RunSettings:
        """Return the settings that determine the stream; runs with equal ones share it."""
        return RunSettings(
            self.benchmark,
            self.dataset,
            self.scenario,
            "naive",
            # The classes are split in the same order whatever the seed.
            0 if self.benchmark == "split" else self.seed,
            n_experiences=self.n_experiences,
            validation=self.validation,
            pixels=self.pixels,
            data_path="classic" if self.benchmark_sha256 else "fast",
            benchmark_sha256=self.benchmark_sha256,
        )

    def evaluated_after(self, train_exp: int) -> range:
        """The experiences that are evaluated after training on one; -1: before any.

        All of them after every `eval_every`, before the first and after the last; else the one that
        was just trained on.
        """
        every = self.eval_every or 1
        is_last = train_exp == self.n_experiences - 1
        if (train_exp + 1) % every == 0 or is_last:
            return range(self.n_experiences)
        return range(train_exp, train_exp + 1)


OWN = ("benchmark", "model", "method")  # settings that may name a function in a file
FLOATS = ("ewc_lambda", "decay_factor", "learning_rate", "dropout")


def hash_of(values: Mapping[str, Any]) -> str:
    """Ten hex digits of the settings of a run but its seed.

    What is unset does not count, so that a new optional setting leaves old ids as they are.
    """
    settings = {k: v for k, v in values.items() if v is not None and k != "seed"}
    settings |= {k: float(settings[k]) for k in FLOATS if k in settings}  # 10 is 10.0
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def takes_mini_batches(method: Method, fisher_type: FisherName | None) -> bool:
    """Whether a method's importances are of mini-batches, whose size and order then count."""
    return method == "avalanche-ewc" or fisher_type in BATCHED


def in_file_name(name: str) -> str:
    """The name of a benchmark or method, such as `my file.py:plugins`, for the name of a file."""
    return re.sub(r"[^A-Za-z0-9+]+", "-", name.replace(".py:", "-"))[:40] if is_own(name) else name


def require(condition: object, name: str, rule: str, value: Any) -> None:
    """Raise a `ValueError` that names a setting, what it must be, and its value."""
    if not condition:
        raise ValueError(f"`{name}` must be {rule}, got {value}.")


def _check_together(run: RunSettings) -> None:
    """Check what depends on several settings."""
    for name in OWN:
        _check_own(name, getattr(run, name), getattr(run, f"{name}_sha256"))
    if is_own(run.benchmark):
        require(run.dataset == "own", "dataset", "own on an own benchmark", run.dataset)
        rule = "classic on an own benchmark, whose samples are Avalanche's"
        require(run.data_path == "classic", "data_path", rule, run.data_path)
        require(run.pixels is None, "pixels", "normalized on an own benchmark", run.pixels)
    else:
        require(run.dataset != "own", "dataset", f"images for {run.benchmark}", run.dataset)
    if is_own(run.model):
        require(run.head is None, "head", "linear with an own model", run.head)
    if run.benchmark == "split":
        rule = f"a divisor of {N_CLASSES} classes: 1, 2, 5 or 10"
        require(N_CLASSES % run.n_experiences == 0, "experiences", rule, run.n_experiences)
    _check_method(run)
    if run.loss_classes == "current":
        rule = "all outside of scenario class: the classes of every experience are the same there"
        require(run.scenario == "class", "loss_classes", rule, run.loss_classes)
        rule = f"all for {run.method}, which trains on the classes of several experiences at once"
        require(run.method not in WITH_ALL_CLASSES, "loss_classes", rule, run.loss_classes)
    if run.head == "cosine":
        rule = "linear in scenario task, where Avalanche makes the heads"
        require(run.scenario != "task", "head", rule, run.head)
    for name in ("importance_batch", "importance_order"):
        value = getattr(run, name)
        if value is not None:
            batched = takes_mini_batches(run.method, run.fisher_type)
            require(batched, name, "unset where F does not depend on mini-batches", value)
            require(run.data_path == "fast", "data_path", f"fast with `{name}`", run.data_path)


def _check_own(name: str, value: str, sha256: str | None) -> None:
    """Check that a file has a hash and no folders, and that a name has neither."""
    if is_own(value):
        require(not re.search(r"[/\\]", value), name, "a file without folders", value)
        is_hash = re.fullmatch("[0-9a-f]{64}", sha256 or "")
        require(is_hash, f"{name}_sha256", f"that of {value}, 64 hexadecimal digits", sha256)
    else:
        require(sha256 is None, f"{name}_sha256", f"unset for {value}", sha256)


def _check_method(run: RunSettings) -> None:
    """Check that a method has what it needs, and nothing that it would not look at."""
    if run.method in WITH_LAMBDA:
        require(run.ewc_lambda is not None, "ewc_lambda", f"given for {run.method}", "none")
    if run.method in WITH_MODE:
        rule = f"one of {', '.join(get_args(Mode))} for {run.method}"
        require(run.mode is not None, "mode", rule, "none")
    if run.method in WITH_FISHER:
        rule = f"one of {OneOf(FisherType)} for {run.method}"
        require(run.fisher_type, "fisher_type", rule, "none")
    if run.mode == "online":
        rule = "between 0 and 1 in mode online"
        require(run.decay_factor is not None, "decay_factor", rule, run.decay_factor)
    else:
        rule = "unset in mode separate"
        require(run.decay_factor is None, "decay_factor", rule, run.decay_factor)
    if is_own(run.method):  # its function may have an argument for it, or none
        return
    has_memory = run.method in WITH_MEMORY
    rule = f"{'given' if has_memory else 'unset'} for {run.method}"
    require((run.memory is not None) == has_memory, "memory", rule, run.memory)

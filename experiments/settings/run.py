"""The settings of one run, and their checks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from ewc_plugin.fisher.scores import FisherType
from experiments.settings.values import (
    Between,
    Count,
    Lambda,
    OneOf,
    Positive,
    Seed,
    check_values,
)

Benchmark = Literal["split", "permuted"]
Scenario = Literal["task", "domain", "class"]
Method = Literal["naive", "avalanche-ewc", "ewc", "joint"]
Dataset = Literal["mnist", "digits"]
Model = Literal["mlp", "cnn"]
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
PENALISED: tuple[Method, ...] = ("avalanche-ewc", "ewc")
STREAM = ("benchmark", "dataset", "scenario")  # the settings that name a stream


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what one run computes; the same settings give the same rows."""

    benchmark: Benchmark
    dataset: Dataset
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

    def __post_init__(self) -> None:
        check_values(self)
        _check_together(self)

    @property
    def config_hash(self) -> str:
        """Ten hex digits of everything but the seed: the cell that the seeds repeat.

        What is unset does not count, so that a new optional setting leaves old ids as they are.
        """
        settings = {k: v for k, v in asdict(self).items() if v is not None and k != "seed"}
        settings |= {k: float(settings[k]) for k in FLOATS if k in settings}  # 10 is 10.0
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


FLOATS = ("ewc_lambda", "decay_factor", "learning_rate", "dropout")


def require(condition: object, name: str, rule: str, value: Any) -> None:
    """Raise a `ValueError` that names a setting, what it must be, and its value."""
    if not condition:
        raise ValueError(f"`{name}` must be {rule}, got {value}.")


def _check_together(run: RunSettings) -> None:
    """Check what depends on several settings."""
    if run.benchmark == "split":
        rule = f"a divisor of {N_CLASSES} classes: 1, 2, 5 or 10"
        require(N_CLASSES % run.n_experiences == 0, "experiences", rule, run.n_experiences)
    if run.method in PENALISED:
        require(run.ewc_lambda is not None, "ewc_lambda", f"given for {run.method}", "none")
        rule = f"one of {', '.join(get_args(Mode))} for {run.method}"
        require(run.mode is not None, "mode", rule, "none")
    if run.method == "ewc":
        require(run.fisher_type, "fisher_type", f"one of {OneOf(FisherType)} for ewc", "none")
    if run.mode == "online":
        rule = "between 0 and 1 in mode online"
        require(run.decay_factor is not None, "decay_factor", rule, run.decay_factor)
    else:
        rule = "unset in mode separate"
        require(run.decay_factor is None, "decay_factor", rule, run.decay_factor)
    for name in ("importance_batch", "importance_order"):
        value = getattr(run, name)
        if value is not None:
            batched = run.method == "avalanche-ewc" or run.fisher_type == "batched"
            require(batched, name, "unset where F is exact per sample", value)
            require(run.data_path == "fast", "data_path", f"fast with `{name}`", run.data_path)

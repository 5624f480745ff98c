"""The settings of one run, and their checks."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

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

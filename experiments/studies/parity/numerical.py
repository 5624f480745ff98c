"""The numerical half of the parity study: which whole runs are compared, and single networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from avalanche.models import avalanche_forward
from torch import Tensor, nn

from ewc_plugin import diagonal_fisher
from experiments.data.sources import DataSource, find_data
from experiments.data.tensor_path import TensorRows
from experiments.settings.run import RunSettings
from experiments.studies.parity.importances import (
    FLOAT64_TOLERANCE,
    check_row,
    trained_network,
)
from experiments.studies.parity.whole_runs import same_definition, same_mathematics

Rows = Callable[[], Iterator[dict[str, Any]]]
N_LOOP = 300  # samples that the loop goes through
FLOAT32_TOLERANCE = 1e-4
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.05}
GENTLE: dict[str, Any] = {**SGD, "ewc_lambda": 10.0}  # at 100, permuted MNIST diverges
ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 1e-3, "dropout": 0.2}
SEPARATE: dict[str, Any] = {"mode": "separate"}
ONLINE: dict[str, Any] = {"mode": "online", "decay_factor": 0.9}
# Every mode with every optimizer on one head or several; what two cores have time for.
RUNS = (
    ("split", "task", SEPARATE, SGD, ("float32", "float64")),
    ("split", "task", SEPARATE, ADAM, ("float32",)),
    ("split", "task", ONLINE, ADAM, ("float32",)),
    ("split", "domain", SEPARATE, ADAM, ("float32", "float64")),
    ("split", "domain", ONLINE, SGD, ("float32",)),
    ("permuted", "domain", SEPARATE, ADAM, ("float32",)),
    ("permuted", "domain", ONLINE, GENTLE, ("float32",)),
    ("permuted", "task", ONLINE, ADAM, ("float32",)),
)
BATCH = {"split": 256, "permuted": 512}


def checks(source: DataSource, *, hidden_size: int, seed: int) -> dict[str, Rows]:
    """Every check by a name of its own, so that those that are done can be kept.

    Args:
        source: Where the images are.
        hidden_size: Units in each of two hidden layers.
        seed: Of all runs.

    Returns:
        What makes the rows of each.
    """
    found: dict[str, Rows] = {}
    for benchmark, scenario, mode, optimizer, dtypes in RUNS:
        run = RunSettings(
            benchmark,  # type: ignore[arg-type]
            source.name,  # type: ignore[arg-type]
            scenario,  # type: ignore[arg-type]
            "ewc",
            seed,
            fisher_type="batched",
            batch_size=BATCH[benchmark] if source.name != "digits" else 32,
            hidden_size=hidden_size,
            **{"ewc_lambda": 100.0, **mode, **optimizer},
        )
        for dtype in dtypes:
            name = f"{benchmark}-{scenario}-{run.mode}-{run.optimizer}"
            name = name if dtype == "float32" else f"{name}-{dtype}"
            found[name] = functools.partial(same_definition, run, source, double=dtype == "float64")
    found |= _empirical(seed)
    looked_at = RunSettings("split", source.name, "domain", "naive", seed, hidden_size=64)  # type: ignore[arg-type]
    found["loop"] = functools.partial(beside_a_sample_loop, looked_at, source)
    return found


def _empirical(seed: int) -> dict[str, Rows]:
    digits = find_data("digits", None)
    fields = {"fisher_type": "empirical", "mode": "separate", "epochs": 3}
    found: dict[str, Rows] = {}
    for optimizer, ewc_lambda in (("adam", 100.0), ("sgd", 1.0)):  # more, and SGD is not stable
        run = RunSettings(
            *("split", "digits", "domain", "ewc"),
            seed,
            **fields,  # type: ignore[arg-type]
            ewc_lambda=ewc_lambda,
            batch_size=32,
            hidden_size=24,
            optimizer=optimizer,  # type: ignore[arg-type]
            learning_rate=1e-3 if optimizer == "adam" else 0.05,
        )
        for double in (True, False):
            name = f"empirical-{optimizer}-{'float64' if double else 'float32'}"
            found[name] = functools.partial(same_mathematics, run, digits, double=double)
    return found


def beside_a_sample_loop(run: RunSettings, source: DataSource) -> Iterator[dict[str, Any]]:
    """PREDICTED beside a plain loop over samples; beside EMPIRICAL where every prediction is right.

    Args:
        run: Of the network that is looked at, after its first experience.
        source: Where the images are.

    Yields:
        Rows of `checks.csv`.
    """
    model, rows = trained_network(run, source)
    model.eval()
    some = rows.part(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
    x, y, task = some[: 4 * N_LOOP]
    check = functools.partial(
        check_row, replace(run, fisher_type="predicted"), what="importances", size_of="samples"
    )
    for dtype, tolerance in (
        (torch.float32, FLOAT32_TOLERANCE),
        (torch.float64, FLOAT64_TOLERANCE),
    ):
        model.to(dtype)
        inputs = x.to(dtype)
        looped = _loop(model, inputs[:N_LOOP], task[:N_LOOP])
        batch = TensorRows(inputs[:N_LOOP], y[:N_LOOP], task[:N_LOOP])
        both = _fisher(model, batch, "predicted"), looped
        yield check(against="sample loop", tensors=both, size=N_LOOP, tolerance=tolerance)
    with torch.no_grad():
        right = avalanche_forward(model, inputs, task).argmax(1) == y
    batch = TensorRows(inputs[right], y[right], task[right])
    yield check(
        against="empirical, where every prediction is right",
        tensors=(_fisher(model, batch, "predicted"), _fisher(model, batch, "empirical")),
        size=int(right.sum()),
        tolerance=0.0,
    )


def _fisher(model: nn.Module, rows: TensorRows, fisher_type: str) -> dict[str, Tensor]:
    return diagonal_fisher(
        model,
        list(rows.batches(256)),
        fisher_type,
        forward=lambda m, batch: avalanche_forward(m, batch[0], batch[2]),
    )


def _loop(model: nn.Module, x: Tensor, task: Tensor) -> dict[str, Tensor]:
    """One sample at a time: the squared gradient of log p of the likeliest label, averaged."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(x)):
        log_p = avalanche_forward(model, x[i : i + 1], task[i : i + 1]).log_softmax(1)[0]
        grads = torch.autograd.grad(log_p[log_p.argmax()], list(parameters.values()))
        for s, grad in zip(sums.values(), grads, strict=True):
            s += grad.square()
    return {name: s / len(x) for name, s in sums.items()}

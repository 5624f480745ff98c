"""Importances of Avalanche's EWC beside ours where the definitions agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from avalanche.models import avalanche_forward
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EWCPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from ewc_plugin import diagonal_fisher
from experiments.data.sources import DataSource
from experiments.data.streams import shared_stream
from experiments.data.tensor_path import FastData, TensorRows, experience_rows
from experiments.results.schemas import CHECKS
from experiments.settings.run import RunSettings
from experiments.settings.unset import UNSET, used
from experiments.training.networks import make_model

N_BATCHED, N_SINGLE = 2000, 200  # samples that are compared
FLOAT64_TOLERANCE = 1e-12  # of importances, relative to the largest, beside `softmax_rounding`
Tensors = dict[str, Tensor]


def numerical_checks(cell: RunSettings, source: DataSource) -> Iterator[dict[str, Any]]:
    """Importances of Avalanche's EWC beside ours, on a network trained on the first experience.

    Avalanche's squares the gradient of a mini-batch's mean loss. `batched` is that definition; at
    batch size 1 it is the empirical Fisher; at batch size 1 on the model's own predictions as
    labels it is the Fisher from predicted labels.
    """
    model, rows = trained_network(cell, source)
    some = rows.part(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
    batched = some.part(slice(0, N_BATCHED))
    yield _compare(cell, "batched", model, batched, cell.batch_size, tolerance=0.0)
    with float64_by_default():
        model = model.double()
        x, y, task = some[:N_SINGLE]
        single = TensorRows(x.double(), y, task)
        logits = _logits(model, single)
        for fisher_type, labels in (("empirical", y), ("predicted", logits.argmax(dim=1))):
            samples = TensorRows(single.x, labels, task)
            tolerance = FLOAT64_TOLERANCE + softmax_rounding(logits, labels)
            yield _compare(cell, fisher_type, model, samples, 1, tolerance=tolerance)


def trained_network(cell: RunSettings, source: DataSource) -> tuple[nn.Module, TensorRows]:
    """A network after one epoch on (part of) the first experience, and that experience."""
    stream = shared_stream(cell, source)
    RNGManager.set_random_seeds(cell.seed)
    model = make_model(cell, stream)
    experience = stream.benchmark.train_stream[0]
    rows = experience_rows(stream, experience)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=cell.learning_rate),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=cell.batch_size,
        plugins=[FastData(stream)],
        evaluator=None,
    )
    strategy.train(experience, eval_streams=[])
    return model, rows


def _compare(
    cell: RunSettings,
    fisher_type: str,
    model: nn.Module,
    rows: TensorRows,
    batch_size: int,
    *,
    tolerance: float,
) -> dict[str, Any]:
    """Largest difference between the two importances, relative to Avalanche's largest."""
    builtin = EWCPlugin(1.0).compute_importances(
        model, nn.CrossEntropyLoss(), _no_optimizer(model), rows, torch.device("cpu"), batch_size
    )
    ours = diagonal_fisher(
        model,
        list(rows.batches(batch_size)),
        fisher_type,
        forward=lambda m, batch: avalanche_forward(m, batch[0], batch[2]),
    )
    theirs = {name: builtin[name].data for name in ours}
    return check_row(
        replace(cell, fisher_type=fisher_type, importance_batch=None, importance_order=None),
        what="importances",
        against="avalanche-ewc",
        importance_batch=batch_size,
        tensors=(ours, theirs),
        size=len(rows),
        size_of="samples",
        tolerance=tolerance,
    )


def check_row(
    run: RunSettings,
    *,
    what: str,
    against: str,
    size: int,
    size_of: str,
    tolerance: float | None,
    scope: str = "one network",
    penalty: str | None = None,
    dtype: str = "",
    tensors: tuple[Tensors, Tensors] | None = None,
    error: float | None = None,
    sums: tuple[float | None, float | None] = (None, None),
    importance_batch: int | None = None,
) -> dict[str, Any]:
    """A row of `checks.csv`; without a tolerance it is a measurement, not a verdict.

    Args:
        run: Settings of the network or the run that is looked at.
        what: Is compared.
        against: Whose values ours are compared with.
        size: How many samples, steps, experiences or weights were compared.
        size_of: Which of them.
        tolerance: Of the error.
        scope: "one network" or "whole run".
        penalty: How it was summed, if there is one.
        dtype: Of the numbers; empty: that of `tensors`.
        tensors: Ours and theirs, which give the error and the sums.
        error: The largest relative error, without `tensors`.
        sums: Of ours and theirs, without `tensors`.
        importance_batch: Mini-batch of Avalanche's importances, if not the run's own.

    Returns:
        The row.
    """
    if tensors is not None:
        ours, theirs = tensors
        sums = (total(ours), total(theirs))
        error = largest(ours, theirs) if error is None else error
        dtype = dtype or str(next(iter(theirs.values())).dtype).removeprefix("torch.")
    assert error is not None
    verdict = "measured"
    if tolerance is not None:
        verdict = "equal" if error <= tolerance else "different"
    method = "ewc" if scope == "whole run" else "naive"  # whatever method `run` has
    settings = used({**asdict(run), "method": method})
    if importance_batch:
        order = run.importance_order or UNSET["importance_order"]
        settings |= {"importance_batch": importance_batch, "importance_order": order}
    return {
        **{name: value for name, value in settings.items() if name in CHECKS.columns},
        "scope": scope,
        "what": what,
        "penalty": penalty,
        "against": against,
        "dtype": dtype,
        "size": size,
        "size_of": size_of,
        "ours": sums[0],
        "other": sums[1],
        "largest_relative_error": error,
        "tolerance": tolerance,
        "verdict": verdict,
    }


def largest(a: Tensors, b: Tensors) -> float:
    """Largest difference of any entry, relative to the largest entry of `b`; absent is zero."""
    scale = max(float(t.abs().max()) for t in b.values())
    zero = torch.zeros(())
    differences = [
        float((a.get(name, zero) - b.get(name, zero)).abs().max()) for name in a.keys() | b.keys()
    ]
    return max(differences) / scale


def total(tensors: Tensors) -> float:
    """Sum of all entries."""
    return sum(float(t.sum(dtype=torch.float64)) for t in tensors.values())


def _no_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Avalanche's EWC only calls its `zero_grad`."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


@torch.no_grad()
def _logits(model: nn.Module, rows: TensorRows) -> Tensor:
    x, _, task = rows[:]
    model.eval()
    logits: Tensor = avalanche_forward(model, x, task)
    return logits


def softmax_rounding(logits: Tensor, y: Tensor) -> float:
    """How far rounding may move importances that are made from p - 1, as autograd has it.

    There p is the exponential of a difference of numbers as large as the logits z, so p - 1 has an
    error of about eps (1 + |z|), however small it is. Relative to the sum of its squares over the
    samples, F's error is 2 sum (1 - p) eps (1 + |z|) / sum (1 - p)^2. Ours add up the other
    classes' p instead, which does not cancel.

    Args:
        logits: [N, C].
        y: Labels [N].

    Returns:
        The relative error.
    """
    missing = logits.softmax(1).scatter(1, y[:, None], 0.0).sum(1)  # 1 - p, to all digits
    rounding = torch.finfo(logits.dtype).eps * (1 + logits.abs().amax(1))
    return 2 * float((missing * rounding).sum() / missing.square().sum())


@contextmanager
def float64_by_default() -> Iterator[None]:
    """PyTorch's default dtype meanwhile: Avalanche's multi-head allocates its output in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

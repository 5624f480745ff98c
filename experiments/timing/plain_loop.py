"""EWC on permuted MNIST in a plain PyTorch loop: what a run through Avalanche is timed beside.

The same batches in the same order, the same Fisher, the same penalty and the same evaluations, so
that the accuracies are those of `experiments.training.run`; nothing of Avalanche's is called in
the loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from ewc_plugin import QuadraticPenalty, diagonal_fisher
from experiments.data.sources import DataSource
from experiments.data.streams import make_stream
from experiments.data.tensor_path import FISHER_BATCH, TensorRows, experience_rows
from experiments.settings.run import RunSettings
from experiments.training.networks import make_model
from experiments.training.run import EVAL_BATCH

Accuracies = list[list[float]]  # a row per evaluation, the untrained model's first


@dataclass(frozen=True)
class Timed:
    """Time and accuracies of one run.

    Attributes:
        seconds: Of training, Fisher and evaluation; the data were there already.
        accuracies: R with the untrained row first, T + 1 by T.
    """

    seconds: float
    accuracies: Accuracies


def run_plainly(cell: RunSettings, source: DataSource) -> Timed:
    """Make our EWC's run of a single-head benchmark with Adam, on the CPU.

    Args:
        cell: Of method "ewc", scenario "domain", mode "separate".
        source: Where the images are.

    Returns:
        Its time and accuracies.
    """
    stream = make_stream(cell, source)
    train, test = (
        [experience_rows(stream, experience) for experience in part]
        for part in (stream.benchmark.train_stream, stream.benchmark.test_stream)
    )
    assert cell.ewc_lambda is not None and cell.fisher_type is not None
    torch.manual_seed(cell.seed)
    model = make_model(cell, stream)
    optimizer = torch.optim.Adam(model.parameters(), lr=cell.learning_rate)
    penalty = QuadraticPenalty()
    start = time.perf_counter()
    accuracies = [_evaluate(model, test)]
    for rows in train:
        model.train()
        for _ in range(cell.epochs):
            _epoch(model, optimizer, rows, penalty, cell)
        batches = ((x, y) for x, y, _ in rows.batches(FISHER_BATCH))
        penalty.consolidate(model, diagonal_fisher(model, batches, cell.fisher_type))
        accuracies.append(_evaluate(model, test))
    return Timed(time.perf_counter() - start, accuracies)


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: TensorRows,
    penalty: QuadraticPenalty,
    cell: RunSettings,
) -> None:
    assert cell.ewc_lambda is not None
    loader = DataLoader(
        rows, batch_size=cell.batch_size, shuffle=True, collate_fn=TensorRows.collate_fn
    )
    for x, y, _ in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if penalty.n_experiences:
            penalty.add_gradient_(model, cell.ewc_lambda)
        optimizer.step()


@torch.no_grad()
def _evaluate(model: nn.Module, test: Sequence[TensorRows]) -> list[float]:
    """Accuracy and, unused, the loss of every experience: what Avalanche's metrics compute."""
    model.eval()
    accuracies = []
    for rows in test:
        correct, loss = 0, 0.0
        loader = DataLoader(rows, batch_size=EVAL_BATCH, collate_fn=TensorRows.collate_fn)
        for x, y, _ in loader:
            logits = model(x)
            correct += int((logits.argmax(1) == y).sum())
            loss += float(nn.functional.cross_entropy(logits, y)) * len(y)
        accuracies.append(correct / len(rows))
    return accuracies

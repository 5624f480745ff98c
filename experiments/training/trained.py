"""Train a network by one run; return it with its data, to compute Fishers on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from avalanche.models import avalanche_forward
from torch import Tensor, nn

from ewc_plugin import FisherType, diagonal_fisher
from experiments.data.sources import DataSource
from experiments.data.streams import shared_stream
from experiments.data.tensor_path import experience_rows
from experiments.settings.run import RunSettings
from experiments.training.run import Run


@dataclass(frozen=True)
class Trained:
    """A network and its training data.

    Attributes:
        model: As it was after the last experience.
        experiences: The samples (x [N, 1, H, W], y [N], task label [N]) of each.
        accuracy: On the test images, the mean over the experiences.
    """

    model: nn.Module
    experiences: list[Any]
    accuracy: float

    def fisher(
        self, experience: int, fisher_type: FisherType | str, *, batch_size: int = 1024
    ) -> dict[str, Tensor]:
        """The diagonal Fisher of the network on one of its experiences."""
        batches = self.experiences[experience].batches(batch_size)
        return diagonal_fisher(self.model, batches, fisher_type, forward=task_logits)


def train(settings: RunSettings, source: DataSource) -> Trained:
    """Make the run that the settings describe.

    Args:
        settings: Of the run.
        source: Where the images are.

    Returns:
        The network and its data.
    """
    current = Run(settings, source)
    current.run(lambda done, accuracy: None)
    stream = shared_stream(settings, source)
    rows = [experience_rows(stream, e) for e in stream.benchmark.train_stream]
    accuracy = pd.DataFrame(current.rows)
    last = accuracy[accuracy["train_exp"] == settings.n_experiences - 1]
    return Trained(current.model, rows, float(last["accuracy"].mean()) if len(last) else math.nan)


def task_logits(model: nn.Module, batch: Any) -> Tensor:
    """The logits of a batch (x, y, task label)."""
    logits: Tensor = avalanche_forward(model, batch[0], batch[2])
    return logits

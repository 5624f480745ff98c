"""The adapter between Avalanche's training loop and the maths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from avalanche.models import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ewc_plugin.fisher import diagonal_fisher
from ewc_plugin.penalty import Mode, QuadraticPenalty
from ewc_plugin.scores import FisherType

Batch = Any  # what a data loader yields: (x, y), (x, y, task labels) or another pytree


class DiagonalEWCPlugin(SupervisedPlugin):
    """Adds ewc_lambda * sum_t F_t (theta - theta*_t)^2 to the loss of every later experience.

    F is exact per sample: see `diagonal_fisher`. With ewc_lambda = 0, and before the first
    experience has ended, the run is the one without the plugin, to the last bit.

    Args:
        ewc_lambda: Weight of the penalty; Avalanche's, half of the lambda of Kirkpatrick et al. A
            value means little without its `fisher_type`: F differs by orders of magnitude.
        mode: "separate" or "online", as `QuadraticPenalty` has them.
        decay_factor: Weight of the past in "online".
        keep_importance_data: Keep every experience's F and theta* as well.
        fisher_type: Which labels F is the Fisher of.
        fisher_batches: Called with the strategy at the end of an experience, gives its batches
            (x, y) or (x, y, task labels) on the model's device. Default: the experience's own
            data, not shuffled, with its eval transforms; data that other plugins mixed in, such as
            a replay buffer, is not in it.

    Raises:
        ValueError: An argument is out of its range.

    Attributes:
        penalty: The `QuadraticPenalty`.
        fisher: F of the last experience, by parameter name.
        fisher_seconds: Spent on F so far.

    Source: Kirkpatrick et al. 2017.
    """

    def __init__(
        self,
        ewc_lambda: float,
        mode: Mode | str = Mode.SEPARATE,
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        *,
        fisher_type: FisherType | str = FisherType.PREDICTED,
        fisher_batches: Callable[[Any], Iterable[Batch]] | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(ewc_lambda) and ewc_lambda >= 0):
            raise ValueError(f"`ewc_lambda` must be finite and >= 0, got {ewc_lambda}.")
        self.ewc_lambda = ewc_lambda
        self.penalty = QuadraticPenalty(mode, decay_factor)
        self.fisher_type = FisherType.parse(fisher_type)
        self.fisher_batches = fisher_batches or experience_batches
        self.fisher: dict[str, Tensor] = {}
        self.fisher_seconds = 0.0

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Adds the penalty to `strategy.loss`."""
        if self.ewc_lambda == 0 or self.penalty.n_experiences == 0:
            return
        strategy.loss = strategy.loss + self.ewc_lambda * self.penalty(strategy.model)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Computes F on the experience and remembers it with the parameters."""
        start = time.perf_counter()
        self.fisher = self.compute_fisher(strategy)
        self.penalty.consolidate(strategy.model, self.fisher)
        self.fisher_seconds += time.perf_counter() - start

    def compute_fisher(self, strategy: Any) -> dict[str, Tensor]:
        """The diagonal Fisher of the current experience, by parameter name."""
        options = {}
        if self.fisher_type is FisherType.BATCHED:
            options["criterion"] = strategy._criterion
        with torch.random.fork_rng(devices=[]):  # a transform may draw, though eval ones should not
            return diagonal_fisher(
                strategy.model,
                self.fisher_batches(strategy),
                self.fisher_type,
                forward=self.forward,
                **options,
            )

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [N, C] of a batch; override it for other batches or outputs."""
        has_task_labels = len(batch) > 2  # with two items the last one is y
        logits: Tensor = (
            avalanche_forward(model, batch[0], batch[-1]) if has_task_labels else model(batch[0])
        )
        return logits


def experience_batches(strategy: Any) -> Iterator[Batch]:
    """The current experience's samples in their order, with eval transforms, on the device.

    Args:
        strategy: Any Avalanche strategy while it trains.

    Yields:
        What the data set's `collate_fn` makes of `strategy.train_mb_size` samples.
    """
    dataset = strategy.experience.dataset.eval()
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        collate_fn=getattr(dataset, "collate_fn", None),
        generator=torch.Generator(),  # without it the iterator draws a seed from the global RNG
    )
    for batch in loader:
        yield [item.to(strategy.device) for item in batch]

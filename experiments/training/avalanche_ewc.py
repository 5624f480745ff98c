"""Avalanche's EWC, whose importances may get mini-batches of their own."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import EWCPlugin

from experiments.settings.run import RunSettings

ORDER_SEED = 0


class BuiltinEWC(EWCPlugin):
    """Avalanche's EWC, unchanged unless the settings say how its importances are batched.

    Args:
        settings: Of the run.
    """

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings.ewc_lambda, settings.mode, settings.decay_factor)
        self.importance_batch = settings.importance_batch
        self.importance_order = settings.importance_order

    def compute_importances(  # type: ignore[no-untyped-def]
        self, model, criterion, optimizer, dataset, device, batch_size, num_workers=0
    ) -> Any:
        """Avalanche's own, on the data as it should come."""
        dataset = in_order(dataset, self.importance_order)
        batch_size = self.importance_batch or batch_size
        return super().compute_importances(
            model, criterion, optimizer, dataset, device, batch_size, num_workers
        )


def in_order(rows: Any, order: str | None) -> Any:
    """The samples as Avalanche has them, sorted by class, or shuffled, always in the same way."""
    if order is None:
        return rows
    generator = torch.Generator().manual_seed(ORDER_SEED)
    return rows.part(torch.randperm(len(rows), generator=generator))

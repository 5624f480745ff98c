"""Avalanche's logger for Weights & Biases, as far as it goes with every version of wandb."""

from __future__ import annotations

from typing import Any

from avalanche.logging import WandBLogger


class NumbersLogger(WandBLogger):
    """Logs numbers, which all our metrics are.

    Avalanche's own also asks wandb for the types of charts, by names that newer versions lack.
    """

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """Log the number at the training iteration `x_plot`."""
        self.step = x_plot
        self.wandb.log({name: value}, step=x_plot)

"""Avalanche loggers that send a run's metrics to TensorBoard and Weights & Biases.

The result tables do not depend on it, to the last bit.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.settings.run import RunSettings

PROJECT = "ewc-plugin"


@dataclass(frozen=True)
class Logs:
    """Which tools to log for, and where: each run has a folder of its id.

    Attributes:
        folder: Holds the runs' folders.
        tensorboard: Whether to write events for TensorBoard.
        wandb: Whether to write a run for Weights & Biases; offline, `wandb sync` uploads it.
    """

    folder: Path
    tensorboard: bool = False
    wandb: bool = False

    @contextmanager
    def open(self, settings: RunSettings) -> Iterator[list[Any]]:
        """Avalanche's loggers for a run; closed with what they hold on the disk."""
        folder = self.folder / settings.run_id
        loggers: list[Any] = []
        try:
            if self.tensorboard:
                loggers.append(_tensorboard(folder))
            if self.wandb:
                loggers.append(_wandb(folder, settings))
            yield loggers
        finally:
            for logger in loggers:
                close = logger.writer.close if hasattr(logger, "writer") else logger.wandb.finish
                close()


def logs_of(folder: Path, *, tensorboard: bool, wandb: bool) -> Logs | None:
    """The logs of a results folder; None where no tool is asked for."""
    if not (tensorboard or wandb):
        return None
    return Logs(folder.resolve() / "logs", tensorboard, wandb)


def _tensorboard(folder: Path) -> Any:
    from avalanche.logging import TensorboardLogger

    return TensorboardLogger(folder)


def _wandb(folder: Path, settings: RunSettings) -> Any:
    from experiments.training.wandb_logger import NumbersLogger

    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "mode": "offline",
        # Not the run's, which may be repeated; Avalanche asks a wandb of the past for one.
        "id": secrets.token_hex(4),
        "settings": {"console": "off", "silent": True},
    }
    config = {k: v for k, v in asdict(settings).items() if v is not None}
    return NumbersLogger(
        PROJECT, settings.run_id, save_code=False, config=config, dir=folder, params=options
    )

"""Which experiences share one Fisher, and on which data it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ewc_plugin.avalanche.ranks import shard, world_size
from ewc_plugin.batch_parts import on_device
from ewc_plugin.batches import Batch


class FisherData(str, Enum):
    """What an experience's Fisher sees.

    EXPERIENCE: the experience's own data, nothing that other plugins or the strategy mixed in.
    TRAINING: all that was trained on, such as a replay buffer or `Cumulative`'s past experiences.
    """

    EXPERIENCE = "experience"
    TRAINING = "training"


class Window:
    """The experiences that share one Fisher.

    In an online stream that knows its task boundaries they are the parts of an original experience,
    elsewhere so many in a row.

    Attributes:
        n_done: How many of them have ended.
    """

    def __init__(self, size: int, data: FisherData) -> None:
        self.size, self.data = size, data
        self.clear()

    def clear(self) -> None:
        """Starts anew."""
        self.n_done = 0
        self._held: list[Any] = []  # data sets of those that have ended
        self._current: list[Any] = []

    def begin(self, experience: Any) -> None:
        """Before an experience's training; what an interrupted one left is dropped."""
        if experience.is_first_subexp if knows_boundaries(experience) else self.size == 1:
            self.clear()
        self._current = [] if knows_boundaries(experience) else [experience.dataset]

    def see(self, loader: Any) -> None:
        """Before an epoch, when every plugin has had its say about the data loader."""
        if self.data is FisherData.TRAINING:
            self._current = _datasets_of(loader)

    def end(self, experience: Any) -> bool:
        """After an experience's training; whether it was the window's last."""
        self._held += self._current
        self._current = []
        self.n_done += 1
        if not knows_boundaries(experience):
            return self.n_done >= self.size
        # Avalanche says False of every part where the parts are of equal size: so they are counted.
        counted: bool = self.n_done >= experience.sub_stream_length
        return counted or bool(experience.is_last_subexp)

    def datasets(self, experience: Any) -> list[Any]:
        """What the Fisher sees; outside of training, the data of `experience`."""
        return self._held or [_own(experience)]

    @property
    def holds_data(self) -> bool:
        """Whether it can't be resumed without the data of experiences that have ended."""
        return bool(self._held)


def knows_boundaries(experience: Any) -> bool:
    """Whether it is a part, in an online stream, that knows which original it is a part of."""
    return bool(getattr(experience, "access_task_boundaries", False))


def experience_batches(strategy: Any, *, num_workers: int = 0) -> Iterator[Batch]:
    """The current experience's samples in their order, with eval transforms, on the device.

    Args:
        strategy: Any Avalanche strategy while it trains.
        num_workers: Of the data loader.

    Yields:
        What the data set's `collate_fn` makes of `strategy.train_mb_size` samples; in a distributed
        run, of this process's share of them.
    """
    yield from dataset_batches(strategy, _own(strategy.experience), num_workers)


def dataset_batches(strategy: Any, dataset: Any, num_workers: int) -> Iterator[Batch]:
    """The same of a data set."""
    if hasattr(dataset, "eval"):
        dataset = dataset.eval()
    collate = getattr(dataset, "collate_fn", None)
    if world_size() > 1:
        dataset = Subset(dataset, shard(len(dataset)))
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # without it the iterator draws a seed from the global RNG
    )
    for batch in loader:
        yield on_device(batch, strategy.device)


def _own(experience: Any) -> Any:
    origin = experience.origin_experience if knows_boundaries(experience) else experience
    return origin.dataset


def _datasets_of(loader: Any) -> list[Any]:
    if hasattr(loader, "datasets"):  # Avalanche's own loaders
        return list(loader.datasets)
    if hasattr(loader, "dataset"):
        return [loader.dataset]
    raise ValueError(
        "`fisher_data` 'training' reads the strategy's data loader, and "
        f"{type(loader).__name__} has neither `datasets` nor `dataset`. Pass `fisher_batches`."
    )

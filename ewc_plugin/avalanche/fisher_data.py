"""Which experiences share one Fisher, and on which data it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ewc_plugin.avalanche.ranks import shard, world_size
from ewc_plugin.batch_parts import on_device
from ewc_plugin.batches import Batch, draw_indices


class FisherData(str, Enum):
    """The data that an experience's Fisher is computed on.

    EXPERIENCE: the experience's own data, nothing that other plugins or the strategy mixed in.
    TRAINING: all data of the training, such as a replay buffer or `Cumulative`'s past experiences.
    """

    EXPERIENCE = "experience"
    TRAINING = "training"


class SharedFisherExperiences:
    """The consecutive experiences that share one Fisher.

    In an online stream that knows its task boundaries they are the parts of one original
    experience; elsewhere `size` experiences in a row.

    Attributes:
        n_done: Number of them that have ended.
    """

    def __init__(self, size: int, data: FisherData) -> None:
        self.size, self.data = size, data
        self.clear()

    def clear(self) -> None:
        """Forget all experiences."""
        self.n_done = 0
        self._ended: list[Any] = []  # data sets of the experiences that are done
        self._current: list[Any] = []

    def begin(self, experience: Any) -> None:
        """Begin an experience; forget one whose training was interrupted."""
        if experience.is_first_subexp if knows_boundaries(experience) else self.size == 1:
            self.clear()
        self._current = [] if knows_boundaries(experience) else [experience.dataset]

    def read_loader(self, loader: Any) -> None:
        """Record the data sets of an epoch's loader, after all plugins have modified it."""
        if self.data is FisherData.TRAINING:
            self._current = _datasets_of(loader)

    def end(self, experience: Any) -> bool:
        """End an experience; return whether it is the last of those that share the Fisher.

        Args:
            experience: The one whose training ended.

        Returns:
            Whether the Fisher is due; this experience then counts once `clear` is called after it.
        """
        n_done = self.n_done + 1
        if knows_boundaries(experience):
            # Avalanche sets is_last_subexp to False in every part where the parts have one size.
            is_last = n_done >= experience.sub_stream_length or bool(experience.is_last_subexp)
        else:
            is_last = n_done >= self.size
        if not is_last:
            self._ended, self._current = self._ended + self._current, []
            self.n_done = n_done
        return is_last

    def datasets(self, experience: Any) -> list[Any]:
        """Return the data sets to compute the Fisher on; outside training, that of `experience`."""
        return self._ended + self._current or [own_dataset(experience)]

    @property
    def needs_past_data(self) -> bool:
        """Whether resuming needs the data of experiences that have ended."""
        return bool(self._ended)


def knows_boundaries(experience: Any) -> bool:
    """Return whether an experience is part of an online stream with known task boundaries."""
    return bool(getattr(experience, "access_task_boundaries", False))


def experience_batches(strategy: Any, *, num_workers: int = 0) -> Iterator[Batch]:
    """Yield the current experience's samples in their order, with eval transforms, on the device.

    Args:
        strategy: Any Avalanche strategy while it trains.
        num_workers: Of the data loader.

    Yields:
        What the training's `collate_fn`, else the data set's, makes of `strategy.train_mb_size`
        samples; in a distributed run, of this process's share of them.
    """
    yield from dataset_batches(strategy, own_dataset(strategy.experience), num_workers)


def dataset_batches(
    strategy: Any, dataset: Any, num_workers: int, indices: list[int] | None = None
) -> Iterator[Batch]:
    """Yield the batches of a data set, or of some of its samples, as `experience_batches` does."""
    if hasattr(dataset, "eval"):
        dataset = dataset.eval()
    collate = collate_of(strategy, dataset)
    if indices is not None:
        dataset = Subset(dataset, indices)
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


def drawn_batches(
    strategy: Any,
    datasets: list[Any],
    num_workers: int,
    max_samples: int,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """Yield batches of `max_samples` samples, drawn without replacement from all the data sets."""
    drawn = draw_indices(sum(map(len, datasets)), max_samples, generator)
    start = 0
    for dataset in datasets:
        inside = [i - start for i in drawn if start <= i < start + len(dataset)]
        if inside:
            yield from dataset_batches(strategy, dataset, num_workers, inside)
        start += len(dataset)


def collate_of(strategy: Any, dataset: Any) -> Any:
    """Return the function that makes a batch of samples: the training's, else the data set's."""
    loader = strategy.dataloader
    training = getattr(loader, "loader_kwargs", {}).get("collate_fn")  # Avalanche's own loaders
    training = training or getattr(loader, "collate_fn", None)
    return training or getattr(dataset, "collate_fn", None)


def own_dataset(experience: Any) -> Any:
    """Return the data set of an experience, or of the original that it was split from."""
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

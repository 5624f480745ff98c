"""An Avalanche stream whose experiences are made when they are asked for.

Each holds all images of one dataset, transformed in a way of its own. Avalanche's generators make
the datasets of all experiences beforehand, 26 MB and a second each; here they share one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import SequenceCLStream
from avalanche.benchmarks.utils import (
    DefaultTransformGroups,
    _make_taskaware_classification_dataset,
    make_avalanche_dataset,
)
from torch import nn

from experiments.data.sources import ImageDataset
from experiments.settings.run import N_CLASSES


class LazyStream(SequenceCLStream[Any]):
    """All images in every experience, each time with another transform.

    The samples, their order and their labels are those of `nc_benchmark` with a dataset per
    experience.

    Args:
        name: `train` or `test`.
        images: Those of every experience.
        moves: What each experience does to an image in [0, 1]; frozen, in Avalanche's words.
        transform: What follows it in every experience.
        by_task: Whether the experiences have task labels, 0, 1, ...; else all have 0.
    """

    def __init__(
        self,
        name: str,
        images: ImageDataset,
        moves: Sequence[Any],
        transform: nn.Module,
        *,
        by_task: bool,
    ) -> None:
        self._dataset = _make_taskaware_classification_dataset(images)
        self._moves = moves
        self._transform = transform
        self._by_task = by_task
        self._by_class = [self._dataset.targets.val_to_idx[c] for c in range(N_CLASSES)]
        self._ordered: dict[tuple[int, ...], Any] = {}
        super().__init__(name, benchmark=None)  # type: ignore[arg-type]

    def indices(self, classes: Sequence[int]) -> list[int]:
        """The images, sorted by class in the order of `classes`."""
        return [i for c in classes for i in self._by_class[c]]

    def _full_length(self) -> int:
        return len(self._moves)

    def _make_experience(self, experience_idx: int) -> Any:
        classes = class_order(experience_idx)
        if classes not in self._ordered:
            self._ordered[classes] = self._dataset.subset(self.indices(classes))
        move = DefaultTransformGroups((self._moves[experience_idx], None))
        moved = make_avalanche_dataset(self._ordered[classes], frozen_transform_groups=move)
        task = experience_idx if self._by_task else 0
        experience: Any = DatasetExperience(
            dataset=_make_taskaware_classification_dataset(
                moved,
                transform_groups={
                    "train": (self._transform, None),
                    "eval": (self._transform, None),
                },
                initial_transform_group="train" if self.name == "train" else "eval",
                task_labels=task,
            )
        )
        experience.task_label, experience.task_labels = task, [task]
        experience.classes_in_this_experience = list(range(N_CLASSES))
        return experience


@functools.cache
def class_order(experience: int) -> tuple[int, ...]:
    """The order of the classes in the datasets of an experience.

    Avalanche counts the classes on from experience to experience, and keeps those of one in a set,
    whose order is not always ascending.
    """
    first = N_CLASSES * experience
    return tuple(c - first for c in set(range(first, first + N_CLASSES)))


def lazy_benchmark(
    train: ImageDataset,
    test: ImageDataset,
    moves: Sequence[Any],
    transform: nn.Module,
    *,
    by_task: bool,
) -> Any:
    """A benchmark of two `LazyStream`s, with `train_stream` and `test_stream`."""
    parts = {"train": train, "test": test}
    streams = (
        LazyStream(name, images, moves, transform, by_task=by_task)
        for name, images in parts.items()
    )
    return CLScenario(list(streams))

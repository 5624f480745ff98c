"""Feeds Avalanche's strategies whole batches of tensors instead of transforming sample by sample.

Most of Avalanche's time on MNIST goes into fetching, transforming and collating single samples.
`FastData` leaves Avalanche's loaders, samplers and shuffling in place and swaps only where their
batches come from, so that weights and accuracies stay the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.data.streams import Images, Stream

N_COMPARED = 20  # items per dataset that are compared with the classic path before it is replaced
FISHER_BATCH = 1024


class TensorRows(Dataset[Any]):
    """Samples (x [N, ...], y [N], task label [N]) that are fetched a batch at a time."""

    def __init__(self, x: Tensor | Images, y: Tensor, task: Tensor) -> None:
        self.x = x
        self.y = y
        self.task = task

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: int | slice | Tensor) -> list[Tensor]:
        return [self.x[rows], self.y[rows], self.task[rows]]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        return self[torch.as_tensor(indices)]

    @property
    def transforms(self) -> Any:
        """End Avalanche's search for FFCV, which else walks through every index on each pass."""
        raise TypeError("`TensorRows` has no transforms: its samples are transformed already.")

    @staticmethod
    def collate_fn(batch: list[Tensor]) -> list[Tensor]:
        """`__getitems__` has collated already."""
        return batch

    def part(self, rows: slice | Tensor) -> TensorRows:
        """Some of the samples."""
        x = self.x.part(rows) if isinstance(self.x, Images) else self.x[rows]
        return TensorRows(x, self.y[rows], self.task[rows])

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        """The samples in their order."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]


class FastData(SupervisedPlugin):
    """Replaces a strategy's data path by tensors; must be the first of its plugins.

    Args:
        stream: The stream that the strategy trains and is evaluated on.

    Raises:
        RuntimeError: While training, if a tensor differs from what Avalanche's path gives.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self._train: dict[int, TensorRows] = {}
        self._test: dict[int, TensorRows] = {}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Put tensors behind Avalanche's loader of the training data."""
        past_and_present = getattr(strategy, "_experiences", [strategy.experience])  # JointTraining
        self._train = {
            e.current_experience: experience_rows(self.stream, e) for e in past_and_present
        }
        rows = _concatenate(list(self._train.values()))
        if isinstance(strategy.dataloader, ReplayDataLoader):
            _feed_with_memory(strategy.dataloader, rows)
        else:
            _feed(strategy.dataloader, rows)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Let the plugins that come after pass over the experience's tensors as well."""
        experience = strategy.experience
        rows = self._train[experience.current_experience]
        strategy.experience = _WithDataset(experience, rows)
        self._train = {}

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Put tensors, made on first use and kept, behind the loader of the test data."""
        experience = strategy.experience
        index = experience.current_experience
        if index not in self._test:
            self._test[index] = experience_rows(self.stream, experience)
        _feed(strategy.dataloader, self._test[index])


def experience_rows(stream: Stream, experience: Any) -> TensorRows:
    """The samples of one of the stream's experiences."""
    assert stream.samples is not None
    x, y = stream.samples(experience.origin_stream.name, experience.current_experience)
    return TensorRows(x, y, torch.full_like(y, experience.task_label))


class _WithDataset:
    """Wraps an experience and replaces its `dataset`."""

    def __init__(self, experience: Any, dataset: TensorRows) -> None:
        self._experience = experience
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experience, name)


def _concatenate(parts: list[TensorRows]) -> TensorRows:
    if len(parts) == 1:
        return parts[0]
    return TensorRows(
        Images.concatenate([part.x for part in parts if isinstance(part.x, Images)]),
        torch.cat([part.y for part in parts]),
        torch.cat([part.task for part in parts]),
    )


def _feed(loader: Any, rows: TensorRows) -> None:
    """Make an Avalanche loader fetch from `rows`, which hold what its datasets hold.

    Avalanche groups the samples by task label, each group in stream order, and draws indices into
    the groups' concatenation; a single group is in stream order already.
    """
    if len(loader.datasets) > 1:
        rows = rows.part(torch.argsort(rows.task, stable=True))
    _compare(loader.datasets, rows)
    ends = torch.tensor([len(dataset) for dataset in loader.datasets]).cumsum(0).tolist()
    loader.datasets = [
        rows.part(slice(end - len(dataset), end))
        for end, dataset in zip(ends, loader.datasets, strict=True)
    ]

    _fetch_from(loader, rows)


def _feed_with_memory(loader: ReplayDataLoader, rows: TensorRows) -> None:
    """The same where a loader adds samples of past experiences to those of the current one."""
    _compare(loader.datasets[:1], rows)
    memories = [_in_tensors(memory) for memory in loader.datasets[1:]]
    loader.datasets = [rows, *memories]
    _fetch_from(loader, OneAfterTheOther([rows, *memories]))


def _in_tensors(dataset: Any) -> TensorRows:
    """The samples of one of Avalanche's data sets, as they are when they are asked for now."""
    x, y, task = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return TensorRows(torch.stack(x), torch.tensor(y), torch.tensor(task))


class OneAfterTheOther(Dataset[Any]):
    """Several `TensorRows`, whose indices go on through all of them."""

    collate_fn = staticmethod(TensorRows.collate_fn)

    def __init__(self, parts: Sequence[TensorRows]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """A batch; a sampler draws from one part after the other, and so they stay in its order."""
        rows, start, found = torch.as_tensor(indices), 0, []
        for part in self.parts:
            inside = rows[(rows >= start) & (rows < start + len(part))] - start
            if len(inside):
                found.append(part[inside])
            start += len(part)
        return [torch.cat(columns) for columns in zip(*found, strict=True)]


def _fetch_from(loader: Any, rows: TensorRows | OneAfterTheOther) -> None:
    def make_loader(datasets: Any, batch_sampler: Any) -> DataLoader[Any]:
        return DataLoader(rows, batch_sampler=batch_sampler, collate_fn=rows.collate_fn)

    loader._make_pytorch_loader = make_loader


def _compare(datasets: Sequence[Any], rows: TensorRows) -> None:
    """Compare a few items of each dataset with the tensors that will replace them."""
    if sum(map(len, datasets)) != len(rows):
        raise RuntimeError(
            f"`FastData` has {len(rows)} samples where Avalanche has {sum(map(len, datasets))}: "
            "another plugin changed the data; use data_path='classic'."
        )
    start = 0
    for dataset in datasets:
        for i in torch.linspace(0, len(dataset) - 1, N_COMPARED).long().tolist():
            x, y, task = dataset[i]
            fast_x, fast_y, fast_task = rows[start + i]
            if not (torch.equal(x, fast_x) and y == fast_y and task == fast_task):
                raise RuntimeError(
                    f"`FastData`'s sample {i} differs from Avalanche's; use data_path='classic'."
                )
        start += len(dataset)

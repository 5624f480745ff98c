"""The Fisher of data that is spread over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ewc_plugin.batches import Batch, n_samples
from ewc_plugin.fisher.class_mean import keeping_class_sums
from ewc_plugin.fisher.result import Fisher as FisherResult
from ewc_plugin.fisher.scores import BATCHED, CLASS_MEANS, FisherType, Score

Fisher = Mapping[str, Tensor]
_FAILED = -1.0


def world_size() -> int:
    """Number of processes; 1 outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard(N: int) -> range:
    """Indices of this process's share of N samples: each sample is in exactly one share.

    Args:
        N: Number of samples.

    Returns:
        Every n-th index from the process's rank on, in a run of n processes.

    Example:
        >>> shard(3)
        range(0, 3)
    """
    n = world_size()
    return range(dist.get_rank() if n > 1 else 0, N, n)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module in a data-parallel wrapper, whose forward pass synchronises ranks."""
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def mean_over_ranks(compute: Callable[[], tuple[Fisher, float]], like: Fisher) -> dict[str, Tensor]:
    """sum_r w_r F_r / sum_r w_r over the ranks r: the Fisher over all of their samples.

    Every rank must call it. Where one fails, all raise: the others would wait for it forever.

    Args:
        compute: Gives this rank's (F, w), w its number of samples; 0 where it has none, and then F
            may be empty.
        like: A tensor for each entry of F, of its shape, on its device.

    Returns:
        F, the same on every rank.

    Raises:
        RuntimeError: Another rank failed.
        ValueError: No rank has a sample.
    """
    fisher, weight, total = _computed_on_each(compute, like)
    mean = {}
    for name, tensor in _zeros(like).items():
        share = fisher[name] * (weight / total) if weight else tensor
        dist.all_reduce(share)
        mean[name] = share
    return mean


def class_means_over_ranks(
    compute: Callable[[], tuple[Fisher, float]], like: Fisher
) -> dict[str, Tensor]:
    """1/N sum_c G_c^2 / n_c of the sums G_c and n_c over all ranks, which are squared last.

    Args:
        compute: As in `mean_over_ranks`, by a pass of class means.
        like: As in `mean_over_ranks`.

    Returns:
        F, the same on every rank.

    Raises:
        RuntimeError: Another rank failed.
        ValueError: No rank has a sample.
    """
    with keeping_class_sums() as kept:
        _computed_on_each(compute, like)
    counts, gradients = (kept[0].counts, kept[0].gradients) if kept else ({}, {})
    device = next(iter(like.values())).device
    n_classes = torch.tensor(max(counts, default=-1) + 1, device=device)
    dist.all_reduce(n_classes, dist.ReduceOp.MAX)
    n = torch.zeros(int(n_classes), dtype=torch.float64, device=device)
    for c, count in counts.items():
        n[c] = count
    dist.all_reduce(n)
    N, total = float(n.sum()), _zeros(like)
    for c in n.nonzero()[:, 0].tolist():
        own = gradients.pop(c, None) or _zeros(like)
        for name in like:
            dist.all_reduce(own[name])
            total[name] += own[name].square_().div_(float(n[c]) * N)
    return total


def _zeros(like: Fisher) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
        for name, t in like.items()
    }


def _computed_on_each(
    compute: Callable[[], tuple[Fisher, float]], like: Fisher
) -> tuple[Fisher, float, float]:
    """This rank's F and weight, and the weight of all ranks; raises where one has failed."""
    device = next(iter(like.values())).device
    fisher: Fisher = {}
    weight, error = _FAILED, None
    try:
        fisher, weight = compute()
    except Exception as caught:
        error = caught
    weights = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(world_size())]
    dist.all_gather(weights, torch.tensor([weight], dtype=torch.float64, device=device))
    if error is not None:
        raise error
    failed = [rank for rank, w in enumerate(weights) if float(w) == _FAILED]
    if failed:
        raise RuntimeError(f"The Fisher failed on rank {failed}; its own error says why.")
    total = float(sum(weights))
    if not total:
        raise ValueError("`batches` is empty on every rank: a Fisher needs at least one sample.")
    return fisher, weight, total


def fisher_over_ranks(
    compute: Callable[..., Fisher],
    batches: Callable[[], Iterable[Batch]],
    like: Fisher,
    *,
    max_samples: int | None,
    fisher_type: FisherType | Score,
) -> dict[str, Tensor]:
    """The Fisher of every rank's batches together.

    Args:
        compute: Maps batches, and perhaps `max_samples`, to their Fisher.
        batches: Function that returns this rank's batches.
        like: A tensor for each entry of the Fisher, of its shape, on its device.
        max_samples: How many samples to use, over all ranks.
        fisher_type: Of `compute`; the mean of a batched one is over batches, not samples.

    Returns:
        F, the same on every rank.

    Raises:
        RuntimeError: Another rank failed.
        ValueError: No rank has a sample.
    """

    def share() -> tuple[Fisher, float]:
        counted = _Counted(batches())
        limit = None if max_samples is None else len(shard(max_samples))
        if counted.is_empty or limit == 0:
            return {}, 0
        fisher = compute(counted, **({} if limit is None else {"max_samples": limit}))
        if fisher_type in BATCHED:
            return fisher, counted.n_batches
        # Samples without any label or position count neither in a rank's mean nor in its weight.
        N = fisher.n_samples if isinstance(fisher, FisherResult) else None
        if N is None:
            N = counted.n_samples if limit is None else min(limit, counted.n_samples)
        return fisher, N

    if fisher_type in CLASS_MEANS:
        return class_means_over_ranks(share, like)
    return mean_over_ranks(share, like)


class _Counted:
    """An iterable over batches that counts their samples."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._first = next(self._batches, None)
        self.is_empty = self._first is None
        self.n_samples = self.n_batches = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in chain([self._first], self._batches):
            self.n_batches += 1
            self.n_samples += n_samples(batch)
            yield batch

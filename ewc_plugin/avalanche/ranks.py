"""The Fisher of data that is spread over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ewc_plugin.batches import Batch, n_samples
from ewc_plugin.fisher.result import Fisher as FisherResult
from ewc_plugin.fisher.scores import FisherType, Score

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


def check_adds_up_over_ranks(fisher_type: FisherType | Score) -> None:
    """Raise where the ranks' own importances do not give that of all samples.

    Args:
        fisher_type: The plugin's.

    Raises:
        ValueError: It is a class mean, in a distributed run.
    """
    if world_size() > 1 and isinstance(fisher_type, FisherType) and fisher_type.is_class_mean:
        raise ValueError(
            f"`fisher_type` {fisher_type.value!r} squares the means of classes, whose samples are "
            "spread over the ranks of a distributed run. Use 'predicted' or 'empirical'."
        )


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
    mean = {}
    for name, tensor in like.items():
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        share = fisher[name] * (weight / total) if weight else torch.zeros_like(tensor, dtype=dtype)
        dist.all_reduce(share)
        mean[name] = share
    return mean


def fisher_over_ranks(
    compute: Callable[..., Fisher],
    batches: Callable[[], Iterable[Batch]],
    like: Fisher,
    *,
    max_samples: int | None,
    weigh_batches: bool,
) -> dict[str, Tensor]:
    """The Fisher of every rank's batches together.

    Args:
        compute: Maps batches, and perhaps `max_samples`, to their Fisher.
        batches: Function that returns this rank's batches.
        like: A tensor for each entry of the Fisher, of its shape, on its device.
        max_samples: How many samples to use, over all ranks.
        weigh_batches: Whether a mean is over batches instead of samples.

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
        if weigh_batches:
            return fisher, counted.n_batches
        # Samples without any label or position count neither in a rank's mean nor in its weight.
        N = fisher.n_samples if isinstance(fisher, FisherResult) else None
        if N is None:
            N = counted.n_samples if limit is None else min(limit, counted.n_samples)
        return fisher, N

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

"""Batches as pytrees of tensors with a leading sample axis: sizes, slices, joins, a fair subset."""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Batch = Any  # a tuple, list, dict, ... of tensors [N, ...]; other leaves are shared by all samples


def has_samples(leaf: object) -> bool:
    """Whether a leaf of a batch has a leading sample axis."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def as_pytree(batch: Batch) -> Batch:
    """A batch in which every mapping is a dict: a tokenizer's own class is opaque to pytrees."""
    if isinstance(batch, Mapping):
        return {key: as_pytree(value) for key, value in batch.items()}
    if isinstance(batch, list):
        return [as_pytree(item) for item in batch]
    if isinstance(batch, tuple):
        items = [as_pytree(item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    return batch


def n_samples(batch: Batch) -> int:
    """Number of samples of a batch.

    Args:
        batch: A pytree with at least one tensor [N, ...].

    Returns:
        N.

    Raises:
        ValueError: No tensor with a leading axis, or tensors of different lengths.

    Example:
        >>> n_samples((torch.zeros(3, 2), torch.zeros(3)))
        3
    """
    sizes = {leaf.size(0) for leaf in tree_flatten(batch)[0] if has_samples(leaf)}
    if len(sizes) != 1:
        raise ValueError(
            "`batches` must yield tensors that share a leading sample axis, "
            f"got leading sizes {sorted(sizes)} in one batch."
        )
    return int(sizes.pop())


def n_entries(batch: Batch) -> int:
    """Number of entries of a batch's tensors."""
    return sum(leaf.numel() for leaf in tree_flatten(batch)[0] if has_samples(leaf))


def take(batch: Batch, index: Tensor | slice) -> Batch:
    """The samples `index` of every tensor of a batch."""
    return tree_map(lambda leaf: leaf[index] if has_samples(leaf) else leaf, batch)


def copied(batch: Batch) -> Batch:
    """A batch with tensors of its own."""
    return tree_map(lambda leaf: leaf.clone() if has_samples(leaf) else leaf, batch)


def join(batches: list[Batch]) -> Batch:
    """One batch with the samples of all, in order."""
    if len(batches) == 1:
        return batches[0]
    flat = [tree_flatten(batch) for batch in batches]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [torch.cat(column) if has_samples(column[0]) else column[0] for column in columns]
    return tree_unflatten(leaves, flat[0][1])


def joinable(left: Batch, right: Batch) -> bool:
    """Whether two batches differ in their number of samples alone."""
    (left_leaves, left_tree), (right_leaves, right_tree) = tree_flatten(left), tree_flatten(right)
    return left_tree == right_tree and all(
        isinstance(b, Tensor) and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
        if has_samples(a)
        else a is b or (not isinstance(a, Tensor) and bool(a == b))
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )


def rechunk(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same samples in the same order, in batches of `size` where their shapes allow it.

    The sums over samples do not depend on the batches they come in, so the engine takes the size
    that is fast instead of the one that a data loader happens to have.

    Args:
        batches: Any batches.
        size: Samples per batch of the result.

    Yields:
        Batches of `size`; a smaller one where shapes change, and at the end.
    """
    held: list[Batch] = []
    n_held = 0
    for batch in batches:
        if held and not joinable(held[0], batch):
            yield join(held)
            held, n_held = [], 0
        held.append(batch)
        n_held += n_samples(batch)
        if n_held >= size:
            joined, start = join(held), 0
            while n_held - start >= size:
                yield take(joined, slice(start, start + size))
                start += size
            held, n_held = ([take(joined, slice(start, None))], n_held - start)
            if not n_held:
                held = []
    if held:
        yield join(held)


def subset(
    batches: Iterable[Batch], max_samples: int, generator: torch.Generator
) -> Iterator[Batch]:
    """At most `max_samples` samples, drawn without replacement, in their order, one per batch.

    Every sample draws a uniform number; the smallest ones stay. One pass, any length.

    Args:
        batches: Any batches.
        max_samples: How many samples to keep.
        generator: Draws the numbers.

    Yields:
        Batches of one sample.
    """
    kept: list[tuple[float, int, Batch]] = []  # a heap on minus the draw: its root leaves first
    position = 0
    for batch in batches:
        N = n_samples(batch)
        draws = torch.rand(N, generator=generator, device=generator.device).tolist()
        for i, draw in enumerate(draws):
            entry = (-draw, position + i)
            if len(kept) < max_samples:
                heapq.heappush(kept, (*entry, take(batch, slice(i, i + 1))))
            elif entry > kept[0][:2]:
                heapq.heapreplace(kept, (*entry, take(batch, slice(i, i + 1))))
        position += N
    for _, _, sample in sorted(kept, key=lambda entry: entry[1]):
        yield sample

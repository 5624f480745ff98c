"""Operations on batches (pytrees with a sample axis): size, slice, join, random subset.

The samples of a batch are along the first axis of its tensors and NumPy arrays, and in lists and
tuples of plain values (such as strings) of the same length. All else is shared by all samples: a
pair of numbers is shared by two samples too if it was by the more that came before.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

Batch = Any  # a tuple, list, dict, ... of tensors [N, ...]


def has_samples(leaf: object) -> bool:
    """Whether a leaf of a batch is a tensor with a leading sample axis."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def as_pytree(batch: Batch) -> Batch:
    """A batch in which every mapping is a dict: a tokenizer's own class is opaque to pytrees."""
    if isinstance(batch, Mapping):
        return {key: as_pytree(value) for key, value in batch.items()}
    if isinstance(batch, _SharedTuple | _SharedList):
        return batch
    if isinstance(batch, torch.Size):
        return _SharedTuple(batch)
    if isinstance(batch, list):
        return [as_pytree(item) for item in batch]
    if isinstance(batch, tuple):
        items = [as_pytree(item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    return batch


def _is_flat(batch: Batch) -> bool:
    """Whether a batch is a tuple of tensors: a pytree takes three times as long."""
    return type(batch) is tuple and set(map(type, batch)) == {Tensor}


def _mapped(
    function: Callable[[Any], Any], batch: Batch, is_leaf: Callable[[Any], bool] | None = None
) -> Batch:
    if _is_flat(batch):
        return tuple(map(function, batch))
    return tree_map(function, batch, is_leaf=is_leaf)


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
    leaves = batch if _is_flat(batch) else filter(has_samples, tree_flatten(batch)[0])
    sizes = {leaf.size(0) for leaf in leaves if leaf.dim()}
    if not sizes:
        kinds = sorted({type(leaf).__name__ for leaf in tree_flatten(batch)[0]})
        raise ValueError(
            "`batches` must yield tuples, lists or mappings that hold a tensor [N, ...], got "
            f"{', '.join(kinds) or 'nothing'}. Make a tensor of an array, and a tuple or a dict of "
            "an object."
        )
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
    """The samples `index` of a batch, as views where that is possible."""
    N = n_samples(batch)

    def part(leaf: Any) -> Any:
        if has_samples(leaf):
            return leaf[index] if leaf.layout == torch.strided else _sparse_rows(leaf, index)
        if _is_array(leaf) and len(leaf) == N:
            return leaf[index if isinstance(index, slice) else index.cpu().numpy()]
        if type(leaf) in _SHARED:
            if isinstance(index, slice):
                return leaf[index]
            return type(leaf)(leaf[i] for i in index.tolist())
        return leaf

    return _mapped(part, batch, lambda node: _is_value_per_sample(node, N))


def copied(batch: Batch) -> Batch:
    """A batch with tensors and arrays of its own."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return leaf.copy() if _is_array(leaf) else leaf

    return _mapped(copy, batch)


def version(leaf: Any) -> int:
    """The counter that rises where a tensor is changed in place; 0 of what has none."""
    counted = isinstance(leaf, Tensor) and not leaf.is_inference()
    return leaf._version if counted else 0


def versions(batch: Batch) -> list[int]:
    """The version counters of a batch's leaves."""
    return [version(leaf) for leaf in tree_flatten(batch)[0]]


def join(batches: list[Batch]) -> Batch:
    """One batch with the samples of all, in order."""
    if len(batches) == 1:
        return batches[0]
    flat = [_flatten(batch) for batch in batches]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([_joined(column) for column in columns], flat[0][1])


def _joined(column: tuple[Any, ...]) -> Any:
    first = column[0]
    if has_samples(first):
        if first.layout in (torch.strided, torch.sparse_coo):
            return torch.cat(column)
        return torch.cat([t.to_sparse_coo() for t in column]).to_sparse(layout=first.layout)
    if type(first) in _SHARED:
        return type(first)(value for part in column for value in part)
    if _is_array(first) and first.ndim:
        return sys.modules["numpy"].concatenate(column)
    return first


def joinable(left: Batch, right: Batch) -> bool:
    """Whether two batches can be joined: same structure, shapes, types and shared values."""
    (left_leaves, left_tree), (right_leaves, right_tree) = _flatten(left), _flatten(right)
    if left_tree != right_tree:
        return False
    pairs = zip(left_leaves, right_leaves, strict=True)
    return all(_fits(a, b, left, right) for a, b in pairs)


def _fits(a: Any, b: Any, left: Batch, right: Batch) -> bool:
    if type(a) is not type(b):
        return False
    if has_samples(a):
        alike = a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and a.layout == b.layout
        return bool(alike and a.device == b.device)
    if type(a) in _SHARED:
        return True  # each has a value per sample
    if _is_array(a) and a.ndim and a.dtype != object:
        rows = (len(a), len(b)) == (n_samples(left), n_samples(right))
        return bool(a is b or (rows and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype))
    return a is b or (_is_plain(a) and bool(a == b))


def _flatten(batch: Batch) -> tuple[list[Any], Any]:
    """Return leaves and structure; a sequence of one plain value per sample is one leaf."""
    if _is_flat(batch):
        return list(batch), _flat_tree(len(batch))
    N = n_samples(batch)
    return tree_flatten(batch, is_leaf=lambda node: _is_value_per_sample(node, N))


@lru_cache(64)
def _flat_tree(n_items: int) -> Any:
    return tree_flatten((0,) * n_items)[1]


def _is_plain(leaf: Any) -> bool:
    plain = str | bytes | bool | int | float | complex | _SharedList | _SharedTuple
    return leaf is None or isinstance(leaf, plain)


class _SharedList(list[Any]):
    """Plain values that belong to a whole batch: a leaf, which is not cut."""


class _SharedTuple(tuple[Any, ...]):
    """A tuple of such values."""


_SHARED: dict[type, Callable[[Any], Any]] = {list: _SharedList, tuple: _SharedTuple}


def _is_plain_sequence(node: Any) -> bool:
    return type(node) in _SHARED and all(map(_is_plain, node))


def _is_value_per_sample(node: Any, N: int) -> bool:
    return _is_plain_sequence(node) and len(node) == N


def has_values_beside_tensors(batch: Batch) -> bool:
    """Whether samples have values in sequences or arrays."""
    N = n_samples(batch)
    return any(
        type(leaf) in _SHARED or (_is_array(leaf) and leaf.ndim and len(leaf) == N)
        for leaf in _flatten(batch)[0]
    )


def _as_pytrees(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches as pytrees, with a mark on sequences whose values belong to no sample.

    Args:
        batches: Any batches.

    Yields:
        Each of them.

    Raises:
        ValueError: A sequence had a value for each sample before, and now it has not.
    """
    shared: dict[tuple[str, int], bool] = {}  # of sequences beside several samples, by their place
    for batch in map(as_pytree, batches):
        yield batch if _is_flat(batch) else _marked(batch, shared)


def _marked(batch: Batch, shared: dict[tuple[str, int], bool]) -> Batch:
    N = n_samples(batch)
    leaves, tree = tree_flatten(batch, is_leaf=_is_plain_sequence)
    for i, leaf in enumerate(leaves):
        if not _is_plain_sequence(leaf):
            continue
        place = (str(tree), i)
        if len(leaf) != N or shared.get(place):
            if not shared.setdefault(place, True):
                raise ValueError(
                    f"A {type(leaf).__name__} in `batches` has {len(leaf)} values for {N} samples, "
                    "and had one for each sample before. Pass values of samples as a tensor "
                    "[N, ...], and those of a whole batch through `forward`."
                )
            leaves[i] = _SHARED[type(leaf)](leaf)
        elif N > 1:
            shared[place] = False
    return tree_unflatten(leaves, tree)


def _is_array(leaf: Any) -> bool:
    return type(leaf).__module__ == "numpy" and hasattr(leaf, "ndim")


def _sparse_rows(t: Tensor, index: Tensor | slice) -> Tensor:
    """Rows of a sparse tensor, in its layout."""
    rows = torch.arange(len(t), device="cpu")[index].to(t.device)
    coo = t if t.layout == torch.sparse_coo else t.to_sparse_coo()
    chosen = coo.index_select(0, rows).coalesce()
    return chosen if t.layout == torch.sparse_coo else chosen.to_sparse(layout=t.layout)


def different_samples(batch: Batch, count: int) -> list[int]:
    """Indices of up to `count` samples, in order: the first one, and others that differ from it."""
    N = n_samples(batch)
    chosen = [0]
    for stop in (min(N, 32), N):  # usually enough are among the first few
        differs = torch.zeros(stop, dtype=torch.bool, device="cpu")
        for leaf in tree_flatten(take(batch, slice(0, stop)))[0]:
            if has_samples(leaf):
                rows = leaf if leaf.layout == torch.strided else leaf.to_dense()
                differs |= (rows != rows[:1]).reshape(stop, -1).any(1).cpu()
        chosen = [0, *differs.nonzero().flatten()[: count - 1].tolist()]
        if len(chosen) == count:
            break
    return chosen


@dataclass(frozen=True)
class Chunk:
    """Some samples, with the number that came from each of the loader's batches.

    Attributes:
        batch: The samples.
        sizes: The numbers.
        owned: Whether its memory is its own. Otherwise the loader may use it again for its next
            batch.
    """

    batch: Batch
    sizes: tuple[int, ...]
    owned: bool

    def own(self) -> "Chunk":
        """The chunk in memory of its own."""
        return self if self.owned else Chunk(copied(self.batch), self.sizes, owned=True)

    def split(self) -> "list[Chunk]":
        """Split the chunk into the parts that came from each of the loader's batches."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        return [self.part(start, start + n) for start, n in zip(starts, self.sizes, strict=True)]

    def part(self, start: int, stop: int) -> "Chunk":
        """The samples from `start` to before `stop`."""
        sizes, end = [], 0
        for size in self.sizes:
            sizes.append(max(0, min(stop, end + size) - max(start, end)))
            end += size
        batch = take(self.batch, slice(start, stop))
        return Chunk(batch, tuple(size for size in sizes if size), self.owned)


def chunk_of(batches: list[Batch], *, owned: bool) -> Chunk:
    """A chunk with the samples of all batches."""
    return Chunk(join(batches), tuple(n_samples(part) for part in batches), owned)


def not_empty(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches as pytrees that have at least one sample."""
    for batch in _as_pytrees(batches):
        if n_samples(batch):
            yield _without_graph(batch)


def _without_graph(batch: Batch) -> Batch:
    """The batch as constants: no backward pass reaches the caller's tensors.

    Args:
        batch: The caller's.

    Returns:
        The batch, detached.

    Raises:
        TypeError: It has a nested tensor.
    """

    def constant(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_nested:
            raise TypeError(
                f"`batches` holds a nested tensor ({leaf.layout}), which can't be cut into its "
                "samples: pass padded tensors with a mask or lengths, and let `forward` make it."
            )
        if leaf.is_inference():
            return leaf.clone()
        return leaf.detach() if leaf.requires_grad else leaf

    return _mapped(constant, batch)


def rechunk(
    batches: Iterable[Batch],
    size: Callable[[], int],
    may_join: Callable[[], bool],
    before_next: Callable[[], object] = lambda: None,
) -> Iterator[Chunk]:
    """Regroup batches into chunks of `size` samples, where their shapes allow it.

    The sums over samples do not depend on the batches they come in, so the engine takes the size
    that is fast instead of the one that a data loader happens to have. Samples that wait for the
    next batch are copied: a loader may use its buffers again.

    Args:
        batches: Any batches with samples.
        size: Function that returns the number of samples per chunk.
        may_join: Function that returns whether a chunk may join samples of several batches.
        before_next: Called before the next batch is read: chunks that are not `owned` end here.

    Yields:
        Chunks of `size`; a smaller one where shapes change, and at the end.
    """
    waiting: list[Batch] = []
    n_waiting = 0
    for batch in batches:
        N, start = n_samples(batch), 0
        if waiting and not (may_join() and joinable(waiting[0], batch)):
            yield chunk_of(waiting, owned=True)
            waiting, n_waiting = [], 0
        while start < N:
            n = min(N - start, max(1, size() - n_waiting))
            waiting.append(batch if n == N else take(batch, slice(start, start + n)))
            start, n_waiting = start + n, n_waiting + n
            if n_waiting >= size():
                yield chunk_of(waiting, owned=len(waiting) > 1)
                waiting, n_waiting = [], 0
        if waiting:
            waiting[-1] = copied(waiting[-1])
        before_next()
    if waiting:
        yield chunk_of(waiting, owned=True)


def draw_indices(N: int, count: int, generator: torch.Generator) -> list[int]:
    """Draw min(count, N) distinct indices below N, in ascending order."""
    drawn = torch.randperm(N, generator=generator, device=generator.device)[:count]
    return sorted(drawn.tolist())


def draw_samples(
    batches: Iterable[Batch], count: int, generator: torch.Generator
) -> Iterable[Batch]:
    """At most `count` of the samples of `batches`, without reading the others.

    Of a `DataLoader` over a map-style dataset in its default order or shuffled, and of a list or
    tuple of batches, they are drawn without replacement and come in their order. Of anything else,
    which can only be read from its beginning, they are the first ones.

    Args:
        batches: Any batches.
        count: How many samples.
        generator: Draws them.

    Returns:
        Batches of them.
    """
    if isinstance(batches, DataLoader) and _has_plain_order(batches):
        return _loader_of(batches, draw_indices(len(batches.dataset), count, generator))  # type: ignore[arg-type]
    if isinstance(batches, list | tuple):
        return _drawn_from(batches, count, generator)
    return _first_samples(batches, count)


def _has_plain_order(loader: DataLoader[Any]) -> bool:
    plain = type(loader.batch_sampler) is BatchSampler and not loader.drop_last
    shuffled = type(loader.sampler) is RandomSampler and not loader.sampler.replacement
    return (
        plain
        and type(loader).__iter__ is DataLoader.__iter__  # a subclass may change its batches
        and (type(loader.sampler) is SequentialSampler or shuffled)
        and (not shuffled or loader.sampler.num_samples == len(loader.dataset))  # type: ignore[attr-defined, arg-type]
    )


def _loader_of(loader: DataLoader[Any], indices: list[int]) -> DataLoader[Any]:
    """A loader like `loader`, of some of its samples."""
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=indices,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )


def _drawn_from(
    batches: Sequence[Batch], count: int, generator: torch.Generator
) -> Iterator[Batch]:
    sizes = [n_samples(batch) for batch in _as_pytrees(batches)]
    drawn = torch.tensor(draw_indices(sum(sizes), count, generator), device="cpu")
    start = 0
    for batch, size in zip(_as_pytrees(batches), sizes, strict=True):
        inside = drawn[(drawn >= start) & (drawn < start + size)] - start
        if len(inside):
            yield take(batch, inside)
        start += size


def _first_samples(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    for batch in _as_pytrees(batches):
        part = take(batch, slice(0, count))
        yield part
        count -= n_samples(part)
        if not count:
            return

"""Whether a forward pass picks or reorders rows by the data.

A layer rule takes it that the rows of a layer's input belong to the samples in their order, to each
as many as in the probe. Tokens sorted by expert, users by id, or sequences by length may come in
another order in every batch, and a matching total does not show to which sample a row belongs.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ewc_plugin.fisher.tracing.lineage import tensors_in

# By name: most exist as functions and as methods, and with an underscore.
_KINDS = {
    **dict.fromkeys(("nonzero", "argwhere", "masked_select"), "count"),
    **dict.fromkeys(("unique", "_unique2", "unique_consecutive", "unique_dim"), "distinct"),
    **dict.fromkeys(("_unique_impl", "_return_inverse", "_return_output"), "distinct"),
    **dict.fromkeys(("repeat_interleave", "where"), "count"),
    **dict.fromkeys(("__getitem__", "__setitem__", "index_put", "embedding"), "index"),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_reduce"), "index"),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), "along"),
    **dict.fromkeys(("take_along_dim", "sort", "topk"), "along"),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "vstack"), "join"),
    **dict.fromkeys(("split", "split_with_sizes"), "split"),
    "_pack_padded_sequence": "pack",
}
# Where a function of kind "along" has its axis and its index; a sort gives the latter.
_PLACES = {"take_along_dim": (2, 1), "sort": (1, None), "topk": (2, None)}


@lru_cache(1024)
def _named(func: Any) -> tuple[str, str | None]:
    """A function's name, without the underscore of one that works in place; and its kind."""
    name = getattr(func, "__name__", "")
    name = name if name.startswith("__") else name.rstrip("_")
    return name, _KINDS.get(name)


class RowOrder:
    """Watches what a forward pass does to the rows of the batch.

    Attributes:
        lost: Whether it is unknown from here on which sample a row belongs to.
    """

    def __init__(self, N: int, of_batch: Callable[[Any], bool]) -> None:
        self.lost = False
        self._N, self._of_batch = N, of_batch
        self._sorted: list[Tensor] = []  # as `pack_padded_sequence` sorts what it packs
        self._orders: list[Tensor] = []  # of packed sequences
        self._distinct: list[Tensor] = []  # values of the whole batch, and what comes from them
        self._packed = self._packed_sorted = False

    def is_known(self, read: Sequence[Tensor], *, recurrent: bool) -> bool:
        """Whether the rows of what a layer reads belong to the samples in their order."""
        self.lost |= bool(self._sorted)
        if self._packed and not recurrent and not any(self._N in t.shape[:2] for t in read):
            return False  # the steps of packed sequences, of which some have ended
        return not self.lost and not self._are_distinct(read)

    def _are_distinct(self, read: Sequence[Any]) -> bool:
        return any(t is one for t in read for one in self._distinct)

    def of_recurrent(self, x: Any) -> Tensor | None:
        """Return the order of the samples in what a recurrent layer reads; None: their own."""
        if not isinstance(x, PackedSequence):
            return None
        orders = [t for t in (x.sorted_indices, x.unsorted_indices) if t is not None]
        self.lost |= self._packed_sorted and not orders  # sorted by the model itself
        self._orders += orders
        self._packed_sorted = False
        return x.unsorted_indices

    def see(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any = None) -> None:
        """Look at a call of a function that reads the batch."""
        name, kind = _named(func)
        if kind == "distinct" or (self._distinct and self._are_distinct(tensors_in(args))):
            values = out[:1] if kind == "distinct" and isinstance(out, tuple) else (out,)
            self._distinct += [t for t in tensors_in(values) if t.dim()]
        if kind is None or kind == "distinct" or self.lost:
            return
        args = (*args, *kwargs.values()) if kind in ("join", "split") else args
        if not args:
            self.lost = True  # all by keyword
        elif kind == "pack":
            self._packed, self._packed_sorted = True, any(t is args[0] for t in self._sorted)
            self._sorted = [t for t in self._sorted if not any(t is arg for arg in args[:2])]
        elif kind == "count":
            self.lost = self._counts(name, args, kwargs)
        elif kind == "join":
            self.lost = self._joins(*args[:2])
        elif kind == "split":
            self.lost = self._tears(args[0], args[1], args[2] if len(args) > 2 else 0)
        elif kind == "index":
            lost = self._indexes(name, args, kwargs)
            if lost and name == "index_select":
                self._sorted.append(out)
            else:
                self.lost = lost
        elif self._N > 1 and self._of_batch(args[0]):
            lengths = name == "sort" and args[0].dim() == 1 and not args[0].is_floating_point()
            if lengths:
                self._sorted.append(out[0])
            else:
                self.lost = self._along(name, args, kwargs, out)

    def _counts(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        if name == "repeat_interleave":
            return isinstance(args[1] if len(args) > 1 else kwargs.get("repeats"), Tensor)
        return name != "where" or len(args) + len(kwargs) == 1

    def _joins(self, pieces: Any, dim: Any = 0) -> bool:
        """Whether pieces that are not as long, or not in the order of the memory, are joined."""
        if self._N == 1 or not isinstance(pieces, (tuple, list)) or dim != 0 or len(pieces) < 2:
            return False
        starts = [p.storage_offset() for p in pieces]
        same = len({p.untyped_storage().data_ptr() for p in pieces}) == 1
        if same and starts != sorted(starts):
            return True
        sizes = [len(p) if p.dim() else 1 for p in pieces]
        return self._of_other_sizes(sizes)

    def _tears(self, t: Any, sizes: Any, dim: Any) -> bool:
        return dim == 0 and isinstance(sizes, (tuple, list)) and self._of_other_sizes(sizes)

    def _of_other_sizes(self, sizes: Sequence[int]) -> bool:
        whole = sum(sizes) % self._N == 0 and any(size % self._N for size in sizes)
        return whole and len(set(sizes)) > 1

    def _indexes(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        if name == "embedding":
            t, index = args[1] if len(args) > 1 else kwargs["weight"], (args[0],)
        elif name.startswith("index_") and name != "index_put":
            t = args[0]
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            picked = args[2] if len(args) > 2 else kwargs["index"]
            index = (*[slice(None)] * (dim % max(t.dim(), 1)), picked)
        else:
            t = args[0]
            found = args[1] if len(args) > 1 else kwargs["indices"]
            index = tuple(found) if isinstance(found, tuple) or name == "index_put" else (found,)
        masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool]
        # A mask [N] has a sample's row once or not at all.
        if name != "embedding" and any(mask.shape != (self._N,) for mask in masks):
            return True
        if self._N == 1 or not self._of_batch(t):
            return False
        by_dim = _by_dim(t, index)
        if not any(self._from_data(i) for i in by_dim.values()):
            return False
        whole = torch.broadcast_tensors(*map(torch.as_tensor, by_dim.values()))
        flat = dict(zip(by_dim, (i.flatten() for i in whole), strict=True))
        if 0 in flat and t.size(0) % self._N == 0:
            return not self._in_order(flat[0][:, None], t.size(0))
        on_second = 1 in flat and t.size(1) == self._N
        return on_second and not self._in_order(flat[1][:, None], self._N)

    def _from_data(self, index: Any) -> bool:
        if isinstance(index, Tensor):
            return self._of_batch(index) and not any(index is order for order in self._orders)
        return True  # a list

    def _along(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> bool:
        at_dim, at_index = _PLACES.get(name, (1, 2))
        t, default = args[0], None if name == "take_along_dim" else -1
        dim = args[at_dim] if len(args) > at_dim else kwargs.get("dim", default)
        if at_index is None:
            index = out[1]
        else:
            names = ("index", "indices")
            index = args[at_index] if len(args) > at_index else kwargs.get(names[at_index == 1])
        if dim is None:
            t, index, dim = t.flatten(), index.flatten(), 0
        if not t.dim() or not self._from_data(index):
            return False
        if name.startswith("scatter"):
            written = args[3] if len(args) > 3 else kwargs.get("src")
            if not (isinstance(written, Tensor) and self._of_batch(written)):
                return False  # constants, as where a permutation is inverted
        dim %= t.dim()
        if (dim == 0 and t.size(0) % self._N == 0) or (dim == 1 and t.size(1) == self._N):
            return not self._in_order(index.movedim(dim, 0).flatten(1), t.size(dim))
        return False

    def _in_order(self, index: Tensor, size: int) -> bool:
        """Whether rows picked from `size` ones, [R, ...], are as many of each sample, in order."""
        R = len(index)
        if R % self._N or size % self._N:
            return not R
        samples = torch.arange(self._N, device=index.device).repeat_interleave(R // self._N)
        shape = (-1, *[1] * (index.dim() - 1))
        found = index.remainder(size).div(size // self._N, rounding_mode="floor")
        return bool((found == samples.view(shape)).all())


def _by_dim(t: Tensor, index: Sequence[Any]) -> dict[int, Any]:
    """The integer indices in t[index], each by the axis that it picks from."""
    found: dict[int, Any] = {}
    axes = [_axes(i) for i in index]
    dim = 0
    for i, n in zip(index, axes, strict=True):
        if i is Ellipsis:
            n = t.dim() - sum(axes)
        elif isinstance(i, list) or (isinstance(i, Tensor) and i.dtype != torch.bool):
            found[dim] = i
        dim += n
    return found


def _axes(index: Any) -> int:
    """How many axes one index takes."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    return index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1

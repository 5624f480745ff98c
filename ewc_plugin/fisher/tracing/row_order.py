"""Whether a forward pass picks or reorders rows by the data.

A layer rule takes it that the rows of a layer's input belong to the samples in their order, to each
as many as in the probe. Tokens sorted by expert, users by id, or sequences by length may come in
another order in every batch, and a matching total does not show to which sample a row belongs.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
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
    **dict.fromkeys(("take_along_dim", "take", "sort", "topk"), "along"),
    **dict.fromkeys(("cat", "concat", "concatenate", "vstack"), "join"),
    **dict.fromkeys(("stack", "pad_sequence"), "join"),
    **dict.fromkeys(("matmul", "mm", "__matmul__"), "mix"),
    "roll": "roll",
    **dict.fromkeys(("split", "split_with_sizes"), "split"),
    "_pack_padded_sequence": "pack",
}
# Where a function of kind "along" has its axis and its index; a sort gives the latter.
_PLACES = {"take_along_dim": (2, 1), "take": (9, 1), "sort": (1, None), "topk": (2, None)}


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
        self._sorted: list[Tensor] = []  # rows, as `pack_padded_sequence` sorts what it packs
        self._orders: list[Tensor] = []  # of packed sequences
        self._moved: list[Tensor] = []  # distinct or sorted numbers, and what comes from them
        self._packed = self._packed_sorted = False

    def is_known(self, read: Sequence[Tensor], *, recurrent: bool) -> bool:
        """Whether the rows of what a layer reads belong to the samples in their order."""
        self.lost |= bool(self._sorted)
        if self._packed and not recurrent and not any(self._N in t.shape[:2] for t in read):
            return False  # the steps of packed sequences, of which some have ended
        return not self.lost and not _share(read, self._moved)

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
        args = args or (kwargs.get("input", kwargs.get("condition")),)
        if kind == "pack":
            self._packed, self._packed_sorted = True, _share(args[:1], self._sorted)
            self._sorted = [t for t in self._sorted if t is not args[0]]
            return
        if name == "sort" and args[0].dim() == 1 and not args[0].is_floating_point():
            kind = "distinct"  # lengths or ids in order
        if kind == "distinct" or (self._moved and _share(tensors_in(args), self._moved)):
            values = out[:1] if isinstance(out, tuple) and kind else (out,)
            self._moved += [t for t in tensors_in(values) if t.dim()]
        if kind in (None, "distinct") or self.lost or self._N == 1:
            return
        if any(is_functorch_wrapped_tensor(t) for t in tensors_in(args)):
            return  # of one sample, inside of a `vmap` of the model's own
        lost = self._loses(name, kind, args, kwargs, out)
        if lost and name == "index_select":
            self._sorted.append(out)
        else:
            self.lost = lost

    def _loses(
        self, name: str, kind: str | None, args: Any, kwargs: dict[str, Any], out: Any
    ) -> bool:
        if kind == "count":
            return self._counts(name, args, kwargs)
        if kind == "join":
            pieces = next((a for a in (*args, *kwargs.values()) if isinstance(a, tuple | list)), ())
            dim = 0 if name == "pad_sequence" else _given(args, kwargs, 1, "dim", 0)
            return self._joins(pieces, dim, stacked=name in ("stack", "pad_sequence"))
        if kind == "split":
            sizes = _given(args, kwargs, 1, "split_size_or_sections")
            dim = _given(args, kwargs, 2, "dim", 0)
            return dim == 0 and isinstance(sizes, tuple | list) and self._of_other_sizes(sizes)
        if kind == "index":
            return self._indexes(name, args, kwargs)
        if not self._of_batch(args[0]):
            return False
        if kind == "roll":
            dims = _given(args, kwargs, 2, "dims", ())
            dims = dims if isinstance(dims, tuple | list) else (dims,)
            return not (dims and 0 not in dims) and args[0].size(0) % self._N == 0
        if kind == "mix":  # rows of one by the other: a permutation, perhaps
            other = _given(args, kwargs, 1, "mat2" if name == "mm" else "other")
            if not isinstance(other, Tensor) or not self._of_batch(other):
                return False
            rows = args[0].dim() == other.dim() == 2
            return rows and len(other) % self._N == len(args[0]) % self._N == 0
        return self._along(name, args, kwargs, out)

    def _counts(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        if name == "repeat_interleave":
            return isinstance(_given(args, kwargs, 1, "repeats"), Tensor)
        return name != "where" or len(args) + len(kwargs) == 1

    def _joins(self, pieces: Sequence[Tensor], dim: int, *, stacked: bool) -> bool:
        """Whether pieces of single samples are joined in another order than the memory's."""
        if len(pieces) < 2 or dim not in (0, -pieces[0].dim() - stacked):
            return False
        sizes = [1] * len(pieces) if stacked else [len(p) for p in pieces]
        if sum(sizes) % self._N or not any(size % self._N for size in sizes):
            return False
        if stacked and pieces[0].dim() > 1 and self._N in pieces[0].shape[:2]:
            return False  # steps or layers of all samples
        if any(p.layout != torch.strided for p in pieces):
            return True
        starts = [p.storage_offset() for p in pieces]
        one_memory = len({p.untyped_storage().data_ptr() for p in pieces}) == 1
        return not one_memory or starts != sorted(starts) or len(set(sizes)) > 1

    def _of_other_sizes(self, sizes: Sequence[int]) -> bool:
        whole = sum(sizes) % self._N == 0 and any(size % self._N for size in sizes)
        return whole and len(set(sizes)) > 1

    def _indexes(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        if name == "embedding":
            t, index = _given(args, kwargs, 1, "weight"), (args[0],)
        elif name.startswith("index_") and name != "index_put":
            t = args[0]
            dim, picked = _given(args, kwargs, 1, "dim"), _given(args, kwargs, 2, "index")
            index = (*[slice(None)] * (dim % max(t.dim(), 1)), picked)
        else:
            t = args[0]
            found = _given(args, kwargs, 1, "indices")
            index = tuple(found) if isinstance(found, tuple) or name == "index_put" else (found,)
        if name in ("__setitem__", "index_put"):
            value = _given(args, kwargs, 2, "values")
            if not (isinstance(value, Tensor) and value.dim() and self._of_batch(value)):
                return False  # every row gets the same
            if isinstance(index[0], int) and t.size(0) % self._N == 0:
                return value.dim() == 1 or value.size(0) != self._N  # else a step of all samples
        masks = [i for i in index if _is_mask(i)]
        # A mask [N] has a sample's row once or not at all; what is written was picked before.
        if name == "__getitem__" and any(mask.shape != (self._N,) for mask in masks):
            return True
        if not self._of_batch(t):
            return False
        by_dim = _by_dim(t, index)
        if not by_dim or _share(by_dim.values(), self._orders):
            return False
        whole = torch.broadcast_tensors(*map(torch.as_tensor, by_dim.values()))
        flat = dict(zip(by_dim, (i.flatten() for i in whole), strict=True))
        if 0 in flat and t.size(0) % self._N == 0:
            return not self._in_order(flat[0][:, None], t.size(0))
        on_second = 1 in flat and t.size(1) == self._N != t.size(0)
        return on_second and not self._in_order(flat[1][:, None], self._N)

    def _along(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> bool:
        at_dim, at_index = _PLACES.get(name, (1, 2))
        t, default = args[0], None if name.startswith("take") else -1
        dim = _given(args, kwargs, at_dim, "dim", default)
        if at_index is None:
            index = out[1]
        else:
            by_name = kwargs.get("index", kwargs.get("indices"))
            index = args[at_index] if len(args) > at_index else by_name
        if dim is None:
            t, index, dim = t.flatten(), index.flatten(), 0
        if not t.dim() or _share([index], self._orders):
            return False
        if name.startswith("scatter"):
            written = _given(args, kwargs, 3, "src")
            if not (isinstance(written, Tensor) and self._of_batch(written)):
                return False  # constants, as where a permutation is inverted
        dim %= t.dim()
        on_second = dim == 1 and t.size(1) == self._N != t.size(0)
        if (dim == 0 and t.size(0) % self._N == 0) or on_second:
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


def _share(some: Iterable[Any], others: Sequence[Any]) -> bool:
    """Whether an object is among both."""
    return any(one is other for one in some for other in others)


def _given(args: Any, kwargs: dict[str, Any], place: int, name: str, default: Any = None) -> Any:
    """An argument, given by place or by name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def _by_dim(t: Tensor, index: Sequence[Any]) -> dict[int, Any]:
    """The integer indices in t[index], each by the axis that it picks from."""
    found: dict[int, Any] = {}
    axes = [_axes(i) for i in index]
    dim = 0
    for i, n in zip(index, axes, strict=True):
        if i is Ellipsis:
            n = t.dim() - sum(axes)
        elif not (i is None or isinstance(i, int | slice) or _is_mask(i)):
            found[dim] = i  # a tensor, a list or an array
        dim += n
    return found


def _axes(index: Any) -> int:
    """How many axes one index takes."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    return index.dim() if _is_mask(index) else 1


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool

"""`Pairs`: parameters and their quadratics, prepared for the arithmetic of every step.

On a CPU that arithmetic is limited by memory traffic and by the cost of each call. Large parameters
go in blocks that fit the cache, and small ones side by side as one vector. What does not change
before the next experience is made once: views of S, offset and anchor, and memory for e.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ewc_plugin.penalty.quadratic import Quadratic, compute_dtype

Pair = tuple[Tensor, Quadratic]
"""A parameter and its part of the penalty, in the same shape."""

BLOCK = 1 << 19  # entries that go through a core's share of the cache together
_LARGE = 1 << 14  # smaller parameters: call overhead exceeds memory traffic


class Pairs(list[Pair]):
    """Pairs of a parameter and its quadratic, whose tensors are never changed in place."""

    @property
    def large(self) -> list[Blocks]:
        """Each large parameter, in blocks; one that is not contiguous any more is in `others`."""
        return [blocks for blocks in self._prepared[0] if blocks.theta.is_contiguous()]

    @property
    def small(self) -> list[SideBySide]:
        """Small parameters of one type each."""
        return self._prepared[1]

    @property
    def others(self) -> list[Pair]:
        """The others: off the CPU, strided, or in another type than they are computed in."""
        moved = [b for b in self._prepared[0] if not b.theta.is_contiguous()]
        return self._prepared[2] + [(b.theta, b.quadratic) for b in moved]

    @cached_property
    @torch.inference_mode(False)  # a step writes into what a call in inference mode has prepared
    def _prepared(self) -> tuple[list[Blocks], list[SideBySide], list[Pair]]:
        large: list[Blocks] = []
        small: dict[torch.dtype, list[Pair]] = {}
        others: list[Pair] = []
        scratch: dict[torch.dtype, Tensor] = {}
        for theta, q in self:
            if not _is_plain(theta, q):
                others.append((theta, q))
            elif theta.numel() <= _LARGE:
                small.setdefault(theta.dtype, []).append((theta, q))
            else:
                large.append(Blocks(theta, q, scratch))
        return large, [SideBySide(pairs) for pairs in small.values()], others


def _is_plain(theta: Tensor, q: Quadratic) -> bool:
    """Whether a parameter and its quadratic are in one type, dense and contiguous on a CPU."""
    return all(
        t.device.type == "cpu" and t.dtype == compute_dtype(theta) and t.is_contiguous()
        for t in (theta, *q.tensors)
    )


class Pull:
    """What an implicit step moves parameters towards, and how far: made once for a learning rate.

    Attributes:
        minimum: Of the penalty. It is rounded as the parameters themselves are, which a step that
            ends there may, and a gradient may not (see `Quadratic`).

    Args:
        S: As in `Quadratic`, like the others.
        offset: Anchor less minimum, or None where it is zero.
        anchor: The last theta*.
    """

    @torch.inference_mode(False)
    def __init__(self, S: Tensor, offset: Tensor | None, anchor: Tensor) -> None:
        self.minimum = anchor if offset is None else anchor - offset
        self._S, self._weight, self._stiffness = S, torch.empty_like(S), -1.0

    def weight(self, stiffness: float) -> Tensor:
        """S / (stiffness + S), of the minimum in its mean with the parameter. Memory is reused."""
        if stiffness != self._stiffness:
            torch.add(self._S, stiffness, out=self._weight)
            torch.div(self._S, self._weight, out=self._weight)
            self._stiffness = stiffness
        return self._weight


class Blocks:
    """A large parameter in blocks of about equal size.

    Attributes:
        theta: The parameter.
        quadratic: Its quadratic.
        kept: Of each block its anchor, S, offset and memory for e.
    """

    def __init__(self, theta: Tensor, q: Quadratic, scratch: dict[torch.dtype, Tensor]) -> None:
        self.theta, self.quadratic = theta, q
        n_blocks = max(1, round(theta.numel() / BLOCK))
        self._size = size = -(-theta.numel() // n_blocks)
        if size > len(scratch.get(theta.dtype, ())):
            scratch[theta.dtype] = torch.empty(size, dtype=theta.dtype)
        anchors, fishers = (t.view(-1).split(size) for t in (q.anchor, q.fisher))
        offsets = [None] * len(anchors) if q.offset is None else q.offset.view(-1).split(size)
        e = [scratch[theta.dtype][: len(anchor)] for anchor in anchors]
        self.kept = list(zip(anchors, fishers, offsets, e, strict=True))

    @cached_property
    def pull(self) -> Pull:
        """Of the whole parameter."""
        return Pull(*self.quadratic.loaded(self.theta))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of a contiguous tensor of the parameter's shape, a block each."""
        return torch.split(tensor.detach().view(-1), self._size)

    def distances(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield e and S of each block. The memory of e is used again."""
        for x, (anchor, S, offset, e) in zip(self.split(self.theta), self.kept, strict=True):
            torch.sub(x, anchor, out=e)
            yield (e if offset is None else e.add_(offset)), S


class SideBySide:
    """Small parameters of one type as one vector.

    Attributes:
        pairs: The parameters and their quadratics.
        S: Of all, [P].
        change: Memory [P] for what is to be added to each parameter or its gradient.
        changes: Views of it, in the parameters' shapes.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.S = torch.cat([q.fisher.view(-1) for _, q in pairs])
        self._anchor = torch.cat([q.anchor.view(-1) for _, q in pairs])
        self._offset = None
        if any(q.offset is not None for _, q in pairs):
            offsets = [
                torch.zeros_like(q.anchor) if q.offset is None else q.offset for _, q in pairs
            ]
            self._offset = torch.cat([offset.view(-1) for offset in offsets])
        self._e, self.change = torch.empty_like(self.S), torch.empty_like(self.S)
        self._thetas = [theta for theta, _ in pairs]
        self.changes = self.views(self.change)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parameters' parts of a vector [P], in their shapes."""
        parts = vector.split([theta.numel() for theta in self._thetas])
        return [part.view_as(theta) for part, theta in zip(parts, self._thetas, strict=True)]

    @cached_property
    def pull(self) -> Pull:
        """Of the vector [P]."""
        return Pull(self.S, self._offset, self._anchor)

    def distance(self) -> Tensor:
        """Return e [P]. Its memory is used again."""
        torch.cat([theta.detach().reshape(-1) for theta in self._thetas], out=self._e)
        e = self._e.sub_(self._anchor)
        return e if self._offset is None else e.add_(self._offset)

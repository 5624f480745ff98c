"""One parameter's share of the penalty: a sum of quadratics, folded into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Quadratic:
    """sum_t F_t (theta - theta*_t)^2 = sum d (S d + 2 B) + constant, with d = theta - anchor.

    Anchored at the last theta*, because in M = sum F theta* / S, the textbook form, large terms
    cancel: its float32 gradient is off by 5e-5 where this one's is by 3e-7 (100 experiences).

    Attributes:
        fisher: S, the sum of the F_t.
        offset: B = sum_t F_t (anchor - theta*_t); None for zero.
        anchor: The last theta*.
        constant: The value at the anchor.
        at_rest: Whether the parameter was still at an anchor where the gradient is zero when it
            was last looked at.
    """

    fisher: Tensor
    offset: Tensor | None
    anchor: Tensor
    constant: float = 0.0
    at_rest: bool = True

    def move_anchor(self, theta: Tensor) -> None:
        """The same function of theta, written around another anchor."""
        D = theta - self.anchor
        if not D.any():
            return
        D64 = D.double()
        SD = self.fisher.double() * D64
        B = torch.zeros_like(SD) if self.offset is None else self.offset.double()
        self.constant += float((D64 * (2 * B + SD)).sum())
        offset = (B + SD).to(self.fisher.dtype)
        self.offset = offset if bool(offset.any()) else None
        self.anchor = theta

    def restart(self, theta: Tensor, decay_factor: float) -> None:
        """decay_factor S (theta - theta_new)^2: one quadratic, its minimum moved to `theta`."""
        self.fisher = decay_factor * self.fisher
        self.offset = None
        self.constant = 0.0
        self.anchor = theta

    def add(self, fisher: Tensor) -> None:
        """One more experience whose theta* is the anchor."""
        self.fisher = self.fisher + fisher  # out of place: the first one is the caller's tensor

    def grow(self, shape: torch.Size) -> None:
        """Zeros for the units that were added at the end of any axis: they are not penalised."""
        self.fisher = _padded(self.fisher, shape)
        self.anchor = _padded(self.anchor, shape)  # any value serves where S = B = 0
        if self.offset is not None:
            self.offset = _padded(self.offset, shape)

    @property
    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        return [t for t in (self.fisher, self.offset, self.anchor) if t is not None]


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(n) for n in tensor.shape)] = tensor
    return larger

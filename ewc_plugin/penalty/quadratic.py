"""One parameter's share of the penalty: a sum of quadratics, folded into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Storage:
    """Where and how S and B are kept between steps; None: as the parameter is.

    Attributes:
        dtype: Of S and B. The anchor keeps the parameter's precision: rounding it would pull.
        device: Of everything.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def put(self, tensor: Tensor, parameter: Tensor, *, exact: bool = False) -> Tensor:
        """`tensor` as it is kept; `exact` for an anchor."""
        dtype = None if exact else self.dtype
        return tensor.to(self.device or parameter.device, dtype or compute_dtype(parameter))


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The precision that the penalty of `parameter` is computed in: float32 or wider."""
    return torch.promote_types(parameter.dtype, torch.float32)


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
        if bool(D.any()):
            D64 = D.double()
            SD = self.fisher.double() * D64
            B = torch.zeros_like(SD) if self.offset is None else self.offset.double()
            self.constant += float((D64 * (2 * B + SD)).sum())
            offset = (B + SD).to(self.fisher.dtype)
            self.offset = offset if bool(offset.any()) else None
            self.anchor = theta
        self.at_rest = self.offset is None

    def restart(self, theta: Tensor, decay_factor: float) -> None:
        """decay_factor S (theta - theta_new)^2: one quadratic, its minimum moved to `theta`."""
        self.fisher = decay_factor * self.fisher
        self.offset = None
        self.constant = 0.0
        self.anchor = theta
        self.at_rest = True

    def add(self, fisher: Tensor) -> None:
        """One more experience whose theta* is the anchor."""
        self.fisher = self.fisher + fisher  # out of place: the first one is the caller's tensor

    def fit(self, name: str, parameter: nn.Parameter, storage: Storage) -> None:
        """Follows the parameter to another device, precision or larger shape.

        Args:
            name: For the message.
            parameter: What the quadratic is about.
            storage: How it is kept.

        Raises:
            ValueError: The parameter has shrunk or has other axes.
        """
        self.fisher = storage.put(self.fisher, parameter)
        self.anchor = storage.put(self.anchor, parameter, exact=True)
        if self.offset is not None:
            self.offset = storage.put(self.offset, parameter)
        if self.anchor.shape == parameter.shape:
            return
        before, now = self.anchor.shape, parameter.shape
        if len(before) != len(now) or any(b > n for b, n in zip(before, now, strict=True)):
            raise ValueError(
                f"`{name}` is {tuple(now)} in the model and {tuple(before)} in the penalty: it can "
                "grow along its axes, not shrink. Use a new penalty for a new architecture."
            )
        # Zeros for the units that were added at the end: they are not penalised.
        self.fisher = _padded(self.fisher, now)
        self.anchor = _padded(self.anchor, now)  # any value serves where S = B = 0
        if self.offset is not None:
            self.offset = _padded(self.offset, now)

    def loaded(self, parameter: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """S, B and the anchor on the parameter's device, in the precision to compute in."""
        device, dtype = parameter.device, compute_dtype(parameter)
        offset = None if self.offset is None else self.offset.to(device, dtype)
        return self.fisher.to(device, dtype), offset, self.anchor.to(device, dtype)

    def is_at_rest(self, parameter: Tensor) -> bool:
        """Whether the parameter is where every experience left it, so that the gradient is 0."""
        # Looked at only until it has moved: in a network that trains, old heads alone stay.
        if self.at_rest:
            anchor = self.anchor.to(parameter.device)
            self.at_rest = torch.equal(parameter.detach().to(anchor.dtype), anchor)
        return self.at_rest

    @property
    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        return [t for t in (self.fisher, self.offset, self.anchor) if t is not None]


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(n) for n in tensor.shape)] = tensor
    return larger

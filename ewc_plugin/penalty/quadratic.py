"""`Quadratic`: one parameter's penalty, the sum of all experiences' quadratics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """Type and device of the tensors that the penalty keeps; None means the parameter's own.

    Attributes:
        dtype: Of S and the offset. The anchor keeps the parameter's precision, because a rounded
            anchor would pull the parameter away from where it is.
        device: Of all three.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def put(self, tensor: Tensor, parameter: Tensor, *, exact: bool = False) -> Tensor:
        """Convert to the storage device and dtype; with `exact` (an anchor), in full precision."""
        dtype = None if exact else self.dtype
        return tensor.to(self.device or parameter.device, dtype or compute_dtype(parameter))


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Real type in which the penalty of `parameter` is computed: float32 or wider."""
    wide = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """View of a complex tensor [...] as real and imaginary parts [..., 2]; a real tensor as it is.

    The square of a complex number's size is the sum of the squares of both parts, and its gradient
    in torch is that of the parts, so that all arithmetic of the penalty is real.

    Args:
        tensor: Real or complex [...].

    Returns:
        A real tensor on the same memory.
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class Quadratic:
    """sum_t F_t (theta - theta*_t)^2 = sum S e^2 + constant, with e = theta - anchor + offset.

    The anchor is the last theta* and anchor - offset the minimum, sum_t F_t theta*_t / S. The
    difference theta - anchor is exact or nearly so, since both are close: the gradient 2 S e is
    accurate to 3e-7 after 100 experiences in float32. Keeping the minimum itself would round it to
    float32 and make the gradient off by 5e-5. Tensors are never changed in place.

    Attributes:
        fisher: S, the sum of the F_t.
        offset: Anchor minus minimum; 0 where S = 0. None if it is zero everywhere.
        anchor: The last theta*.
        constant: The value at the minimum.
    """

    fisher: Tensor
    offset: Tensor | None
    anchor: Tensor
    constant: float = 0.0

    def moved_to(self, theta: Tensor) -> Quadratic:
        """Return the same function of theta, expressed with another anchor."""
        offset = theta.double() - self.anchor.double()
        if self.offset is not None:
            offset += self.offset
        return replace(self, offset=self._kept(offset * (self.fisher != 0)), anchor=theta)

    def restarted(self, theta: Tensor, decay_factor: float) -> Quadratic:
        """decay_factor * S (theta - theta_new)^2: one quadratic with its minimum at theta_new."""
        return Quadratic(decay_factor * self.fisher, None, theta)

    def plus(self, fisher: Tensor) -> Quadratic:
        """Add one experience whose theta* is the anchor.

        S e^2 + F d^2 = (S + F) (d + S / (S + F) offset)^2 + S F / (S + F) offset^2 for e = d +
        offset: the new minimum is a weighted mean, and the constant only ever grows.

        Args:
            fisher: F of the experience, in the shape of S.

        Returns:
            The sum.
        """
        total = self.fisher.double() + fisher.double()
        result = replace(self, fisher=total.to(self.fisher.dtype))
        if self.offset is None:
            return result
        offset = self.offset.double()
        share = (self.fisher.double() / total).nan_to_num_(0.0)  # 0 / 0: nothing is penalised
        constant = self.constant + float((fisher.double() * share * offset.square()).sum())
        return replace(result, offset=self._kept(share.mul_(offset)), constant=constant)

    def _kept(self, offset: Tensor) -> Tensor | None:
        return offset.to(self.fisher.dtype) if bool(offset.any()) else None

    def matched(self, name: str, parameter: Tensor, storage: Storage) -> Quadratic:
        """The same function for a parameter that changed its device, precision or size.

        Args:
            name: Of the parameter, for the message.
            parameter: The one that the model has now. Units that were added at the end of an axis
                are not penalised.
            storage: Where and how tensors are kept.

        Returns:
            A new quadratic; this one, if nothing changed.

        Raises:
            ValueError: The parameter has shrunk or has other axes.
        """
        before, now = self.anchor.shape, as_real(parameter).shape
        if len(before) != len(now) or any(b > n for b, n in zip(before, now, strict=True)):
            raise ValueError(
                f"`{name}` is {tuple(now)} in the model and {tuple(before)} in the penalty: it can "
                "grow along its axes, not shrink. Use a new penalty for a new architecture."
            )
        fisher = storage.put(self.fisher, parameter)
        offset = None if self.offset is None else storage.put(self.offset, parameter)
        anchor = storage.put(self.anchor, parameter, exact=True)
        if before != now:
            fisher, anchor = _padded(fisher, now), _padded(anchor, now)
            offset = None if offset is None else _padded(offset, now)
        if fisher is self.fisher and offset is self.offset and anchor is self.anchor:
            return self
        return replace(self, fisher=fisher, offset=offset, anchor=anchor)

    def loaded(self, parameter: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """S, offset and anchor on the parameter's device, in the type to compute in."""
        device, dtype = parameter.device, compute_dtype(parameter)
        offset = None if self.offset is None else self.offset.to(device, dtype)
        return self.fisher.to(device, dtype), offset, self.anchor.to(device, dtype)

    def is_at_rest(self, parameter: Tensor) -> bool:
        """Whether e = 0 everywhere, so that the penalty's gradient is 0."""
        if self.offset is not None:
            return False
        anchor = self.anchor.to(parameter.device)
        return torch.equal(as_real(parameter.detach()).to(anchor.dtype), anchor)

    @property
    def tensors(self) -> list[Tensor]:
        """S, the offset if there is one, and the anchor."""
        return [t for t in (self.fisher, self.offset, self.anchor) if t is not None]

    @property
    def is_finite(self) -> bool:
        """Whether every number is finite in the type in which it is kept."""
        numbers = [*self.tensors, torch.tensor(self.constant)]
        return all(bool(torch.isfinite(t).all()) for t in numbers)


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(n) for n in tensor.shape)] = tensor
    return larger

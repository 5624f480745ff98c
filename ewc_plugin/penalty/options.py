"""The penalty's options, and the checks of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TypeVar

import torch
from torch import Tensor


class Mode(str, Enum):
    """How the penalties of several experiences combine."""

    SEPARATE = "separate"
    ONLINE = "online"


class Normalization(str, Enum):
    """The statistic over all parameters that divides an experience's F."""

    MEAN = "mean"
    TRACE = "trace"
    MAX = "max"


def normalizer(normalization: Normalization, fisher: Iterable[Tensor]) -> float:
    """Return the divisor of F for `normalization`, in float64; 1 if F is zero everywhere."""
    tensors = [f for f in fisher if f.numel()]
    statistic = _STATISTIC[normalization](tensors) if tensors else 0.0
    if not math.isfinite(statistic):
        raise ValueError(
            f"`normalize={normalization.value!r}` cannot be applied: the sum of `fisher` overflows "
            "float64. Scale F down first."
        )
    return statistic or 1.0


def _trace(fisher: list[Tensor]) -> float:
    return sum(float(f.sum(dtype=torch.float64)) for f in fisher)


def _mean(fisher: list[Tensor]) -> float:
    return _trace(fisher) / sum(f.numel() for f in fisher)


def _max(fisher: list[Tensor]) -> float:
    return max(float(f.max()) for f in fisher)


_STATISTIC: dict[Normalization, Callable[[list[Tensor]], float]] = {
    Normalization.MEAN: _mean,
    Normalization.TRACE: _trace,
    Normalization.MAX: _max,
}

E_ = TypeVar("E_", bound=Enum)


def parsed(kind: type[E_], argument: str, value: E_ | str, *also: str) -> E_:
    """Look an option up by its value.

    Args:
        kind: The enum of the allowed values.
        argument: Its name, for the message.
        value: A member or its string.
        also: Values that the caller allows besides, for the message.

    Returns:
        The member.

    Raises:
        ValueError: There is no such member.
    """
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(map(repr, (*(member.value for member in kind), *also)))
        raise ValueError(f"`{argument}` must be one of {allowed}, got {value!r}.") from None


def checked_decay(mode: Mode, decay_factor: float | None) -> float | None:
    """The decay factor, which `online` needs and `separate` does not take.

    Args:
        mode: Of the penalty.
        decay_factor: The argument.

    Returns:
        The argument.

    Raises:
        ValueError: It does not fit the mode, or is not between 0 and 1.
    """
    if mode is Mode.SEPARATE:
        if decay_factor is not None:
            raise ValueError(
                f"`decay_factor` must be None unless mode='online', got {decay_factor}; separate "
                "penalties do not decay."
            )
        return None
    if decay_factor is None:
        raise ValueError("`decay_factor` must be set with mode='online'; 1.0 forgets nothing.")
    if checked_non_negative("decay_factor", decay_factor) > 1:
        raise ValueError(
            f"`decay_factor` must be at most 1, got {decay_factor}: above, the weight of the past "
            "would grow without bound."
        )
    return float(decay_factor)


LARGEST_SCALE = 1e38  # twice that is the largest number of float32 that gradients are scaled by


def checked_non_negative(argument: str, value: float) -> float:
    """A finite number from 0 to 1e38, so that twice the number fits float32.

    Args:
        argument: Its name, for the message.
        value: The argument.

    Returns:
        The argument as a float.

    Raises:
        ValueError: It is no such number.
    """
    if isinstance(value, bool | str | bytes | complex) or not hasattr(value, "__float__"):
        raise ValueError(f"`{argument}` must be a number >= 0, got {value!r}.")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"`{argument}` must be finite and >= 0, got {value}.")
    if number > LARGEST_SCALE:
        raise ValueError(
            f"`{argument}` must be at most {LARGEST_SCALE:g}, got {value}: more overflows float32."
        )
    return number


def checked_positive(argument: str, value: int) -> int:
    """An integer >= 1.

    Args:
        argument: Its name, for the message.
        value: The argument.

    Returns:
        The argument.

    Raises:
        ValueError: It is no such integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{argument}` must be an integer >= 1, got {value!r}.")
    return value


STORAGE_TYPES = (torch.bfloat16, torch.float32, torch.float64)  # signed types with float32's range


def checked_storage(
    dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype | None, torch.device | None]:
    """Type and device that the penalty can keep its tensors in.

    Args:
        dtype: `storage_dtype`. A type of smaller range would turn small F into 0 and large into
            infinity.
        device: `storage_device`.

    Returns:
        Both; the device as a `torch.device`.

    Raises:
        ValueError: The type is not one of `STORAGE_TYPES`, or the device cannot hold a tensor.
    """
    if dtype is not None and dtype not in STORAGE_TYPES:
        allowed = ", ".join(map(str, STORAGE_TYPES))
        raise ValueError(
            f"`storage_dtype` must be None or one of {allowed}, got {dtype!r}: other types do not "
            "have the range of float32, so that a Fisher would become 0 or infinite."
        )
    return dtype, None if device is None else checked_device("storage_device", device)


def checked_device(name: str, device: torch.device | str) -> torch.device:
    """Return a device, the value of the argument `name`; raise if it cannot hold a tensor."""
    try:
        checked = torch.device(device)
        works = float(torch.ones(1, device=checked)) == 1
        reason = "it does not keep numbers"
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        works, reason = False, str(error).strip().splitlines()[0]
    if not works:
        raise ValueError(
            f"`{name}` is {device!r}, which cannot hold a tensor here ({reason}). Use 'cpu', or a "
            "device that is there."
        )
    return checked

"""What the penalty can be told, checked at the edge."""

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
    """What an experience's F is divided by, over all its parameters together."""

    MEAN = "mean"
    TRACE = "trace"
    MAX = "max"


def normalizer(normalization: Normalization, fisher: Iterable[Tensor]) -> float:
    """The number that `normalization` divides F by; 1 where F is zero everywhere."""
    tensors = [f for f in fisher if f.numel()]
    statistic = _STATISTIC[normalization](tensors) if tensors else 0.0
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


def parsed(kind: type[E_], argument: str, value: E_ | str) -> E_:
    """Looks an option up by its value.

    Args:
        kind: The enum of the allowed values.
        argument: Its name, for the message.
        value: A member or its string.

    Returns:
        The member.

    Raises:
        ValueError: There is no such member.
    """
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"`{argument}` must be one of {allowed}, got {value!r}.") from None


def checked_decay(mode: Mode, decay_factor: float | None) -> float | None:
    """The decay factor, which `online` needs and `separate` does not take.

    Args:
        mode: The penalty's.
        decay_factor: What the caller gave.

    Returns:
        The same.

    Raises:
        ValueError: It does not fit the mode, or is negative or not finite.
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
    return checked_non_negative("decay_factor", decay_factor)


def checked_non_negative(argument: str, value: float) -> float:
    """`value`, if it is a finite number >= 0.

    Args:
        argument: Its name, for the message.
        value: What the caller gave.

    Returns:
        The same.

    Raises:
        ValueError: It is not.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{argument}` must be finite and >= 0, got {value}.")
    return float(value)


def checked_positive(argument: str, value: int) -> int:
    """`value`, if it is an integer >= 1.

    Args:
        argument: Its name, for the message.
        value: What the caller gave.

    Returns:
        The same.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{argument}` must be an integer >= 1, got {value!r}.")
    return value

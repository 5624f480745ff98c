"""Attributes of the plugin that are checked whenever they are set, in the constructor and later."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F

from ewc_plugin.fisher.diagonal import diagonal_fisher
from ewc_plugin.fisher.options import check_options
from ewc_plugin.fisher.scores import BATCHED, FisherType, Score, parsed_type
from ewc_plugin.penalty.options import (
    Normalization,
    checked_decay,
    checked_non_negative,
    parsed,
)

AVALANCHE = "avalanche"  # of `normalize`


class Checked:
    """A data descriptor: `check(plugin, name, value)` gives what is stored, or raises."""

    def __init__(self, check: Callable[[Any, str, Any], Any]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, plugin: Any, owner: type | None = None) -> Any:
        return self if plugin is None else vars(plugin)[self._name]

    def __set__(self, plugin: Any, value: Any) -> None:
        vars(plugin)[self._name] = self._check(plugin, self._name, value)


def ewc_lambda(plugin: Any, name: str, value: Any) -> float:
    """Return a finite number >= 0."""
    return checked_non_negative(name, value)


def decay_factor(plugin: Any, name: str, value: Any) -> float | None:
    """Set the decay factor of the penalty, and return it."""
    plugin.penalty.decay_factor = checked_decay(plugin.penalty.mode, value)
    factor: float | None = plugin.penalty.decay_factor
    return factor


def normalize(plugin: Any, name: str, value: Any) -> Normalization | str | None:
    """Set how the penalty divides later experiences' F, and return it."""
    known = value is None or value == AVALANCHE
    kind = None if known else parsed(Normalization, name, value, AVALANCHE)
    plugin.penalty.normalize = kind
    result: Normalization | str | None = value
    return result


def boolean(plugin: Any, name: str, value: Any) -> bool:
    """Return True or False.

    Args:
        plugin: The plugin that owns the attribute.
        name: Of the attribute.
        value: The value to store.

    Returns:
        The value.

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return value


def function_or_none(plugin: Any, name: str, value: Any) -> Any:
    """Return a function, or None.

    Args:
        plugin: The plugin that owns the attribute.
        name: Of the attribute.
        value: The value to store.

    Returns:
        The value.

    Raises:
        TypeError: It is neither.
    """
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be a function of the strategy, or None, got {value!r}.")
    return value


def fisher_type(plugin: Any, name: str, value: Any) -> FisherType | Score:
    """Return a Fisher type or a score that fits the plugin's `fisher_options`."""
    kind = parsed_type(value)
    _check_options(kind, vars(plugin).get("fisher_options", {}))
    return kind


def fisher_options(plugin: Any, name: str, value: Any) -> dict[str, Any]:
    """Return keyword arguments of `diagonal_fisher` that fit the plugin's `fisher_type`.

    Args:
        plugin: The plugin that owns the attribute.
        name: Of the attribute.
        value: A mapping; None: no options.

    Returns:
        A copy.

    Raises:
        TypeError: It is no mapping.
        ValueError: It has an unknown key, or an option is out of its range.
    """
    if not isinstance(value, Mapping | None):
        raise TypeError(f"`{name}` must be a mapping or None, got {value!r}.")
    options = dict(value or {})
    allowed = [p.name for p in inspect.signature(diagonal_fisher).parameters.values()][3:]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"`{name}` may have {allowed}, got {unknown}.")
    _check_options(plugin.fisher_type, options)
    return options


def _check_options(kind: FisherType | Score, options: Mapping[str, Any]) -> None:
    """Check the options beside the strategy's criterion, which the batched types are given."""
    of_strategy: dict[str, Any] = {"criterion": F.cross_entropy} if kind in BATCHED else {}
    check_options(kind, **{**of_strategy, **options})

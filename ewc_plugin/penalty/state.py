"""A penalty's saved state, checked completely before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ewc_plugin.penalty.quadratic import Quadratic, Storage


@dataclass(frozen=True)
class Remembered:
    """F and theta* of one experience, stored with `keep_history`.

    Attributes:
        fisher: F as it was folded in (normalised, if so asked), by canonical parameter name.
        anchor: theta*, by canonical parameter name.
    """

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]


def loaded_state(
    state: Mapping[str, Any], mine: Mapping[str, Any], storage: Storage
) -> tuple[dict[str, Quadratic], list[Remembered]]:
    """Copy quadratics and history out of a state.

    Args:
        state: Of `QuadraticPenalty.state_dict()`.
        mine: The current state of the penalty that loads `state`.
        storage: Type and device of the copies; None leaves those of the state.

    Returns:
        The quadratics by parameter name, and the history.

    Raises:
        ValueError: The settings of both differ, or the state is incomplete, not finite or negative.
    """
    check_keys(state, mine.keys())
    for setting in ("mode", "decay_factor", "normalize"):
        if state[setting] != mine[setting]:
            raise ValueError(
                f"`{setting}` of the state is {state[setting]!r}, of this penalty "
                f"{mine[setting]!r}; make it with {setting}={state[setting]!r}."
            )
    n = state["n_experiences"]
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"`n_experiences` of the state must be an integer >= 0, got {n!r}.")
    _check_form(state, n)
    quadratics = {name: _quadratic(name, q, storage) for name, q in state["quadratics"].items()}
    history = [
        Remembered(_copies(past["fisher"]), _copies(past["anchor"])) for past in state["history"]
    ]
    return quadratics, history


def check_keys(state: Any, keys: Set[str]) -> None:
    """Raise unless a state is a mapping with these keys."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"`state` must be what `state_dict()` returned, got a {type(state).__name__}."
        )
    if missing := keys - state.keys():
        raise ValueError(
            f"`state` has no {sorted(missing)}, but {sorted(state)[:9]}: pass what `state_dict()` "
            "of an object of the same class returned."
        )


def _check_form(state: Mapping[str, Any], n: int) -> None:
    """Raise unless the parts of the state are of the right kind and as many as they must be."""
    quadratics, history = state["quadratics"], state["history"]
    if not (
        isinstance(quadratics, Mapping)
        and all(isinstance(q, Mapping) for q in quadratics.values())
        and isinstance(history, list)
        and all(isinstance(past, Mapping) and {"fisher", "anchor"} <= set(past) for past in history)
    ):
        raise ValueError(
            "`quadratics` and `history` of the state must be a mapping and a list as "
            f"`state_dict()` returns them, got {type(quadratics).__name__} and "
            f"{type(history).__name__}."
        )
    if bool(quadratics) != bool(n):
        raise ValueError(
            f"The state has {len(quadratics)} quadratics after {n} experiences: it is damaged. "
            "Pass what `state_dict()` returned."
        )


def _quadratic(name: str, state: Mapping[str, Any], storage: Storage) -> Quadratic:
    names = [field.name for field in fields(Quadratic)]
    if set(state) != set(names):
        raise ValueError(
            f"`{name}` of the state has {sorted(state)} where {sorted(names)} belong: it was "
            "written by another version of this package. Consolidate again."
        )
    fisher, offset, anchor = state["fisher"], state["offset"], state["anchor"]
    tensors = [fisher, anchor] if offset is None else [fisher, anchor, offset]
    if not all(
        isinstance(t, Tensor) and t.is_floating_point() and t.shape == anchor.shape for t in tensors
    ):
        raise ValueError(f"`{name}` of the state must hold real tensors of one shape.")

    def put(tensor: Tensor, *, exact: bool = False) -> Tensor:
        dtype = None if exact else storage.dtype
        return tensor.detach().to(storage.device, dtype).clone()

    quadratic = Quadratic(
        put(fisher),
        offset if offset is None else put(offset),
        put(anchor, exact=True),
        float(state["constant"]),
    )
    if not quadratic.is_finite or quadratic.constant < 0 or bool((quadratic.fisher < 0).any()):
        raise ValueError(
            f"`{name}` of the state is not finite, or its F is negative: the file is damaged, or "
            "the training diverged before it was written."
        )
    return quadratic


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, tensor in copies.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"`{name}` in the history of the state is not finite.")
    return copies

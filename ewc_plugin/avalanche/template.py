"""Detect and call the methods that a user's template overrides: unpacking, forward, loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.update_type import MetaUpdate
from torch import nn

from ewc_plugin.batches import Batch


def check_calls_the_hooks(strategy: Any) -> None:
    """Raise if the strategy is of a type that never calls `before_backward`.

    Args:
        strategy: About to train.

    Raises:
        ValueError: It is a meta-learning template.
    """
    if isinstance(strategy, MetaUpdate):
        raise ValueError(
            f"{type(strategy).__name__} is a meta-learning template, which never calls "
            "`before_backward`: the penalty would have no effect. Use a `SupervisedTemplate`."
        )


def overrides(strategy: Any, *names: str) -> bool:
    """Return whether a user's template has its own version of one of these members."""
    return any(
        name in vars(strategy)
        or getattr(type(strategy), name, None) is not getattr(SupervisedTemplate, name)
        for name in names
    )


def feeds_its_own_way(strategy: Any) -> bool:
    """Return whether a user's template overrides how the model's output is computed."""
    return overrides(strategy, "forward", "mb_x", "mb_task_id", "_unpack_minibatch") or hasattr(
        type(strategy), "mb_output"
    )


@contextmanager
def left_as_it_was(strategy: Any) -> Iterator[None]:
    """Restore the strategy's attributes when the context ends."""
    attributes = dict(vars(strategy))
    try:
        yield
    finally:
        vars(strategy).clear()
        vars(strategy).update(attributes)


def unpacked(strategy: Any, batch: Batch) -> Batch:
    """Return a loader's batch as the template's own `_unpack_minibatch` leaves it."""
    if not overrides(strategy, "_unpack_minibatch"):
        return batch
    with left_as_it_was(strategy):
        strategy.mbatch = _container(batch)
        strategy._unpack_minibatch()
        return strategy.mbatch


def template_output(strategy: Any, model: nn.Module, batch: Batch) -> Any:
    """Return the model output that the template passes to its criterion."""
    with left_as_it_was(strategy):
        strategy.model, strategy.mbatch = model, _container(batch)
        strategy.mb_output = strategy.forward()
        return strategy.mb_output


def template_targets(strategy: Any, batch: Batch) -> Any:
    """Return the template's own `mb_y` of an unpacked batch."""
    with left_as_it_was(strategy):
        strategy.mbatch = _container(batch)
        return strategy.mb_y


def _container(batch: Batch) -> Batch:
    """Return a container of the template's own, which it may change, for the same tensors."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return list(batch) if isinstance(batch, (tuple, list)) else batch

"""The members of a user's template that decide what the model is fed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from avalanche.training.templates.problem_type import SupervisedProblem
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
        or getattr(type(strategy), name, None) is not getattr(SupervisedProblem, name)
        for name in names
    )


@contextmanager
def showing(strategy: Any, model: nn.Module, batch: Batch) -> Iterator[None]:
    """The strategy with this as its model and mini-batch, for its own `forward` and `mb_y`."""
    saved = strategy.model, strategy.mbatch
    strategy.model = model
    strategy.mbatch = dict(batch) if isinstance(batch, Mapping) else list(batch)
    try:
        if overrides(strategy, "_unpack_minibatch"):
            strategy._unpack_minibatch()
        yield
    finally:
        strategy.model, strategy.mbatch = saved

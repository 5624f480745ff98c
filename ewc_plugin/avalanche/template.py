"""What a strategy's template calls and overrides, as far as the plugin depends on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from avalanche.core import BaseSGDPlugin
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import BaseSGDTemplate, PeriodicEval
from avalanche.training.templates.problem_type import SupervisedProblem
from avalanche.training.templates.update_type import MetaUpdate, SGDUpdate
from torch import nn

from ewc_plugin.batches import Batch


def check_calls_the_hooks(strategy: Any) -> None:
    """Refuses a template of which it is known that it never calls what the penalty needs.

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
    """Whether a user's template has its own version of one of these members."""
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


def gradients_are_ours(plugin: SupervisedPlugin, strategy: Any) -> bool:
    """Whether nobody sees, or rescales, a gradient before the plugin's `after_backward`.

    Adding to `.grad` there is then the same as adding to the loss, and cheaper. It is not with a
    template that has its own backward pass (a gradient scaler's), with hooks on parameters, after
    plugins that rewrite gradients, or before plugins that rewrite the loss.

    Args:
        plugin: Ours.
        strategy: Whose plugins it is one of.

    Returns:
        False wherever it is not certain.
    """
    template = type(strategy)
    own_loop = (
        getattr(template, "training_epoch", None) is not SGDUpdate.training_epoch
        or template.backward is not BaseSGDTemplate.backward
        or "backward" in vars(strategy)
    )
    hooked = any(p._backward_hooks or _late_hooks(p) for p in strategy.model.parameters())
    if own_loop or hooked or plugin not in strategy.plugins:
        return False
    place = strategy.plugins.index(plugin)
    before, after = strategy.plugins[:place], strategy.plugins[place + 1 :]
    return not (
        any(_implements(p, "after_backward") for p in before)
        or any(_implements(p, "before_backward") for p in after)
    )


def _implements(plugin: Any, hook: str) -> bool:
    if isinstance(plugin, (EvaluationPlugin, Clock, PeriodicEval)):  # they only look
        return False
    return getattr(type(plugin), hook, None) not in (None, getattr(BaseSGDPlugin, hook))


def _late_hooks(parameter: nn.Parameter) -> Any:
    return getattr(parameter, "_post_accumulate_grad_hooks", None)

"""Where the penalty acts: in the loss, in the gradients, or as an implicit step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from avalanche.core import BaseSGDPlugin
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from ewc_plugin.avalanche.template import overrides
from ewc_plugin.penalty.implicit_step import implicit_step_
from ewc_plugin.penalty.penalty import QuadraticPenalty


class Placement:
    """Base class: three hooks of a training iteration; two may return ewc_lambda * penalty."""

    def __init__(self, penalty: QuadraticPenalty) -> None:
        self.penalty = penalty

    def before_backward(self, strategy: Any, ewc_lambda: float) -> Tensor | None:
        """Change `strategy.loss` before the backward pass."""
        return None

    def after_backward(self, strategy: Any, ewc_lambda: float) -> Tensor | None:
        """Change `.grad` after the backward pass."""
        return None

    def after_update(self, strategy: Any, ewc_lambda: float) -> None:
        """Change the parameters after the optimizer's step."""


class InLoss(Placement):
    """Add the penalty to the loss: correct even if other code reads or changes gradients."""

    def before_backward(self, strategy: Any, ewc_lambda: float) -> Tensor:
        """Add it, for autograd to differentiate."""
        penalty = ewc_lambda * self.penalty(strategy.model)
        strategy.loss = strategy.loss + penalty
        return penalty.detach()


class InGradient(InLoss):
    """Add the penalty's gradient to `.grad`: cheaper, allowed if `gradients_are_ours`.

    It adds to the loss as `InLoss` does where a backward pass of that loss comes again, or a hook
    on a parameter sees the gradient.
    """

    def before_backward(self, strategy: Any, ewc_lambda: float) -> Tensor | None:  # type: ignore[override]
        """Add it to the loss where that must be; decided anew in each iteration."""
        hooked = any(_hooks(theta) for theta, _ in self.penalty.pairs(strategy.model))
        self._in_loss = strategy.retain_graph or hooked
        return super().before_backward(strategy, ewc_lambda) if self._in_loss else None

    def after_backward(self, strategy: Any, ewc_lambda: float) -> Tensor | None:
        """Add the gradient to `.grad`, and the value to `strategy.loss` for whoever reads it."""
        if self._in_loss:
            return None
        penalty = ewc_lambda * self.penalty.add_gradient_(strategy.model, ewc_lambda)
        strategy.loss = strategy.loss.detach() + penalty
        return penalty


class ImplicitStep(Placement):
    """Take `implicit_step_` once for every step that an optimizer took in the iteration.

    A gradient scaler that found infinities, and a template that accumulates gradients, take none;
    a template with several optimizers takes one with each. A step that an optimizer takes inside of
    its own or another's, as in a wrapper, is a part of that one.
    """

    def __init__(self, penalty: QuadraticPenalty) -> None:
        super().__init__(penalty)
        self._stepped: list[Optimizer] = []
        self._stepping: list[Optimizer] = []  # the outermost first
        self._handles: list[RemovableHandle] = []

    def before_backward(self, strategy: Any, ewc_lambda: float) -> Tensor:
        """Add the value to the loss, without a gradient; start to record optimizer steps."""
        if not self._stepping:  # else a closure calls
            self._stop()  # an iteration may have been interrupted
            self._handles = [
                register_optimizer_step_pre_hook(_weakly(self._begin)),
                register_optimizer_step_post_hook(_weakly(self._end)),
            ]
        with torch.no_grad():
            penalty = ewc_lambda * self.penalty(strategy.model)
        strategy.loss = strategy.loss + penalty
        return penalty

    def after_update(self, strategy: Any, ewc_lambda: float) -> None:
        """Take the implicit step of the optimizers that stepped."""
        stepped = self._stop()
        pairs = self.penalty.pairs(strategy.model)
        for optimizer in stepped:
            implicit_step_(optimizer, pairs, ewc_lambda)

    def _stop(self) -> list[Optimizer]:
        for handle in self._handles:
            handle.remove()
        stepped, self._stepped, self._stepping, self._handles = self._stepped, [], [], []
        return stepped

    def __del__(self) -> None:
        self._stop()

    def __getstate__(self) -> dict[str, Any]:
        # Of an interrupted iteration: hooks are of this process.
        return {**vars(self), "_stepped": [], "_stepping": [], "_handles": []}

    def _begin(self, optimizer: Optimizer, *arguments: Any) -> None:
        self._stepping.append(optimizer)

    def _end(self, optimizer: Optimizer, *arguments: Any) -> None:
        self._stepping.pop()
        # A fused optimizer is called, and does nothing, where a gradient scaler found infinities.
        if not self._stepping and not bool(getattr(optimizer, "found_inf", None) or 0):
            self._stepped.append(optimizer)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method so that torch's global hook table does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call


def placement_of(
    plugin: SupervisedPlugin, strategy: Any, penalty: QuadraticPenalty, *, implicit: bool
) -> Placement:
    """Choose where the penalty acts in one experience.

    Args:
        plugin: Ours, one of the strategy's.
        strategy: About to train.
        penalty: The plugin's.
        implicit: Whether the penalty is taken as an implicit step.

    Returns:
        The placement.

    Raises:
        ValueError: An implicit step after an optimizer that is not torch's.
    """
    if not implicit:
        kind = InGradient if gradients_are_ours(plugin, strategy) else InLoss
        return kind(penalty)
    if not isinstance(strategy.optimizer, Optimizer):
        raise ValueError(
            "`implicit=True` follows the steps of a `torch.optim.Optimizer`, got "
            f"{type(strategy.optimizer).__name__}. Use implicit=False."
        )
    return ImplicitStep(penalty)


def gradients_are_ours(plugin: SupervisedPlugin, strategy: Any) -> bool:
    """Return whether no other code may compute, read or rescale gradients before the update.

    Adding to `.grad` in `after_backward` is then the same as adding to the loss, and cheaper. It is
    not with a template that has its own version of a step between the loss and the update (a
    gradient scaler's backward pass, a closure that computes the loss again), with plugins that act
    between the backward pass and the update, or before plugins that rewrite the loss.

    Args:
        plugin: Ours.
        strategy: Whose plugins it is one of.

    Returns:
        False wherever it is not certain.
    """
    if overrides(strategy, *_FROM_LOSS_TO_UPDATE) or plugin not in strategy.plugins:
        return False
    place = strategy.plugins.index(plugin)
    others, after = [p for p in strategy.plugins if p is not plugin], strategy.plugins[place + 1 :]
    return not (
        any(_implements(p, "after_backward", "before_update") for p in others)
        or any(_implements(p, "before_backward") for p in after)
    )


_FROM_LOSS_TO_UPDATE = (
    "training_epoch",
    "_before_backward",
    "backward",
    "_after_backward",
    "_before_update",
    "optimizer_step",
)


def _implements(plugin: Any, *hooks: str) -> bool:
    if isinstance(plugin, (EvaluationPlugin, Clock, PeriodicEval)):  # these change no gradient
        return False
    own = (getattr(type(plugin), hook, None) for hook in hooks)
    bases = (getattr(BaseSGDPlugin, hook) for hook in hooks)
    return any(mine not in (None, base) for mine, base in zip(own, bases, strict=True))


def _hooks(parameter: Tensor) -> Any:
    late = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter._backward_hooks or late

"""The adapter between Avalanche's training loop and the maths."""

from __future__ import annotations

import inspect
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from avalanche.core import BaseSGDPlugin
from avalanche.models import avalanche_forward
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import BaseSGDTemplate, PeriodicEval
from avalanche.training.templates.update_type import SGDUpdate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ewc_plugin.fisher import diagonal_fisher
from ewc_plugin.implicit import implicit_step_
from ewc_plugin.options import Mode, Normalization, checked_non_negative
from ewc_plugin.penalty import QuadraticPenalty
from ewc_plugin.scores import FisherType
from ewc_plugin.stability import DivergedError, largest_stable_lambda

Batch = Any  # what a data loader yields: (x, y), (x, y, task labels) or another pytree


class DiagonalEWCPlugin(SupervisedPlugin):
    """Adds ewc_lambda * sum_t F_t (theta - theta*_t)^2 to the loss of every later experience.

    F is exact per sample: see `diagonal_fisher`. With ewc_lambda = 0, and before the first
    experience has ended, the run is the one without the plugin, to the last bit. `strategy.loss` is
    the task's loss plus the penalty from `after_backward` on at the latest. In an online stream
    that knows its task boundaries there is one F per original experience, at its end, over all of
    it.

    Args:
        ewc_lambda: Weight of the penalty; Avalanche's, half of the lambda of Kirkpatrick et al. A
            value means little without its `fisher_type`: F differs by orders of magnitude.
        mode: "separate" or "online", as `QuadraticPenalty` has them.
        decay_factor: Weight of the past in "online".
        keep_importance_data: Keep every experience's F and theta* in `penalty.history`.
        fisher_type: Which labels F is the Fisher of.
        fisher_batches: Called with the strategy at the end of an experience, gives its batches
            (x, y) or (x, y, task labels) on the model's device. Default: the experience's own
            data, not shuffled, with its eval transforms; data that other plugins mixed in, such as
            a replay buffer, is not in it.
        fisher_options: Keyword arguments for `diagonal_fisher`: max_samples, n_draws, engine, ...
        normalize: "mean", "trace" or "max" of each F, to divide it by. Recommended start:
            normalize="mean" with ewc_lambda=0.01, which was among the best on split and on permuted
            MNIST, for "predicted" and "exact" alike (results/normalized_lambda), where F as it is
            wants lambdas that lie orders of magnitude apart.
        implicit: Take the penalty as an implicit step after the optimizer's: stable for every
            ewc_lambda, see `implicit_step_`.
        storage_dtype: Of what the penalty remembers, as `QuadraticPenalty` has it.
        storage_device: Where it is kept, likewise.

    Raises:
        ValueError: An argument is out of its range.

    Attributes:
        penalty: The `QuadraticPenalty`.
        fisher: F of the last experience, by parameter name, as it was computed.
        fisher_seconds: Spent on F so far.
        task_loss: Of the last iteration, without the penalty. Unit: that of the criterion.
        penalty_loss: ewc_lambda times the penalty of the last iteration; None before the first.

    Source: Kirkpatrick et al. 2017.
    """

    def __init__(
        self,
        ewc_lambda: float,
        mode: Mode | str = Mode.SEPARATE,
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        *,
        fisher_type: FisherType | str = FisherType.PREDICTED,
        fisher_batches: Callable[[Any], Iterable[Batch]] | None = None,
        fisher_options: Mapping[str, Any] | None = None,
        normalize: Normalization | str | None = None,
        implicit: bool = False,
        storage_dtype: torch.dtype | None = None,
        storage_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.ewc_lambda = checked_non_negative("ewc_lambda", ewc_lambda)
        self.penalty = QuadraticPenalty(
            mode,
            decay_factor,
            normalize=normalize,
            keep_history=keep_importance_data,
            storage_dtype=storage_dtype,
            storage_device=storage_device,
        )
        self.fisher_type = FisherType.parse(fisher_type)
        self.fisher_batches = fisher_batches or experience_batches
        self.fisher_options = _checked_options(fisher_options or {})
        self.implicit = implicit
        self.fisher: dict[str, Tensor] = {}
        self.fisher_seconds = 0.0
        self.task_loss: Tensor | None = None
        self.penalty_loss: Tensor | None = None
        self._strategy: weakref.ref[Any] | None = None
        self._adds_to_gradients = False
        self._hooks_called = False
        self._warned = False
        self._n_subexperiences = 0

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Makes sure that no other strategy uses this plugin."""
        owner = self._strategy and self._strategy()
        if owner is not None and owner is not strategy:
            raise ValueError(
                "This `DiagonalEWCPlugin` already belongs to another strategy; give each its own."
            )
        self._strategy = weakref.ref(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Chooses how to add the gradient."""
        if getattr(strategy.experience, "is_first_subexp", True):
            self._n_subexperiences = 0
        self._n_subexperiences += 1
        self._adds_to_gradients = not self.implicit and gradients_are_ours(self, strategy)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Warns, once, of a lambda that plain gradient descent cannot bear."""
        if not self._is_active or self.implicit or self._warned:
            return
        limit = largest_stable_lambda(strategy.optimizer, self.penalty.pairs(strategy.model))
        if self.ewc_lambda > limit:
            self._warned = True
            warnings.warn(
                f"`ewc_lambda` is {self.ewc_lambda:g}, but above {limit:.3g} the penalty alone "
                f"makes {type(strategy.optimizer).__name__} diverge at this learning rate. "
                f"{_REMEDY}",
                stacklevel=2,
            )

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Adds the penalty to `strategy.loss`, if others may look at its gradient first."""
        self._hooks_called = True
        self.task_loss = strategy.loss.detach().clone()
        self.penalty_loss = None
        if not self._is_active or self._adds_to_gradients:
            return
        penalty = self.ewc_lambda * self.penalty(strategy.model)
        if self.implicit:
            penalty = penalty.detach()
        self.penalty_loss = penalty.detach()
        strategy.loss = strategy.loss + penalty

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Adds the penalty's gradient, if nobody has looked at it yet; stops a diverged run."""
        if self._is_active and self._adds_to_gradients:
            value = self.penalty.add_gradient_(strategy.model, self.ewc_lambda)
            self.penalty_loss = self.ewc_lambda * value
            strategy.loss = strategy.loss.detach() + self.penalty_loss
        loss = float(strategy.loss.detach())
        if not math.isfinite(loss):
            penalty = 0.0 if self.penalty_loss is None else float(self.penalty_loss)
            remedy = _REMEDY if self._is_active else "Use a lower learning rate."
            raise DivergedError(
                f"The training diverged: the loss is {loss}, its penalty {penalty}. {remedy}"
            )

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Takes the implicit step."""
        if self.implicit and self._is_active:
            pairs = self.penalty.pairs(strategy.model)
            implicit_step_(strategy.optimizer, pairs, self.ewc_lambda)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Refuses a template that does not call what the penalty needs."""
        if not self._hooks_called:
            raise RuntimeError(
                f"{type(strategy).__name__} never calls `before_backward`, so the penalty would "
                "have no effect: this template cannot be used with EWC."
            )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Computes F on the experience and remembers it with the parameters."""
        if not self._is_last(strategy.experience):
            return
        if not all(bool(torch.isfinite(p).all()) for p in strategy.model.parameters()):
            raise DivergedError(f"The training diverged: a weight is not finite. {_REMEDY}")
        start = time.perf_counter()
        self.fisher = self.compute_fisher(strategy)
        self.penalty.consolidate(strategy.model, self.fisher)
        self.fisher_seconds += time.perf_counter() - start

    def compute_fisher(self, strategy: Any) -> dict[str, Tensor]:
        """The diagonal Fisher of the current experience, by parameter name."""
        options = dict(self.fisher_options)
        if self.fisher_type is FisherType.BATCHED:
            options.setdefault("criterion", strategy._criterion)
        with torch.random.fork_rng(devices=[]):  # a transform may draw, though eval ones should not
            return diagonal_fisher(
                strategy.model,
                self.fisher_batches(strategy),
                self.fisher_type,
                **{"forward": self.forward, **options},
            )

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [N, C] of a batch; override it for other batches or outputs."""
        has_task_labels = len(batch) > 2  # with two items the last one is y
        logits: Tensor = (
            avalanche_forward(model, batch[0], batch[-1]) if has_task_labels else model(batch[0])
        )
        return logits

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain values."""
        return {
            "penalty": self.penalty.state_dict(),
            "fisher": self.fisher,
            "fisher_seconds": self.fisher_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of a plugin with the same settings.

        Args:
            state: Of `state_dict()`.

        Raises:
            ValueError: The penalty's settings differ.
        """
        self.penalty.load_state_dict(state["penalty"])
        self.fisher = state["fisher"]
        self.fisher_seconds = state["fisher_seconds"]

    def _is_last(self, experience: Any) -> bool:
        if not getattr(experience, "access_task_boundaries", False):
            return True
        # Avalanche says False of every part where the parts are of equal size: so they are counted.
        counted: bool = self._n_subexperiences >= experience.sub_stream_length
        return counted or bool(experience.is_last_subexp)

    @property
    def _is_active(self) -> bool:
        return self.ewc_lambda > 0 and self.penalty.n_experiences > 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_strategy": None}  # a weak reference cannot be pickled


_REMEDY = "Use a smaller `ewc_lambda` or learning rate, or `implicit=True`."


def experience_batches(strategy: Any) -> Iterator[Batch]:
    """The current experience's samples in their order, with eval transforms, on the device.

    Args:
        strategy: Any Avalanche strategy while it trains.

    Yields:
        What the data set's `collate_fn` makes of `strategy.train_mb_size` samples.
    """
    experience = strategy.experience
    if getattr(experience, "access_task_boundaries", False):  # a part, in an online stream
        experience = experience.origin_experience
    dataset = experience.dataset.eval()
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        collate_fn=getattr(dataset, "collate_fn", None),
        generator=torch.Generator(),  # without it the iterator draws a seed from the global RNG
    )
    for batch in loader:
        yield [item.to(strategy.device) for item in batch]


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


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    allowed = [p.name for p in inspect.signature(diagonal_fisher).parameters.values()][3:]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"`fisher_options` may have {allowed}, got {unknown}.")
    return dict(options)

"""`DiagonalEWCPlugin`: EWC as a plugin of an Avalanche strategy."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from avalanche.models import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from ewc_plugin.avalanche import checked
from ewc_plugin.avalanche.active_classes import active_classes
from ewc_plugin.avalanche.batch_watch import WatchedPlugins
from ewc_plugin.avalanche.builtin_trace import builtin_trace
from ewc_plugin.avalanche.checked import AVALANCHE, Checked
from ewc_plugin.avalanche.fisher_data import (
    FisherData,
    SharedFisherExperiences,
    dataset_batches,
    drawn_batches,
)
from ewc_plugin.avalanche.likelihood import Likelihood, checked_likelihood, known_likelihood
from ewc_plugin.avalanche.placement import InLoss, Placement, placement_of
from ewc_plugin.avalanche.ranks import unwrapped
from ewc_plugin.avalanche.strategy_fisher import StrategyFisher, needs_likelihood
from ewc_plugin.avalanche.template import check_calls_the_hooks
from ewc_plugin.batch_parts import Unpacked, beside_no_labels, logits_of, on_device, unpack
from ewc_plugin.batches import Batch
from ewc_plugin.contexts import untouched_randomness
from ewc_plugin.fisher.diagonal import check_batches, diagonal_fisher
from ewc_plugin.fisher.scores import FisherType, Score
from ewc_plugin.penalty.options import (
    Mode,
    Normalization,
    checked_positive,
    parsed,
)
from ewc_plugin.penalty.penalty import QuadraticPenalty
from ewc_plugin.penalty.stability import DivergedError, check_optimizer_state, largest_stable_lambda
from ewc_plugin.penalty.state import check_keys


class DiagonalEWCPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Add ewc_lambda * sum_t F_t (theta - theta*_t)^2 to the loss of every later experience.

    F is exact per sample: see `diagonal_fisher`. With ewc_lambda = 0, and before the first
    experience has ended, the run is the one without the plugin, to the last bit. `strategy.loss` is
    the task's loss plus the penalty from `after_backward` on at the latest. In an online stream
    that knows its task boundaries there is one F per original experience, at its end, over all of
    it; in one that does not, one per `consolidate_every` experiences. In a distributed run F is
    summed over the ranks, each of which has its share of the samples.

    F sees what the strategy's template feeds its model, in batches of the training's `collate_fn`,
    and is of the likelihood that the criterion trains: cross entropy and NLL of a softmax
    classifier, whose labels `fisher_type` names; MSE and BCE with logits of their own, exactly.
    Samples whose label the criterion ignores are left out.
    What is not certain is refused before the first step; override `unpack`, `forward` or
    `active_classes` to say what a batch holds and which logits [N, C] the model gives.
    F does not see what other plugins do to `mbatch` before the forward pass, or to `mb_output`
    after it, and the first iterations of each experience warn of it: put it into the template's
    `mb_x` or `forward`, or into the data's transforms.

    Args:
        ewc_lambda: Weight of the penalty; Avalanche's, half of the lambda of Kirkpatrick et al. A
            value means little without its `fisher_type`: F differs by orders of magnitude.
        mode: "separate" or "online", as `QuadraticPenalty` has them.
        decay_factor: Weight of the past in "online".
        keep_importance_data: Keep every experience's F and theta* in `penalty.history`.
        fisher_type: Labels that F averages over; or a `Score`, such as `gaussian_score`, of
            another likelihood.
        fisher_data: "experience" or "training": see `FisherData`.
        fisher_batches: Called with the strategy at the end of an experience, gives its batches as
            `unpack` takes them, on the model's device; in a distributed run, the rank's share.
            Default: `fisher_data`, not shuffled, with its eval transforms.
        fisher_options: Keyword arguments for `diagonal_fisher`: max_samples, n_draws, engine, ...
        normalize: "mean", "trace" or "max" of each F, to divide it by; or "avalanche", to scale it
            to the trace that Avalanche's own F has at the strategy's `train_mb_size`, so that a
            lambda found for Avalanche's EWC carries over: see `builtin_trace`. Recommended start:
            normalize="mean" with ewc_lambda=0.01, or 1000 / P for P parameters. For P = 9e4 it was
            among the best on split and on permuted MNIST, for "predicted" and "exact" alike
            (results/normalized_lambda), where F as it is wants lambdas that lie orders of magnitude
            apart.
        consolidate_every: For online streams without task boundaries: compute one F after every
            so many experiences, on their data together.
        implicit: Take the penalty as an implicit step after the optimizer's: stable for every
            ewc_lambda, see `implicit_step_`.
        storage_dtype: Of the remembered F, as in `QuadraticPenalty`.
        storage_device: Of all that is remembered, as in `QuadraticPenalty`.

    Raises:
        ValueError: An argument is out of its range, here or when it is set later.
        TypeError: An argument has another type.

    Attributes:
        penalty: The `QuadraticPenalty`.
        fisher: F of the last experience, by parameter name, as it was computed.
        fisher_seconds: Time spent on computing F so far.
        task_loss: Of the last iteration, without the penalty. Unit: that of the criterion.
        penalty_loss: ewc_lambda times the penalty of the last iteration; None before the first.

    Source: Kirkpatrick et al. 2017.
    """

    ewc_lambda = Checked(checked.ewc_lambda)
    decay_factor = Checked(checked.decay_factor)
    normalize = Checked(checked.normalize)
    fisher_type = Checked(checked.fisher_type)
    fisher_batches = Checked(checked.function_or_none)
    fisher_options = Checked(checked.fisher_options)
    implicit = Checked(checked.boolean)

    def __init__(
        self,
        ewc_lambda: float,
        mode: Mode | str = Mode.SEPARATE,
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        *,
        fisher_type: FisherType | str | Score = FisherType.PREDICTED,
        fisher_data: FisherData | str = FisherData.EXPERIENCE,
        fisher_batches: Callable[[Any], Iterable[Batch]] | None = None,
        fisher_options: Mapping[str, Any] | None = None,
        normalize: Normalization | str | None = None,
        consolidate_every: int = 1,
        implicit: bool = False,
        storage_dtype: torch.dtype | None = None,
        storage_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.ewc_lambda = ewc_lambda
        self.penalty = QuadraticPenalty(
            mode,
            decay_factor,
            keep_history=checked.boolean(self, "keep_importance_data", keep_importance_data),
            storage_dtype=storage_dtype,
            storage_device=storage_device,
        )
        self.normalize = normalize
        self.decay_factor = decay_factor
        self.fisher_type = fisher_type
        self.fisher_batches = fisher_batches
        self.fisher_options = fisher_options
        self.implicit = implicit
        self.fisher: dict[str, Tensor] = {}
        self.fisher_seconds = 0.0
        self.task_loss: Tensor | None = None
        self.penalty_loss: Tensor | None = None
        self._strategy: weakref.ref[Any] | None = None
        self._model: weakref.ref[nn.Module] | None = None  # that was trained and consolidated
        self._placement: Placement = InLoss(self.penalty)
        self._likelihood: Likelihood | None = None
        self._hooks_called = False
        self._warned = False
        self._watch: WatchedPlugins | None = None
        self._warned_of_changes = False
        self._num_workers = 0
        self._shared = SharedFisherExperiences(
            checked_positive("consolidate_every", consolidate_every),
            parsed(FisherData, "fisher_data", fisher_data),
        )

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse a strategy that cannot use this plugin, or a plugin that another strategy uses."""
        check_calls_the_hooks(strategy)
        owner = self._strategy and self._strategy()
        if owner is not None and owner is not strategy:
            raise ValueError(
                "This `DiagonalEWCPlugin` already belongs to another strategy; give each its own."
            )
        other_model = self._model and self._model() is not unwrapped(strategy.model)
        if owner is None and other_model:
            raise ValueError(
                "This `DiagonalEWCPlugin` holds the Fisher of another model, which it was trained "
                "with before. Make a new plugin for every run, or give it a state with "
                "`load_state_dict`."
            )
        if sum(plugin is self for plugin in strategy.plugins) > 1:
            raise ValueError(
                "This `DiagonalEWCPlugin` is more than once among the strategy's `plugins`: it "
                "would count every experience as often. Leave it there once."
            )
        self._strategy = weakref.ref(strategy)
        self._known_likelihood(strategy)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse an experience without samples."""
        experience = strategy.experience
        if not len(experience.dataset):
            raise ValueError(
                f"Experience {experience.current_experience} has no samples, so there is nothing "
                "to train on and no Fisher. Leave it out of the stream."
            )

    def before_training_exp(self, strategy: Any, *, num_workers: int = 0, **kwargs: Any) -> None:
        """Choose where the penalty acts."""
        self._num_workers = num_workers
        self._likelihood = None  # the criterion may have changed
        self._stop_watching()
        self._shared.begin(strategy.experience)
        self._placement = placement_of(self, strategy, self.penalty, implicit=self.implicit)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Warn, once, of a lambda above the largest stable one of plain gradient descent."""
        self._shared.read_loader(strategy.dataloader)
        if not (self._watch or self._warned_of_changes or self._says_what_is_fed):
            self._watch = WatchedPlugins(strategy)
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

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Watch what other plugins and the template do to the batch."""
        if self._watch:
            self._watch.follows("_unpack_minibatch")

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Watch what the template's `forward` does to the batch."""
        if self._watch:
            self._watch.follows("forward")

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Watch what happens to batch and outputs between `forward` and the loss."""
        if self._watch:
            self._watch.follows("criterion")

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Check the likelihood, and let the placement add to the loss.

        `InLoss` adds the penalty, `ImplicitStep` its value without a gradient, and `InGradient`
        nothing.
        """
        self._hooks_called = True
        if self._watch:
            self._watch.follows(None)
        self._check_likelihood(strategy)
        self.task_loss = strategy.loss.detach().clone()
        self.penalty_loss = None
        if self._is_active:
            self.penalty_loss = self._placement.before_backward(strategy, self.ewc_lambda)

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient to `.grad` and its value to the loss; stop a diverged run.

        The first two are for `InGradient` alone; other placements add nothing here.

        Raises:
            DivergedError: The loss is not finite.
        """
        if self._is_active:
            added = self._placement.after_backward(strategy, self.ewc_lambda)
            self.penalty_loss = self.penalty_loss if added is None else added
        loss = float(strategy.loss.detach())
        if not math.isfinite(loss):
            penalty = 0.0 if self.penalty_loss is None else float(self.penalty_loss)
            remedy = _REMEDY if self._is_active else "Use a lower learning rate."
            raise DivergedError(
                f"The training diverged: the loss is {loss}, its penalty {penalty}. {remedy}"
            )

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Take an implicit step after each step of an optimizer: `ImplicitStep` alone."""
        if self._is_active:
            self._placement.after_update(strategy, self.ewc_lambda)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse a template that does not call `before_backward`."""
        if not self._hooks_called:
            raise RuntimeError(
                f"{type(strategy).__name__} never calls `before_backward`, so the penalty would "
                "have no effect: this template cannot be used with EWC."
            )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Compute F on the experience and remember it with the parameters."""
        self._stop_watching()
        if not self._shared.end(strategy.experience):
            return
        trained = (p for p in strategy.model.parameters() if p.requires_grad)
        if not all(bool(torch.isfinite(p).all()) for p in trained):  # a frozen mask may hold -inf
            raise DivergedError(f"The training diverged: a weight is not finite. {_REMEDY}")
        check_optimizer_state(strategy.optimizer, _REMEDY)
        start = time.perf_counter()
        self.fisher = self.compute_fisher(strategy)
        self.penalty.consolidate(strategy.model, self._scaled(strategy, self.fisher))
        self._model = weakref.ref(unwrapped(strategy.model))
        self._shared.clear()
        self.fisher_seconds += time.perf_counter() - start

    def consolidate(
        self, model: nn.Module, batches_or_fisher: Iterable[Batch] | Mapping[str, Tensor]
    ) -> None:
        """Add a pretrained model to the penalty, before the first experience.

        Args:
            model: The pretrained model.
            batches_or_fisher: Batches as `unpack` takes them, of data like those it was trained
                on, from which F is computed; or F by parameter name, such as `load_fisher` gives.
                Where the Fisher type needs no labels, x and (x,) are batches too.

        Raises:
            TypeError: `model` is no module, as when both arguments change places; or
                `batches_or_fisher` are samples.
            ValueError: F is empty or does not fit the model; or `normalize="avalanche"`, which is
                the scale of a strategy's mini-batches.
        """
        if not isinstance(model, nn.Module) or isinstance(batches_or_fisher, nn.Module):
            raise TypeError(
                "`consolidate(model, batches_or_fisher)` takes an nn.Module, then batches or a "
                f"Fisher, got {type(model).__name__} and {type(batches_or_fisher).__name__}."
            )
        if self.normalize == AVALANCHE:
            raise ValueError(
                "`consolidate` knows no strategy, whose mini-batches normalize='avalanche' is the "
                "scale of. Make the plugin with another `normalize`."
            )
        model = unwrapped(model)
        if isinstance(batches_or_fisher, Mapping):
            fisher = dict(batches_or_fisher)
        else:
            device = next(model.parameters()).device
            check_batches(batches_or_fisher)
            options: dict[str, Any] = {
                "forward": lambda model, batch: logits_of(self.forward(model, batch)),
                "targets": lambda batch: self.unpack(batch).targets,
                **self.fisher_options,
            }
            with untouched_randomness():
                batches: Iterable[Batch] = (on_device(b, device) for b in batches_or_fisher)
                if not self._is_overridden("unpack"):
                    batches = map(beside_no_labels, batches)
                fisher = diagonal_fisher(model, batches, self.fisher_type, **options)
        self.penalty.consolidate(model, fisher)
        self.fisher = fisher

    def compute_fisher(self, strategy: Any) -> dict[str, Tensor]:
        """Return the diagonal Fisher of the current experience, by parameter name."""
        batches = self.fisher_batches or self._own_batches
        fisher = self._strategy_fisher(strategy)
        return fisher.compute(lambda: batches(strategy), self.fisher_options)

    def _strategy_fisher(self, strategy: Any) -> StrategyFisher:
        return StrategyFisher(
            self,
            strategy,
            self.fisher_type,
            self._likelihood or self._known_likelihood(strategy),
            own_forward=self._is_overridden("forward"),
            own_unpack=self._is_overridden("unpack"),
        )

    def _scaled(self, strategy: Any, fisher: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale F to the trace of Avalanche's own, with `normalize="avalanche"`."""
        trace = sum(float(f.sum(dtype=torch.float64)) for f in fisher.values())
        if self.normalize != AVALANCHE or not trace:
            return fisher
        datasets = self._shared.datasets(strategy.experience)
        target = builtin_trace(self._strategy_fisher(strategy), strategy, datasets)
        return {name: f * (target / trace) for name, f in fisher.items()}

    def unpack(self, batch: Batch) -> Unpacked:
        """Return (inputs, targets, task labels or None) of a batch; override for other batches."""
        return unpack(batch)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [N, C] of a batch; override for other models."""
        inputs, _, task_labels = self.unpack(batch)
        if isinstance(inputs, Mapping) and isinstance(batch, Mapping):
            output = model(**inputs)
        elif task_labels is not None:
            output = avalanche_forward(model, inputs, task_labels)
        else:
            output = model(inputs)
        logits: Tensor = logits_of(output)
        return logits

    def active_classes(self, strategy: Any, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return which classes the Fisher's labels run over, [C] or [N, C] bool; None: all.

        By default those of a `MaskedCrossEntropy`, and in a multi-head model those of the sample's
        head, which Avalanche pads with zeros up to the widest one.

        Args:
            strategy: The plugin's.
            batch: As the data loader gave it.
            logits: Its logits [N, C].

        Returns:
            The mask.
        """
        model = unwrapped(strategy.model)
        return active_classes(
            strategy._criterion, model, lambda: self.unpack(batch).task_labels, logits.size(1)
        )

    def _known_likelihood(self, strategy: Any) -> Likelihood | None:
        """Return the likelihood by the criterion's type; softmax where `forward` is the user's."""
        if not needs_likelihood(self.fisher_type):
            return None
        if self._is_overridden("forward") or "forward" in self.fisher_options:
            return Likelihood(ignore_index=getattr(strategy._criterion, "ignore_index", None))
        likelihood = known_likelihood(strategy)
        return None if likelihood is None else likelihood.of_type(self.fisher_type)

    def _check_likelihood(self, strategy: Any) -> None:
        """Raise before the first training step if the likelihood of the outputs is unknown."""
        if self._likelihood is not None or not needs_likelihood(self.fisher_type):
            return
        self._likelihood = self._known_likelihood(strategy)
        if self._is_overridden("forward") or "forward" in self.fisher_options:
            return
        if strategy.mb_output is not None:
            likelihood = checked_likelihood(strategy, strategy.mb_output, strategy.mb_y)
            self._likelihood = likelihood.of_type(self.fisher_type)

    @property
    def _says_what_is_fed(self) -> bool:
        own = self._is_overridden("forward") or self._is_overridden("unpack")
        return own or "forward" in self.fisher_options or self.fisher_batches is not None

    def _stop_watching(self) -> None:
        if self._watch:
            self._watch.stop()
            self._warned_of_changes |= self._watch.found
        self._watch = None

    def _is_overridden(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(DiagonalEWCPlugin, method)

    def _own_batches(self, strategy: Any) -> Iterator[Batch]:
        datasets = self._shared.datasets(strategy.experience)
        if (count := self.fisher_options.get("max_samples")) is not None:
            generator = self.fisher_options.get("generator") or torch.Generator().manual_seed(0)
            yield from drawn_batches(strategy, datasets, self._num_workers, count, generator)
            return
        for dataset in datasets:
            yield from dataset_batches(strategy, dataset, self._num_workers)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and plain values.

        Returns:
            What `torch.load(weights_only=True)` accepts.

        Raises:
            RuntimeError: Between two experiences that share one F, of which the first one's data is
                needed: it cannot be saved.
        """
        if self._shared.needs_past_data:
            raise RuntimeError(
                f"`state_dict` was called after {self._shared.n_done} of the experiences that "
                "share one Fisher. Call it after the last, or pickle the plugin with its data."
            )
        return {
            "penalty": self.penalty.state_dict(),
            "fisher": dict(self.fisher),
            "fisher_seconds": self.fisher_seconds,
            "n_parts": self._shared.n_done,
            "scaled_as": AVALANCHE if self.normalize == AVALANCHE else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a plugin with the same settings.

        Args:
            state: Of `state_dict()`.

        Raises:
            ValueError: It is no plugin's state, or the penalty's settings differ.
        """
        check_keys(state, {"penalty", "fisher", "fisher_seconds", "n_parts"})
        scaled_as = AVALANCHE if self.normalize == AVALANCHE else None
        if state.get("scaled_as") != scaled_as:
            raise ValueError(
                f"`normalize` of this plugin is {self.normalize!r}, and the state comes from one "
                f"with {state.get('scaled_as')!r}; make it with the same."
            )
        self.penalty.load_state_dict(state["penalty"])
        self.fisher = state["fisher"]
        self.fisher_seconds = state["fisher_seconds"]
        self._shared.clear()
        self._shared.n_done = state["n_parts"]
        self._model = None

    @property
    def _is_active(self) -> bool:
        return self.ewc_lambda > 0 and self.penalty.n_experiences > 0

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled.
        return {**vars(self), "_strategy": None, "_model": None, "_watch": None}


_REMEDY = "Use a smaller `ewc_lambda` or learning rate, or `implicit=True`."

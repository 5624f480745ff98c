"""Whole runs with Avalanche's EWC and with ours by the same definition, from the same seed.

Three runs each: Avalanche's EWC; ours with the penalty summed in Avalanche's order, which must be
the same to the last bit; and ours as it is, whose folded penalty differs by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EWCPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ewc_plugin import DiagonalEWCPlugin
from experiments.data.sources import DataSource
from experiments.data.streams import make_stream
from experiments.data.tensor_path import FISHER_BATCH, FastData
from experiments.settings.run import RunSettings
from experiments.studies.parity.importances import (
    FLOAT64_TOLERANCE,
    Tensors,
    check_row,
    float64_by_default,
    largest,
)
from experiments.training.avalanche_ewc import BuiltinEWC
from experiments.training.networks import MultiHead, make_model
from experiments.training.run import OPTIMIZERS


@dataclass
class RunTrace:
    """Values recorded during a run.

    Attributes:
        importances: F after each experience, by parameter.
        penalties: lambda times the penalty, at each step.
        value_error: Of the folded penalty's value beside the sum in Avalanche's order at the
            same weights, relative; the largest.
        gradient_error: Of its gradient, relative to the largest entry; the largest.
        weights: At the end.
    """

    importances: list[Tensors] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    value_error: float = 0.0
    gradient_error: float = 0.0
    weights: Tensors = field(default_factory=dict)


class SameDraws(SupervisedPlugin):
    """Advance the global RNG as Avalanche's EWC does, by drawing one seed."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Make one iterator, as Avalanche's EWC does."""
        iter(DataLoader(strategy.experience.dataset, collate_fn=list))


class InBuiltinOrder(DiagonalEWCPlugin):
    """Ours with the penalty summed parameter by parameter and experience by experience.

    The folded penalty is evaluated beside it, at the same weights.
    """

    def __init__(self, *args: Any, trace: RunTrace, **options: Any) -> None:
        super().__init__(*args, keep_importance_data=True, **options)  # type: ignore[misc]
        self.trace = trace

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty in float32, summed in Avalanche's order."""
        self._hooks_called = True
        if not self.penalty.history:
            return
        total = torch.tensor(0).float()
        for F, anchor in self._terms():
            for name, parameter in strategy.model.named_parameters():
                if name in F:
                    total += (F[name] * (parameter - anchor[name]).pow(2)).sum()
        self._compare(strategy.model, total)
        self.penalty_loss = (self.ewc_lambda * total).detach()
        strategy.loss += self.ewc_lambda * total

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing: the penalty is in the loss."""

    def _terms(self) -> Iterator[tuple[Tensors, Tensors]]:
        history = self.penalty.history
        if self.penalty.decay_factor is None:
            yield from ((past.fisher, past.anchor) for past in history)
            return
        folded = history[0].fisher
        for past in history[1:]:
            folded = {
                k: self.penalty.decay_factor * folded.get(k, 0) + f for k, f in past.fisher.items()
            }
        yield folded, history[-1].anchor

    def _compare(self, model: nn.Module, total: Tensor) -> None:
        parameters = dict(model.named_parameters())
        wanted = torch.autograd.grad(
            total, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        reference = {
            id(p): g for p, g in zip(parameters.values(), wanted, strict=True) if g is not None
        }
        folded = self.penalty(model)
        found = torch.autograd.grad(folded, list(parameters.values()), allow_unused=True)
        scale = max(float(g.abs().max()) for g in reference.values())
        errors = [
            float((reference[id(p)] if g is None else g - reference[id(p)]).abs().max())
            for p, g in zip(parameters.values(), found, strict=True)
            if id(p) in reference
        ]
        if scale > 0:
            self.trace.gradient_error = max(self.trace.gradient_error, max(errors) / scale)
        wanted_value = float(total.detach())
        if wanted_value > 0:
            error = abs(float(folded.detach()) - wanted_value) / wanted_value
            self.trace.value_error = max(self.trace.value_error, error)


class Recorder(SupervisedPlugin):
    """Notes importances after each experience and the penalty at each step."""

    def __init__(self, method: Any, trace: RunTrace) -> None:
        super().__init__()
        self.method = method
        self.trace = trace

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Compute Avalanche's penalty as the loss minus the criterion."""
        if isinstance(self.method, DiagonalEWCPlugin):
            penalty = self.method.penalty_loss
            self.trace.penalties.append(0.0 if penalty is None else float(penalty))
        else:
            self.trace.penalties.append(float(self.method.added))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """F of the experience alone, or what online mode has made of it."""
        if isinstance(self.method, EWCPlugin):
            latest = self.method.importances[max(self.method.importances)]
            found = {name: imp.data.detach().clone() for name, imp in latest.items()}
        elif self.method.penalty.decay_factor is None:
            found = {name: f.clone() for name, f in self.method.fisher.items()}
        else:
            names = {id(p): name for name, p in strategy.model.named_parameters()}
            pairs = self.method.penalty.pairs(strategy.model)
            found = {names[id(p)]: q.fisher.clone() for p, q in pairs}
        self.trace.importances.append(found)


class Observed(BuiltinEWC):
    """Avalanche's EWC plugin, extended to record the penalty that it adds."""

    added: float = 0.0

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Run Avalanche's on a loss of zero, so that the penalty stands alone for a moment."""
        task_loss = strategy.loss
        strategy.loss = torch.zeros(())
        super().before_backward(strategy, **kwargs)
        penalty = strategy.loss
        self.added = float(penalty.detach())
        strategy.loss = task_loss
        if penalty.requires_grad:
            strategy.loss += penalty


class ToFloat64(nn.Module):
    """Makes a float64 network take float32 images."""

    def forward(self, x: Tensor) -> Tensor:
        """The input as float64."""
        return x.double()


def trace_of(kind: str, run: RunSettings, source: DataSource, *, double: bool = False) -> RunTrace:
    """Train with one kind of EWC, and record its values.

    Args:
        kind: "avalanche-ewc", "in its order" or "folded".
        run: Its settings.
        source: Where the images are.
        double: Train in float64.

    Returns:
        What it did.
    """
    stream = make_stream(run, source)
    RNGManager.set_random_seeds(run.seed)
    model = make_model(run, stream)
    if double:
        model = _in_float64(model)
    trace = RunTrace()
    fast = FastData(stream)
    method: Any
    if kind == "avalanche-ewc":
        method, plugins = Observed(run), []
    else:
        size = run.batch_size if run.fisher_type == "batched" else FISHER_BATCH
        options: dict[str, Any] = {
            "fisher_type": run.fisher_type,
            "fisher_batches": lambda strategy: strategy.experience.dataset.batches(size),
        }
        arguments = (run.ewc_lambda, run.mode, run.decay_factor)
        method = (
            InBuiltinOrder(*arguments, trace=trace, **options)
            if kind == "in its order"
            else DiagonalEWCPlugin(*arguments, **options)
        )
        plugins = [SameDraws()]
    strategy = Naive(
        model=model,
        optimizer=OPTIMIZERS[run.optimizer](model.parameters(), lr=run.learning_rate),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=run.batch_size,
        train_epochs=run.epochs,
        plugins=[fast, method, *plugins, Recorder(method, trace)],
        evaluator=None,
    )
    with float64_by_default() if double else nullcontext():
        for experience in stream.benchmark.train_stream:
            strategy.train(experience, eval_streams=[])
    trace.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trace


def _in_float64(model: nn.Module) -> nn.Module:
    model = model.double()
    if isinstance(model, MultiHead):
        model.features = nn.Sequential(ToFloat64(), model.features)
        return model
    return nn.Sequential(ToFloat64(), model)


IN_ORDER, FOLDED = "in Avalanche's order", "folded"


def same_definition(
    run: RunSettings, source: DataSource, *, double: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of `checks.csv`: `batched` against Avalanche's EWC, over a whole run."""
    builtin, ordered, folded = (
        trace_of(kind, run, source, double=double)
        for kind in ("avalanche-ewc", "in its order", "folded")
    )
    check = _checker(run, double)
    steps = {"size": len(builtin.penalties), "size_of": "steps"}
    yield _importances(check, ordered, builtin, penalty=IN_ORDER, tolerance=0.0)
    pairs = list(zip(ordered.penalties, builtin.penalties, strict=True))
    yield check(
        what="penalty at every step",
        penalty=IN_ORDER,
        **steps,
        sums=(sum(ordered.penalties), sum(builtin.penalties)),
        error=max(abs(a - b) for a, b in pairs) / (max(builtin.penalties) or 1.0),
        tolerance=0.0,
    )
    yield _weights(check, ordered, builtin, penalty=IN_ORDER, tolerance=0.0)
    for what, error in (("value", ordered.value_error), ("gradient", ordered.gradient_error)):
        what = f"penalty's {what} at the same weights"
        yield check(what=what, penalty=FOLDED, **steps, error=error, tolerance=None)
    yield _weights(check, folded, builtin, penalty=FOLDED, tolerance=None)


def same_mathematics(
    run: RunSettings, source: DataSource, *, double: bool
) -> Iterator[dict[str, Any]]:
    """Rows of `checks.csv`: `empirical` against Avalanche's EWC with mini-batches of one sample."""
    single = replace(run, method="avalanche-ewc", fisher_type=None, importance_batch=1)
    builtin = trace_of("avalanche-ewc", single, source, double=double)
    ours = trace_of("in its order", run, source, double=double)
    check = functools.partial(_checker(run, double), importance_batch=1, penalty=IN_ORDER)
    tolerance = FLOAT64_TOLERANCE if double else None
    yield _importances(check, ours, builtin, tolerance=tolerance)
    yield _weights(check, ours, builtin, tolerance=None)


def _checker(run: RunSettings, double: bool) -> Callable[..., dict[str, Any]]:
    dtype = "float64" if double else "float32"
    return functools.partial(
        check_row, run, scope="whole run", against="avalanche-ewc", dtype=dtype
    )


def _importances(
    check: Callable[..., dict[str, Any]], ours: RunTrace, builtin: RunTrace, **more: Any
) -> dict[str, Any]:
    pairs = list(zip(ours.importances, builtin.importances, strict=True))
    return check(
        what="importances after every experience",
        size=len(pairs),
        size_of="experiences",
        tensors=pairs[-1],
        error=max(largest(a, b) for a, b in pairs),
        **more,
    )


def _weights(
    check: Callable[..., dict[str, Any]], ours: RunTrace, builtin: RunTrace, **more: Any
) -> dict[str, Any]:
    return check(
        what="weights at the end",
        size=sum(w.numel() for w in builtin.weights.values()),
        size_of="weights",
        tensors=(ours.weights, builtin.weights),
        **more,
    )

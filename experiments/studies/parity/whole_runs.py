"""Whole runs with Avalanche's EWC and with ours by the same definition, from the same seed.

Three runs each: the built-in; ours with the penalty summed in the built-in's order, which must be
the same to the last bit; and ours as it is, whose folded penalty differs by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    float64_by_default,
    largest,
    row,
    total,
)
from experiments.training.avalanche_ewc import BuiltinEWC
from experiments.training.networks import MultiHead, make_model
from experiments.training.run import OPTIMIZERS


@dataclass
class Trace:
    """What a run did.

    Attributes:
        importances: F after each experience, by parameter.
        penalties: lambda times the penalty, at each step.
        value_error: Of the folded penalty's value beside the sum in the built-in's order at the
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
    """Draws from the global RNG what the built-in's pass over the data draws: one seed."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """One iterator, as the built-in makes one."""
        iter(DataLoader(strategy.experience.dataset, collate_fn=list))


class InBuiltinOrder(DiagonalEWCPlugin):
    """Ours with the penalty summed parameter by parameter and experience by experience.

    The folded penalty is evaluated beside it, at the same weights.
    """

    def __init__(self, *args: Any, trace: Trace, **options: Any) -> None:
        super().__init__(*args, keep_importance_data=True, **options)  # type: ignore[misc]
        self.trace = trace

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """As the built-in sums it: in float32."""
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

    def __init__(self, method: Any, trace: Trace) -> None:
        super().__init__()
        self.method = method
        self.trace = trace

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """The built-in's share of the loss is what the criterion does not explain."""
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
    """The built-in, which also says what it added to the loss."""

    added: float = 0.0

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Runs the built-in's on a loss of zero, so that the penalty stands alone for a moment."""
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
        """The same numbers."""
        return x.double()


def trace_of(kind: str, run: RunSettings, source: DataSource, *, double: bool = False) -> Trace:
    """One run.

    Args:
        kind: "built-in", "in its order" or "folded".
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
    trace = Trace()
    fast = FastData(stream)
    method: Any
    if kind == "built-in":
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


def same_definition(
    run: RunSettings, source: DataSource, *, double: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of `parity.csv`: `batched` against the built-in, over a whole run."""
    builtin, ordered, folded = (
        trace_of(kind, run, source, double=double)
        for kind in ("built-in", "in its order", "folded")
    )
    check = f"whole run, batched, {_words(run, double)}"
    steps = len(builtin.penalties)
    exact = f"{check}, penalty in the built-in's order"
    yield _importances_row(run, exact, ordered, builtin, 0.0)
    differences = [abs(a - b) for a, b in zip(ordered.penalties, builtin.penalties, strict=True)]
    yield row(
        run,
        exact,
        "penalty at every step",
        steps,
        sum(ordered.penalties),
        sum(builtin.penalties),
        max(differences),
        0.0,
    )
    yield _weights_row(run, exact, ordered, builtin, 0.0)
    at = f"{check}, folded penalty at the same weights"
    for quantity, error in (
        ("largest relative difference of the value in any step", ordered.value_error),
        ("largest relative difference of the gradient in any step", ordered.gradient_error),
    ):
        yield row(run, at, quantity, steps, None, None, error, None)
    yield _weights_row(run, f"{check}, folded penalty, run on its own", folded, builtin, None)


def same_mathematics(
    run: RunSettings, source: DataSource, *, double: bool
) -> Iterator[dict[str, Any]]:
    """Rows of `parity.csv`: `empirical` against the built-in with mini-batches of one sample."""
    single = replace(run, method="avalanche-ewc", fisher_type=None, importance_batch=1)
    builtin = trace_of("built-in", single, source, double=double)
    ours = trace_of("in its order", run, source, double=double)
    check = f"whole run, empirical, {_words(run, double)}, built-in's importances at batch 1"
    tolerance = FLOAT64_TOLERANCE if double else None
    yield _importances_row(run, check, ours, builtin, tolerance)
    yield _weights_row(run, check, ours, builtin, None)


def _importances_row(
    run: RunSettings, check: str, ours: Trace, builtin: Trace, tolerance: float | None
) -> dict[str, Any]:
    pairs = list(zip(ours.importances, builtin.importances, strict=True))
    last, last_builtin = pairs[-1]
    return row(
        run,
        check,
        "importances after every experience",
        len(pairs),
        total(last),
        total(last_builtin),
        max(largest(a, b) for a, b in pairs),
        tolerance,
    )


def _weights_row(
    run: RunSettings, check: str, ours: Trace, builtin: Trace, tolerance: float | None
) -> dict[str, Any]:
    return row(
        run,
        check,
        "weights at the end",
        sum(w.numel() for w in builtin.weights.values()),
        total(ours.weights),
        total(builtin.weights),
        largest(ours.weights, builtin.weights),
        tolerance,
    )


def _words(run: RunSettings, double: bool) -> str:
    rate = f"{run.optimizer} {run.learning_rate:g}"
    drop = f", dropout {run.dropout:g}" if run.dropout else ""
    size = f"{run.hidden_layers}x{run.hidden_size}, batch {run.batch_size}"
    dtype = "float64" if double else "float32"
    return f"{run.mode}, {rate}{drop}, {size}, λ = {run.ewc_lambda:g}, {dtype}"

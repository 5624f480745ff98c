"""The likelihood p(y | outputs) that a strategy's criterion implies; the Fisher needs it.

The type of a known criterion determines it. For any other criterion, its gradient is compared
with that of a softmax classifier. If neither identifies it, an error is raised before training.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from avalanche.training.losses import MaskedCrossEntropy
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ewc_plugin.avalanche.template import left_as_it_was, overrides
from ewc_plugin.batch_parts import logits_of, with_logits
from ewc_plugin.contexts import ModelState, untouched_randomness
from ewc_plugin.fisher.likelihoods import bernoulli_score, gaussian_score
from ewc_plugin.fisher.scores import FisherType, Score

_IGNORED = -100  # torch's default `ignore_index`
_REMEDY = (
    "Pass `fisher_type=gaussian_score`, `bernoulli_score` or a score of your own; or, if they are "
    "in truth logits [N, C] of a softmax classifier, say so: override the plugin's `forward`, or "
    "pass `fisher_options={'forward': f}`, to return them."
)


@dataclass(frozen=True)
class Likelihood:
    """A likelihood p(y | outputs).

    Class weights, label smoothing, `pos_weight` and the reduction of a criterion weigh samples and
    classes in the training; they leave log p as it is, and so the Fisher.

    Attributes:
        score: Of the exact Fisher; None for a softmax classifier, where `fisher_type` decides.
        ignore_index: The label of samples that the criterion leaves out, and the Fisher too.
        normalized: Whether the outputs must be log-probabilities.
    """

    score: Score | None = None
    ignore_index: int | None = None
    normalized: bool = False

    def of_type(self, fisher_type: FisherType) -> Likelihood:
        """Return this likelihood, or raise if it has no Fisher of this type.

        Args:
            fisher_type: PREDICTED, the default, and EXACT are the exact one where `score` is set.

        Returns:
            The same.

        Raises:
            ValueError: It has none.
        """
        if self.score is not None and fisher_type not in (FisherType.PREDICTED, FisherType.EXACT):
            raise ValueError(
                f"`fisher_type` {fisher_type.value!r} is of softmax classifiers, and the criterion "
                "trains another likelihood. Use 'exact', or a score of your own."
            )
        return self


def mean_square_score(outputs: Tensor, batch: Any) -> Tensor:
    """Score of `nn.MSELoss`: a constant less than -log p of a normal y of variance D / 2."""
    return gaussian_score(outputs, batch, variance=outputs.size(1) / 2)


def _of_squares(criterion: Any) -> Likelihood:
    if getattr(criterion, "reduction", "mean") == "sum":
        return Likelihood(partial(gaussian_score, variance=0.5))
    return Likelihood(mean_square_score)


def _of_classes(criterion: Any) -> Likelihood:
    return Likelihood(ignore_index=getattr(criterion, "ignore_index", _IGNORED))


def _of_log_probabilities(criterion: Any) -> Likelihood:
    return Likelihood(ignore_index=_of_classes(criterion).ignore_index, normalized=True)


_KNOWN: dict[Any, Callable[[Any], Likelihood]] = {
    nn.CrossEntropyLoss: _of_classes,
    F.cross_entropy: _of_classes,
    MaskedCrossEntropy: lambda criterion: Likelihood(),
    nn.NLLLoss: _of_log_probabilities,
    F.nll_loss: _of_log_probabilities,
    nn.BCEWithLogitsLoss: lambda criterion: Likelihood(bernoulli_score),
    F.binary_cross_entropy_with_logits: lambda criterion: Likelihood(bernoulli_score),
    nn.MSELoss: _of_squares,
    F.mse_loss: _of_squares,
}


def known_likelihood(strategy: Any) -> Likelihood | None:
    """Return the likelihood that belongs to the criterion's type.

    Args:
        strategy: With the criterion.

    Returns:
        None where the type says nothing: for a user's own, and a template's own `criterion()`.

    Raises:
        ValueError: It is one of torch's losses that belongs to no likelihood of ours.
    """
    return None if overrides(strategy, "criterion") else _by_type(strategy._criterion)


def _by_type(criterion: Any) -> Likelihood | None:
    if isinstance(criterion, partial) and not criterion.args:
        function = criterion.func
        if inspect.isroutine(function) and function in _KNOWN:
            return _KNOWN[function](SimpleNamespace(**criterion.keywords))
    for known, likelihood in _KNOWN.items():
        if criterion is known or (inspect.isclass(known) and _is_a(criterion, known)):
            return likelihood(criterion)
    owner = criterion if inspect.isroutine(criterion) else type(criterion)
    if owner.__module__ in ("torch.nn.modules.loss", "torch.nn.functional"):
        refuse(criterion)
    return None


def checked_likelihood(strategy: Any, outputs: Any, targets: Any) -> Likelihood:
    """Return the likelihood, checked against a mini-batch.

    Args:
        strategy: With the criterion.
        outputs: Of the model, as the criterion takes them.
        targets: Of the same samples.

    Returns:
        The likelihood.

    Raises:
        ValueError: It is not certain, or the outputs do not fit it.
    """
    with _modules_left_as_they_were(strategy):
        return _checked_likelihood(strategy, outputs, targets)


def _checked_likelihood(strategy: Any, outputs: Any, targets: Any) -> Likelihood:
    logits = logits_of(outputs)
    likelihood = known_likelihood(strategy)
    if likelihood is None and _hands_outputs_on(strategy, outputs, targets):
        likelihood = _by_type(strategy._criterion)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"The model must return a tensor, or a mapping or object with `logits`, got "
            f"{type(logits).__name__}. Override the plugin's `forward` to return logits [N, C]."
        )
    if likelihood is not None and likelihood.score is not None:
        return likelihood
    if logits.dim() != 2 or logits.size(1) < 2:
        raise ValueError(
            f"A softmax classifier has outputs [N, C] with at least 2 classes, got "
            f"{tuple(logits.shape)}. Override the plugin's `forward` to return logits [N, C]; or "
            "pass `fisher_type=bernoulli_score` for yes/no labels, gaussian_score for regression."
        )
    if likelihood is None:
        if not _is_softmax(strategy, outputs, logits.detach(), targets):
            refuse(strategy._criterion)
        likelihood = Likelihood(ignore_index=_IGNORED)
    if likelihood.normalized and bool((logits.detach().logsumexp(1).abs() > 1e-2).any()):
        raise ValueError(
            f"{_name(strategy._criterion)} takes log-probabilities, and the model's outputs are "
            "none: their exponentials do not sum to 1. End the model in `nn.LogSoftmax(1)`, or "
            "use `nn.CrossEntropyLoss`."
        )
    return likelihood


def refuse(criterion: Any) -> NoReturn:
    """Raise a `ValueError`: the criterion does not determine the likelihood.

    Args:
        criterion: The strategy's.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"The criterion {_name(criterion)} does not say what the model's outputs mean, so the "
        f"Fisher of them is not known. {_REMEDY}"
    )


@contextmanager
def _modules_left_as_they_were(strategy: Any) -> Iterator[None]:
    """Restore model and criterion: a template's `criterion()` may run them, which may count.

    The buffers' version counters too: the graph of the loss may hold the buffers.
    """
    own = overrides(strategy, "criterion")
    modules = [m for m in (strategy.model, strategy._criterion) if own and isinstance(m, nn.Module)]
    states = [ModelState(module) for module in modules]
    with ExitStack() as stack:
        for buffer in chain.from_iterable(state.buffers for state in states):
            stack.enter_context(_unsafe_preserve_version_counter(buffer))
        try:
            yield
        finally:
            for state in states:
                state.restore(values=True)


def _hands_outputs_on(strategy: Any, outputs: Any, y: Any) -> bool:
    """Return whether a template's `criterion()` passes the outputs and targets on to its criterion.

    The criterion then says what the outputs mean, whatever else the template adds to the loss.
    """
    if not overrides(strategy, "criterion"):
        return False
    criterion, seen = strategy._criterion, []

    def watched(*arguments: Any) -> Any:
        seen.append(arguments)
        return criterion(*arguments)

    with left_as_it_was(strategy), untouched_randomness(), torch.enable_grad():
        strategy.mb_output, strategy._criterion = outputs, watched
        strategy.criterion()
    return any(len(a) == 2 and a[0] is outputs and _same(a[1], y) for a in seen)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return left is right


def _is_softmax(strategy: Any, outputs: Any, logits: Tensor, y: Any) -> bool:
    """Return whether the criterion's gradient is c_n (softmax(o_n) - onehot(y_n)) with c_n > 0.

    Then it is a weighted sum of log softmax(o_n)[y_n], if c_n is the same for other outputs: that
    of a focal loss, or of one with a margin, is not. A callable is tried with every class, a
    template's `criterion()` with the labels of the mini-batch; both with random outputs of two
    scales and with the model's own.
    """
    N, C = logits.shape
    by_template = overrides(strategy, "criterion")
    criterion = strategy._criterion
    if not inspect.isroutine(criterion):
        criterion = copy.deepcopy(criterion)  # it may count its calls
    dtype = torch.promote_types(logits.dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for i in range(2 if by_template else max(2, -(-C // N))):
        labels = y if by_template else _labels_like(y, (torch.arange(N) + i * N) % C, C)
        if (target := _one_hot(labels, C)) is None:
            return False
        trials = [scale * torch.randn(N, C, generator=generator) for scale in (1, 2)]
        if bool(logits.isfinite().all()):
            trials.append(logits)
        factors = []
        for o in trials:
            trial = o.detach().to(logits.device, dtype).requires_grad_()
            with left_as_it_was(strategy), untouched_randomness(), torch.enable_grad():
                try:
                    strategy.mb_output = with_logits(outputs, trial)
                    loss = (
                        strategy.criterion()
                        if by_template
                        else criterion(strategy.mb_output, labels)
                    )
                    (gradient,) = torch.autograd.grad(loss.sum(), trial)
                except Exception:  # whatever a user's code raises on outputs of this shape
                    return False
            c = _factors(gradient, trial.detach(), target)
            if c is None:
                return False
            factors.append(c)
        c = torch.stack(factors)  # [trials, N], NaN where there is no label or hardly a gradient
        largest, least = c.nan_to_num(-torch.inf).amax(0), c.nan_to_num(torch.inf).amin(0)
        if bool((largest > 1.01 * least).any()):
            return False
    return True


def _factors(gradient: Tensor, outputs: Tensor, target: Tensor) -> Tensor | None:
    """Return a gradient's factors c_n [N], NaN where too small to tell; None if it has none."""
    labelled = target.sum(1) > 0
    direction = torch.where(labelled[:, None], outputs.softmax(1) - target, 0)
    sizes = direction.square().sum(1)
    c = (gradient * direction).sum(1) / sizes.clamp(min=1e-30)
    known = labelled & (sizes > 1e-6)
    error = (gradient - c[:, None] * direction)[known | ~labelled].abs()
    if not bool((c[known] > 0).all()) or (
        error.numel() and float(error.max()) > 1e-4 * float(c.max())
    ):
        return None
    return c.masked_fill(~known, torch.nan)


def _labels_like(y: Any, labels: Tensor, C: int) -> Any:
    """Class indices in the form of y: indices [N], or one row of probabilities each."""
    if isinstance(y, Tensor) and y.dim() == 2:
        return F.one_hot(labels, C).to(y)
    return labels.to(y) if isinstance(y, Tensor) else labels


def _one_hot(labels: Any, C: int) -> Tensor | None:
    """Return labels as probabilities [N, C], 0 where ignored; None if they are no class labels."""
    if not isinstance(labels, Tensor) or labels.dim() not in (1, 2):
        return None
    if labels.dim() == 2:
        return labels.float() if labels.size(1) == C else None
    known = (labels >= 0) & (labels < C)
    if labels.is_floating_point() or bool((~known & (labels != _IGNORED)).any()):
        return None
    return F.one_hot(labels.long().where(known, 0), C).float() * known[:, None]


def _is_a(criterion: Any, known: type) -> bool:
    """Return whether a criterion is of this class and does not override its `forward`."""
    call = "forward" if issubclass(known, nn.Module) else "__call__"
    return isinstance(criterion, known) and getattr(type(criterion), call) is getattr(known, call)


def _name(criterion: Any) -> str:
    return f"`{getattr(criterion, '__name__', type(criterion).__name__)}`"

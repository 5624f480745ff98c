"""`QuadraticPenalty`: the EWC penalty over all past experiences, stored as one quadratic."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ewc_plugin.penalty.gradient import PenaltyFunction, add_gradients_, traceable_value, value
from ewc_plugin.penalty.options import (
    Mode,
    Normalization,
    checked_decay,
    checked_non_negative,
    checked_storage,
    normalizer,
    parsed,
)
from ewc_plugin.penalty.pairs import Pairs
from ewc_plugin.penalty.parameters import (
    ModelFingerprint,
    canonical_parameters,
    check_has_values,
    checked_fisher,
)
from ewc_plugin.penalty.quadratic import Quadratic, Storage, as_real
from ewc_plugin.penalty.state import Remembered, loaded_state


class QuadraticPenalty:
    """sum_t F_t (theta - theta*_t)^2 in O(P) memory and time for any number of experiences t.

    `separate` keeps the pull to each experience's theta*_t. `online` keeps one quadratic at the
    last theta*: F <- decay_factor F + F_new. With decay_factor = 1 that is the Laplace
    approximation carried forward as a Bayesian would (Huszar's correction): prefer it when there
    are many experiences, where `separate` counts the early ones' data again in each later anchor.
    Schwarz et al.'s online EWC also weighs the remembered quadratic by decay_factor while the next
    experience trains; to have it, multiply the lambda by decay_factor.

    There is no 1/2 and no lambda in it: the loss is `task_loss + ewc_lambda * penalty(model)`, so
    that ewc_lambda is Avalanche's, and half of the lambda of Kirkpatrick et al.

    Args:
        mode: "separate" or "online".
        decay_factor: Weight of the past in `online`, which needs one; `separate` takes none.
        normalize: "mean", "trace" or "max" of each experience's F, over all its parameters, to
            divide it by: a lambda then means the same across models, data and Fisher types.
        keep_history: Also keep every experience's F and theta*; memory then grows by 2 P each.
        storage_dtype: Type of the folded F and of the offset: torch.bfloat16 (then off by up to
            0.4 % per experience), float32 or float64. The anchor keeps the parameters' precision.
        storage_device: Device of the state, for example "cpu"; it is copied in every step.

    Raises:
        ValueError: An argument is out of its range, or the device cannot be used.

    Attributes:
        n_experiences: Number of experiences that were folded in.
        history: With `keep_history`, a `Remembered` for each experience.

    Source: Kirkpatrick et al. 2017 (the penalty); Huszar 2017 (one quadratic); Schwarz et al. 2018
    (online).

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 1)
        >>> penalty = QuadraticPenalty()
        >>> penalty.consolidate(model, {"weight": torch.tensor([[3.0]])})
        >>> _ = nn.init.constant_(model.weight, 3)
        >>> penalty(model)
        tensor(12., grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        mode: Mode | str = Mode.SEPARATE,
        decay_factor: float | None = None,
        *,
        normalize: Normalization | str | None = None,
        keep_history: bool = False,
        storage_dtype: torch.dtype | None = None,
        storage_device: torch.device | str | None = None,
    ) -> None:
        self.mode = parsed(Mode, "mode", mode)
        self.decay_factor = checked_decay(self.mode, decay_factor)
        self.normalize = (
            None if normalize is None else parsed(Normalization, "normalize", normalize)
        )
        if not isinstance(keep_history, bool):
            raise ValueError(f"`keep_history` must be True or False, got {keep_history!r}.")
        self.keep_history = keep_history
        self.storage = Storage(*checked_storage(storage_dtype, storage_device))
        self.n_experiences = 0
        self.history: list[Remembered] = []
        self._quadratics: dict[str, Quadratic] = {}
        self._fingerprint: ModelFingerprint | None = None
        self._pairs = Pairs([])  # of the model that matches `_fingerprint`

    def consolidate(self, model: nn.Module, fisher: Mapping[str, Tensor]) -> None:
        """Add an experience: store the model's parameters as theta* and `fisher` as their weights.

        Everything is copied. If an error is raised, the penalty does not change.

        Args:
            model: As it is at the end of an experience.
            fisher: By parameter name, as `diagonal_fisher` gives it. A parameter that is left out
                (a frozen one) is given no new weight.

        Raises:
            TypeError: `model` is no module, or `fisher` no mapping, as when both change places.
            ValueError: `fisher` is empty; an entry's name, shape or type is not the model's, or it
                is negative or not finite; a weight is not finite; F overflows in the type in which
                it is kept; or a parameter that is remembered is gone or has shrunk.
        """
        if not (isinstance(model, nn.Module) and isinstance(fisher, Mapping)):
            raise TypeError(
                "`consolidate(model, fisher)` takes an nn.Module, then a mapping from parameter "
                f"names to tensors, got {type(model).__name__} and {type(fisher).__name__}."
            )
        if not fisher:
            raise ValueError("`fisher` has no entries, so there is nothing to remember.")
        parameters = canonical_parameters(model)
        new = checked_fisher(model, fisher)
        if not any(bool(f.any()) for f in new.values()):
            warnings.warn(
                "The Fisher is zero everywhere: nothing of this experience is protected. A model "
                "that is certain of every label has no PREDICTED Fisher; try fisher_type='exact'.",
                stacklevel=2,
            )
        divisor = 1.0 if self.normalize is None else normalizer(self.normalize, new.values())
        quadratics, kept = {}, {}
        past = self._matched(parameters)
        for name, parameter in parameters.items():
            F = new.get(name)
            if F is not None:
                scaled = F if divisor == 1 else F.double() / divisor
                F = self.storage.put(scaled, parameter).clone()
                kept[name] = F
            quadratic = self._folded(past.get(name), parameter, F)
            if quadratic is None:
                continue
            if not quadratic.is_finite:
                raise ValueError(_overflow(name, parameter, quadratic))
            quadratics[name] = quadratic
        if self.keep_history:
            anchor = {name: p.detach().clone() for name, p in parameters.items()}
            self.history.append(Remembered({n: f.clone() for n, f in kept.items()}, anchor))
        self._quadratics = quadratics
        self.n_experiences += 1
        self._fingerprint, self._pairs = None, Pairs([])

    def _folded(
        self, past: Quadratic | None, parameter: Tensor, fisher: Tensor | None
    ) -> Quadratic | None:
        """Combine `past` with the new F, with the anchor at the current parameter."""
        has_new = fisher is not None and bool(fisher.any())
        if past is None and not has_new:
            return None
        theta = as_real(parameter.detach())
        theta = self.storage.put(theta, parameter, exact=True).clone()
        if past is not None:
            decay = self.decay_factor
            past = past.moved_to(theta) if decay is None else past.restarted(theta, decay)
        if not has_new:
            return past
        assert fisher is not None
        if parameter.is_complex():
            fisher = torch.stack([fisher, fisher], -1)  # |z|^2 = x^2 + y^2
        return Quadratic(fisher, None, theta) if past is None else past.plus(fisher)

    def __call__(self, model: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Compute the penalty; it is twice differentiable in the parameters.

        A parameter that is still where every experience left it gets no gradient from
        `backward()`, rather than one of zeros: Adam would move it by its old momentum.

        Args:
            model: The one that was consolidated, or the same under a wrapper; heads may have grown.
                Under `torch.func.grad`: the parameters by name, as they are differentiated.

        Returns:
            A scalar. Unit: nats.

        Raises:
            ValueError: A parameter that is remembered is gone or has shrunk; or the derivative that
                `torch.func` takes would miss the penalty.
        """
        pairs = self.pairs(model)
        if not pairs:
            return _zero(model)
        if torch.compiler.is_compiling() or _is_transformed(pairs):
            return traceable_value(pairs) + self._constant
        if not torch.is_grad_enabled():
            return value(pairs) + self._constant
        result: Tensor = PenaltyFunction.apply(pairs, *(theta for theta, _ in pairs))
        return result + self._constant

    @torch.no_grad()
    def add_gradient_(self, model: nn.Module, scale: float) -> Tensor:
        """Add scale * d penalty / d theta to `.grad`; faster than autograd.

        Args:
            model: As in a call.
            scale: The lambda.

        Returns:
            The penalty, a scalar without gradient. Unit: nats.

        Raises:
            ValueError: `scale` is negative, not finite or above 1e38; or a parameter that is
                remembered is gone or has shrunk.
        """
        scale = checked_non_negative("scale", scale)
        pairs = self.pairs(model)
        if not pairs:
            return _zero(model)
        return add_gradients_(pairs, scale) + self._constant

    def pairs(self, model: nn.Module | Mapping[str, Tensor]) -> Pairs:
        """Return each parameter that has a penalty, with its `Quadratic`.

        Args:
            model: As in a call.

        Returns:
            Pairs of a parameter and its `Quadratic`.

        Raises:
            ValueError: A parameter that is remembered is gone or has shrunk.
        """
        if not isinstance(model, nn.Module | Mapping):
            raise ValueError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if not self._quadratics:
            return Pairs([])
        if not isinstance(model, nn.Module) or torch.compiler.is_compiling():
            return self._pairs_of(model)
        if self._fingerprint is None or not self._fingerprint.matches(model):
            self._pairs = self._pairs_of(model)
            self._fingerprint = ModelFingerprint(model)
        return self._pairs

    def _pairs_of(self, model: nn.Module | Mapping[str, Tensor]) -> Pairs:
        named = canonical_parameters(model) if isinstance(model, nn.Module) else model
        return Pairs((named[name], q) for name, q in self._matched(named).items())

    def _matched(self, parameters: Mapping[str, Tensor]) -> dict[str, Quadratic]:
        """The quadratics in the shapes, types and devices of `parameters`."""
        if missing := self._quadratics.keys() - parameters.keys():
            raise ValueError(
                f"`model` has no parameter {sorted(missing)}, which the penalty remembers; it has "
                f"{sorted(parameters)}. Use the model that was consolidated, or a new penalty."
            )
        for name in self._quadratics:
            check_has_values(f"The model's `{name}`", parameters[name])
        return {
            name: q.matched(name, parameters[name], self.storage)
            for name, q in self._quadratics.items()
        }

    @property
    def _constant(self) -> float:
        return sum(q.constant for q in self._quadratics.values())

    @property
    def nbytes(self) -> int:
        """Memory of the stored tensors in bytes, including the history."""
        tensors = [t for q in self._quadratics.values() for t in q.tensors]
        for past in self.history:
            tensors += [*past.fisher.values(), *past.anchor.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which `torch.load(weights_only=True)` accepts."""
        return {
            "mode": self.mode.value,
            "decay_factor": self.decay_factor,
            "normalize": self.normalize and self.normalize.value,
            "n_experiences": self.n_experiences,
            "quadratics": {name: dict(vars(q)) for name, q in self._quadratics.items()},
            "history": [{"fisher": past.fisher, "anchor": past.anchor} for past in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace this penalty's state by a copy of another's, whose settings are the same.

        If an error is raised, the penalty is as it was.

        Args:
            state: Of `state_dict()`.

        Raises:
            ValueError: It comes from another mode, decay factor or normalisation; or it is
                incomplete, not finite or has a negative F.
        """
        quadratics, history = loaded_state(state, self.state_dict(), self.storage)
        self.n_experiences = state["n_experiences"]
        self._quadratics, self.history = quadratics, history
        self._fingerprint, self._pairs = None, Pairs([])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fingerprint": None, "_pairs": Pairs([])}  # without the model


def _zero(model: nn.Module | Mapping[str, Tensor]) -> Tensor:
    tensors = model.parameters() if isinstance(model, nn.Module) else iter(model.values())
    first = next(tensors, None)
    return torch.zeros((), device=None if first is None else first.device)


def _is_transformed(pairs: Pairs) -> bool:
    """Whether `torch.func` differentiates or maps over one of the parameters."""
    functorch = torch._C._functorch
    if any(functorch.is_functorch_wrapped_tensor(theta) for theta, _ in pairs):
        return True
    if functorch.maybe_current_level() is not None:
        kind = functorch.peek_interpreter_stack().key()
        if kind in (functorch.TransformType.Grad, functorch.TransformType.Jvp):
            raise ValueError(
                "Inside torch.func.grad the model's own parameters are constants, so the penalty "
                "would have no gradient: call `penalty(parameters)` with the dictionary that is "
                "differentiated, or `penalty(model)` inside `functional_call`."
            )
    return False


def _overflow(name: str, parameter: Tensor, quadratic: Quadratic) -> str:
    if not bool(torch.isfinite(parameter).all()):
        return f"The model's `{name}` is not finite: did the training diverge?"
    return (
        f"The sum of all F of `{name}` overflows {quadratic.fisher.dtype}, the type in which it is "
        "kept: use normalize='mean', or divide F by a constant and multiply `ewc_lambda` by it."
    )

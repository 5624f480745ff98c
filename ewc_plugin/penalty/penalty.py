"""The penalty of every past experience, at the cost of one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ewc_plugin.penalty.gradient import GradientAdder, Pair, PenaltyFunction
from ewc_plugin.penalty.options import Mode, Normalization, checked_decay, normalizer, parsed
from ewc_plugin.penalty.parameters import Structure, canonical_names, canonical_parameters
from ewc_plugin.penalty.quadratic import Quadratic, Storage


@dataclass(frozen=True)
class Remembered:
    """One experience, with `keep_history`.

    Attributes:
        fisher: F as it was folded in (normalised, if so asked), by canonical parameter name.
        anchor: theta*, likewise.
    """

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]


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
        storage_dtype: Of the folded F and its offset, for example torch.bfloat16 (then off by up
            to 0.4 % per experience). The anchor keeps the parameters' precision.
        storage_device: Where the state is kept, for example "cpu"; it is copied in every step.

    Raises:
        ValueError: An argument is not one of these.

    Attributes:
        n_experiences: How many were folded in.
        history: One `Remembered` each, with `keep_history`.

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
        self.keep_history = keep_history
        self.storage = Storage(storage_dtype, storage_device)
        self.n_experiences = 0
        self.history: list[Remembered] = []
        self._quadratics: dict[str, Quadratic] = {}
        self._add_gradient = GradientAdder()
        self._seen: Structure | None = None
        self._pairs: list[Pair] = []

    def consolidate(self, model: nn.Module, fisher: Mapping[str, Tensor]) -> None:
        """Remembers the model's parameters as theta*, with `fisher` as their weights.

        Args:
            model: As it is at the end of an experience.
            fisher: By parameter name, as `diagonal_fisher` gives it. A parameter that is left out
                (a frozen one) is given no new weight.

        Raises:
            ValueError: An entry's name or shape is not the model's, or it is negative or not
                finite; or a parameter that is remembered is gone or has shrunk.
        """
        parameters = canonical_parameters(model)
        new = _checked_fisher(model, fisher)
        self.pairs(model)
        if not any(bool(f.any()) for f in new.values()):
            warnings.warn(
                "The Fisher is zero everywhere: nothing of this experience is protected. A model "
                "that is certain of every label has no PREDICTED Fisher; try fisher_type='exact'.",
                stacklevel=2,
            )
        if self.normalize is not None:
            divisor = normalizer(self.normalize, new.values())
            new = {name: f / divisor for name, f in new.items()}
        for name, parameter in parameters.items():
            self._fold(name, parameter, new.get(name))
        if self.keep_history:
            anchor = {name: p.detach().clone() for name, p in parameters.items()}
            self.history.append(Remembered(new, anchor))
        self.n_experiences += 1
        self._seen = None

    def _fold(self, name: str, parameter: nn.Parameter, fisher: Tensor | None) -> None:
        theta = self.storage.put(parameter.detach().clone(), parameter, exact=True)
        quadratic = self._quadratics.get(name)
        if quadratic is not None:
            if self.decay_factor is None:
                quadratic.move_anchor(theta)
            else:
                quadratic.restart(theta, self.decay_factor)
        if fisher is None or not bool(fisher.any()):
            return
        fisher = self.storage.put(fisher.detach(), parameter)
        if quadratic is None:
            self._quadratics[name] = Quadratic(fisher, None, theta)
        else:
            quadratic.add(fisher)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty now, a scalar whose gradient is analytic: 2 (S d + B).

        A parameter that still is where every experience left it gets no gradient, rather than one
        of zeros: Adam would move it by its old momentum.

        Args:
            model: The one that was consolidated, or the same under a wrapper; heads may have grown.

        Returns:
            A scalar. Unit: nats.

        Raises:
            ValueError: A parameter that is remembered is gone or has shrunk.
        """
        moved = [(p, q) for p, q in self.pairs(model) if not q.is_at_rest(p)]
        if not moved:
            return next(model.parameters()).new_zeros(()) + self._constant
        value: Tensor = PenaltyFunction.apply([q for _, q in moved], *(p for p, _ in moved))
        return value + self._constant

    @torch.no_grad()
    def add_gradient_(self, model: nn.Module, scale: float) -> Tensor:
        """Adds scale * d penalty / d theta to `.grad`, for less than autograd takes.

        Args:
            model: As in a call.
            scale: The lambda.

        Returns:
            The penalty, a scalar without gradient. Unit: nats.

        Raises:
            ValueError: A parameter that is remembered is gone or has shrunk.
        """
        pairs = self.pairs(model)
        if not pairs:
            return next(model.parameters()).new_zeros(())
        return self._add_gradient(pairs, scale) + self._constant

    def pairs(self, model: nn.Module) -> list[Pair]:
        """Every parameter that is remembered, beside what is remembered of it, in its shape.

        Args:
            model: As in a call.

        Returns:
            Pairs of a parameter and its `Quadratic`.

        Raises:
            ValueError: A parameter that is remembered is gone or has shrunk.
        """
        if not self._quadratics:
            return []
        if self._seen is not None and self._seen.is_of(model):
            return self._pairs
        parameters = canonical_parameters(model)
        if missing := self._quadratics.keys() - parameters.keys():
            raise ValueError(
                f"`model` has no parameter {sorted(missing)}, which the penalty remembers; it has "
                f"{sorted(parameters)}. Use the model that was consolidated, or a new penalty."
            )
        for name, quadratic in self._quadratics.items():
            quadratic.fit(name, parameters[name], self.storage)
        self._seen = Structure(model)
        self._pairs = [(parameters[name], q) for name, q in self._quadratics.items()]
        return self._pairs

    @property
    def _constant(self) -> float:
        return sum(q.constant for q in self._quadratics.values())

    @property
    def nbytes(self) -> int:
        """Memory of what is remembered, the history included, in bytes."""
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
        """Takes over what another penalty of the same settings remembered.

        Args:
            state: Of `state_dict()`.

        Raises:
            ValueError: It comes from another mode, decay factor or normalisation.
        """
        mine = self.state_dict()
        for setting in ("mode", "decay_factor", "normalize"):
            if state[setting] != mine[setting]:
                raise ValueError(
                    f"`{setting}` of the state is {state[setting]!r}, of this penalty "
                    f"{mine[setting]!r}; make it with {setting}={state[setting]!r}."
                )
        self.n_experiences = state["n_experiences"]
        self._quadratics = {name: Quadratic(**q) for name, q in state["quadratics"].items()}
        self.history = [Remembered(**past) for past in state["history"]]
        self._seen = None

    def __getstate__(self) -> dict[str, Any]:
        # Without scratch memory, and without the model.
        return {**vars(self), "_add_gradient": GradientAdder(), "_seen": None, "_pairs": []}


def _checked_fisher(model: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    canonical = canonical_names(model)
    parameters = canonical_parameters(model)
    checked = {canonical.get(name, name): tensor.detach() for name, tensor in fisher.items()}
    for name, tensor in checked.items():
        if name not in parameters:
            raise ValueError(f"`fisher` has {name!r}; the model has {sorted(parameters)}.")
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"`fisher[{name!r}]` is {tuple(tensor.shape)}, the parameter "
                f"{tuple(parameters[name].shape)}: compute it on this model."
            )
        if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise ValueError(
                f"`fisher[{name!r}]` must be finite and >= 0, got {float(tensor.min())} to "
                f"{float(tensor.max())}: did the training diverge?"
            )
    return checked

"""The penalty of every past experience, at the cost of one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ewc_plugin.names import canonical_names, canonical_parameters
from ewc_plugin.quadratic import Quadratic


class Mode(str, Enum):
    """How the penalties of several experiences combine."""

    SEPARATE = "separate"
    ONLINE = "online"


class QuadraticPenalty:
    """sum_t F_t (theta - theta*_t)^2 in O(P) memory and time for any number of experiences t.

    `separate` keeps each experience's theta*_t. `online` keeps one quadratic at the last theta*:
    F <- decay_factor F + F_new. With decay_factor = 1 that is the Laplace approximation carried
    forward as a Bayesian would (Huszar's correction): prefer it when there are many experiences,
    where `separate` pulls towards every past theta* and so counts the early data again and again.
    Schwarz et al.'s online EWC also weighs the remembered quadratic by decay_factor while the next
    experience trains; here that is decay_factor times the lambda.

    There is no 1/2 and no lambda in it: the loss is `task_loss + ewc_lambda * penalty(model)`, so
    that ewc_lambda is Avalanche's, and half of the lambda of Kirkpatrick et al.

    Args:
        mode: "separate" or "online".
        decay_factor: Weight of the past in `online`, which needs one; `separate` takes none.

    Raises:
        ValueError: An argument is not one of these.

    Source: Kirkpatrick et al. 2017 (the penalty); Schwarz et al. 2018 (online).

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 1)
        >>> penalty = QuadraticPenalty()
        >>> penalty.consolidate(model, {"weight": torch.tensor([[3.0]])})
        >>> _ = nn.init.constant_(model.weight, 3)
        >>> penalty(model)
        tensor(12., grad_fn=<_PenaltyBackward>)
    """

    def __init__(self, mode: Mode | str = Mode.SEPARATE, decay_factor: float | None = None) -> None:
        self.mode = _checked_mode(mode)
        self.decay_factor = _checked_decay(self.mode, decay_factor)
        self.n_experiences = 0
        self._quadratics: dict[str, Quadratic] = {}

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
        self._bind(model)
        if not any(bool(f.any()) for f in new.values()):
            warnings.warn(
                "The Fisher is zero everywhere: nothing of this experience is protected. A model "
                "that is certain of every label has no PREDICTED Fisher; try fisher_type='exact'.",
                stacklevel=2,
            )
        for name, parameter in parameters.items():
            self._fold(name, parameter, new.get(name))
        self.n_experiences += 1

    def _fold(self, name: str, parameter: nn.Parameter, fisher: Tensor | None) -> None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        theta = parameter.detach().to(dtype, copy=True)
        quadratic = self._quadratics.get(name)
        if quadratic is not None:
            if self.decay_factor is None:
                quadratic.move_anchor(theta)
            else:
                quadratic.restart(theta, self.decay_factor)
            quadratic.at_rest = quadratic.offset is None
        if fisher is None or not bool(fisher.any()):
            return
        fisher = fisher.detach().to(theta)
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
        moved = [(p, q) for p, q in self._bind(model) if not _is_at_rest(p, q)]
        constant = sum(q.constant for q in self._quadratics.values())
        if not moved:
            return next(model.parameters()).new_zeros(()) + constant
        value: Tensor = _Penalty.apply([q for _, q in moved], *(p for p, _ in moved))
        return value + constant if constant else value

    @torch.no_grad()
    def add_gradient_(self, model: nn.Module, scale: float) -> None:
        """Adds scale * d penalty / d theta to `.grad`, for loops that need no penalty value.

        Args:
            model: As in a call.
            scale: The lambda.
        """
        moved = [(p, q) for p, q in self._bind(model) if p.requires_grad and not _is_at_rest(p, q)]
        for p, q in moved:
            half = _half_gradients([p], [q])[1][0].mul_(2 * scale).to(p.dtype)
            p.grad = half if p.grad is None else p.grad.add_(half)

    @property
    def nbytes(self) -> int:
        """Memory of what is remembered, in bytes."""
        tensors = [t for q in self._quadratics.values() for t in q.tensors]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which `torch.load(weights_only=True)` accepts."""
        quadratics = {
            name: {
                "fisher": q.fisher,
                "offset": q.offset,
                "anchor": q.anchor,
                "constant": q.constant,
            }
            for name, q in self._quadratics.items()
        }
        return {
            "mode": self.mode.value,
            "decay_factor": self.decay_factor,
            "n_experiences": self.n_experiences,
            "quadratics": quadratics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what another penalty of the same mode remembered.

        Args:
            state: Of `state_dict()`.

        Raises:
            ValueError: It comes from another mode or decay factor.
        """
        for setting, mine in (("mode", self.mode.value), ("decay_factor", self.decay_factor)):
            if state[setting] != mine:
                raise ValueError(
                    f"`{setting}` of the state is {state[setting]!r}, of this penalty {mine!r}; "
                    f"make it with {setting}={state[setting]!r}."
                )
        self.n_experiences = state["n_experiences"]
        self._quadratics = {
            name: Quadratic(**tensors, at_rest=tensors["offset"] is None)
            for name, tensors in state["quadratics"].items()
        }

    def _bind(self, model: nn.Module) -> list[tuple[nn.Parameter, Quadratic]]:
        """What is remembered beside the parameter it is about, on its device and in its shape."""
        if not self._quadratics:
            return []
        parameters = canonical_parameters(model)
        if missing := self._quadratics.keys() - parameters.keys():
            raise ValueError(
                f"`model` has no parameter {sorted(missing)}, which the penalty remembers; it has "
                f"{sorted(parameters)}. Use the model that was consolidated, or a new penalty."
            )
        pairs = [(parameters[name], q) for name, q in self._quadratics.items()]
        for name, (parameter, quadratic) in zip(self._quadratics, pairs, strict=True):
            _fit(name, quadratic, parameter)
        return pairs


class _Penalty(torch.autograd.Function):
    """Computes value and gradient in one go; autograd's own graph would take four times as long."""

    @staticmethod
    def forward(ctx: Any, quadratics: list[Quadratic], *thetas: Tensor) -> Tensor:
        value, ctx.half_gradients = _half_gradients(list(thetas), quadratics)
        ctx.dtypes = [t.dtype for t in thetas]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scale = 2 * grad_output
        gradients = (g * scale for g in ctx.half_gradients)
        return (None, *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)))


def _half_gradients(
    thetas: list[Tensor], quadratics: list[Quadratic]
) -> tuple[Tensor, list[Tensor]]:
    """The value sum d (S d + 2 B), without the constants, and S d + B for each parameter."""
    value = torch.zeros((), device=thetas[0].device)
    gradients = []
    for theta, q in zip(thetas, quadratics, strict=True):
        d = theta - q.anchor
        half = q.fisher * d
        if q.offset is not None:
            half += q.offset
            value = value + torch.dot(d.flatten(), q.offset.flatten())
        value = value + torch.dot(d.flatten(), half.flatten())
        gradients.append(half)
    return value, gradients


def _is_at_rest(parameter: nn.Parameter, q: Quadratic) -> bool:
    # Looked at only until it has moved: in a network that trains, old heads alone stay.
    if q.at_rest:
        q.at_rest = torch.equal(parameter.to(q.anchor.dtype), q.anchor)
    return q.at_rest


def _fit(name: str, q: Quadratic, parameter: nn.Parameter) -> None:
    """Brings what is remembered to the parameter's device, precision and shape."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if q.anchor.device != parameter.device or q.anchor.dtype != dtype:
        q.fisher, q.anchor = (t.to(parameter.device, dtype) for t in (q.fisher, q.anchor))
        q.offset = None if q.offset is None else q.offset.to(parameter.device, dtype)
    if q.anchor.shape == parameter.shape:
        return
    before, now = q.anchor.shape, parameter.shape
    if len(before) != len(now) or any(b > n for b, n in zip(before, now, strict=True)):
        raise ValueError(
            f"`{name}` is {tuple(now)} in the model and {tuple(before)} in the penalty: it can "
            "grow along its axes, not shrink. Use a new penalty for a new architecture."
        )
    q.grow(now)


def _checked_fisher(model: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    canonical = canonical_names(model)
    parameters = canonical_parameters(model)
    checked = {canonical.get(name, name): tensor for name, tensor in fisher.items()}
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


def _checked_mode(mode: Mode | str) -> Mode:
    try:
        return Mode(mode)
    except ValueError:
        allowed = [m.value for m in Mode]
        raise ValueError(f"`mode` must be one of {allowed}, got {mode!r}.") from None


def _checked_decay(mode: Mode, decay_factor: float | None) -> float | None:
    if mode is Mode.SEPARATE:
        if decay_factor is not None:
            raise ValueError(
                f"`decay_factor` must be None unless mode='online', got {decay_factor}; separate "
                "penalties do not decay."
            )
        return None
    if decay_factor is None:
        raise ValueError("`decay_factor` must be set with mode='online'; 1.0 forgets nothing.")
    if not (math.isfinite(decay_factor) and decay_factor >= 0):
        raise ValueError(f"`decay_factor` must be finite and >= 0, got {decay_factor}.")
    return float(decay_factor)

"""Base classes of layer rules, and the position of the sample axis."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Sums = dict[str, Tensor]  # parameter name -> squares summed over samples


@dataclass
class LayerCall:
    """One call of a layer function.

    Attributes:
        a: The layer's input.
        params: Role ("weight", "bias") -> the tensor passed.
        options: Whatever else the rule needs to know of the call.
        names: Role -> name of a trainable parameter, or of a tensor computed from parameters
            alone (`Source`); set at capture.
        sample_dim: Axis of the output that the samples are on; set when its gradient arrives.
    """

    a: Tensor
    params: dict[str, Tensor | None]
    options: Any = None
    names: dict[str, str] = field(default_factory=dict)
    sample_dim: int = 0

    def sum_dtype(self) -> torch.dtype:
        """Dtype of the sums of its parameters."""
        first = self.params[next(iter(self.names))]
        assert first is not None
        return sum_dtype(first)


@dataclass(frozen=True)
class Layout:
    """Position of the samples in a tensor: axis `dim`, `folded` entries per sample.

    A vision transformer folds windows into the batch (blocks), `nn.MultiheadAttention` folds the
    batch behind the time steps (interleaved).
    """

    dim: int = 0
    folded: int = 1
    interleaved: bool = False

    def samples_first(self, t: Tensor, N: int) -> Tensor:
        """[N, folded, ...] in the order of the remaining axes."""
        if self.dim:
            t = t.movedim(self.dim, 0)
        if self.folded == 1:
            return t.unsqueeze(1)
        rest = t.shape[1:]
        if self.interleaved:
            return t.reshape(self.folded, N, *rest).transpose(0, 1)
        return t.reshape(N, self.folded, *rest)


class LayerRule:
    """Per-sample gradients of the parameters of one torch function, and their squares.

    `per_sample` is the formula; a rule overrides `add` where it has a cheaper form of the squares.
    A rule that gains from seeing more than one score vector's gradient also inherits `TakesSquares`
    or `TakesSeveral`. K counts the entries that a sample has folded into its axis (see `Layout`),
    and all tensors come in the dtype of the sums.

    Attributes:
        name: Shown by `explain`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def bind(self, *args: Any, **kwargs: Any) -> LayerCall | None:
        """Make a `LayerCall` from the function's arguments; None if the rule does not apply."""
        raise NotImplementedError

    def prepare(self, call: LayerCall, a: Tensor) -> Tensor:
        """Prepare the input `a` [N, K, ...] for `add`; called once for all score vectors."""
        return a

    def fits(self, call: LayerCall, layout: Layout) -> bool:
        """Whether the rule holds for samples in this layout."""
        return True

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """Gradient of each sample [N, ...] by name, from a [N, K, ...] and g [N, K, ...]."""
        raise NotImplementedError

    def add(self, call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
        """Add sum_n (gradient of sample n)^2, from a [N, K, ...] and g [N, K, ...], to `into`."""
        for name, gradients in self.per_sample(call, a, g).items():
            into[name].add_(gradients.square().sum(0))


class JoinsCalls:
    """Part of a rule for which k calls on the same parameters are one call on all their rows."""

    def rows(self, call: LayerCall, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and gradients as [N, T, ...], a sample's rows along the second axis."""
        raise NotImplementedError


class TakesSquares:
    """Mixin for a rule that is linear in g^2, so that it needs only sum_s g_s^2."""

    def takes_squares(self, call: LayerCall, g: Tensor) -> bool:
        """Whether this call's squares are linear in g^2."""
        raise NotImplementedError

    def add_squares(self, call: LayerCall, a: Tensor, g2: Tensor, into: Sums) -> None:
        """Do what `add` does for all score vectors, from g2 = sum_s g_s^2."""
        raise NotImplementedError


class TakesSeveral:
    """Mixin for a rule that is faster when it gets several score vectors' gradients at once."""

    def block_size(self, call: LayerCall, g: Tensor, count: int) -> int:
        """How many of `count` vectors' gradients, each like g, to collect before adding them."""
        raise NotImplementedError

    def add_several(self, call: LayerCall, a: Tensor, gs: list[Tensor], into: Sums) -> None:
        """`add` for each of `gs`."""
        raise NotImplementedError


def channel_sums(t: Tensor) -> Tensor:
    """[N, C] from t [N, K, C, ...]: the sum over all axes but samples and channels."""
    return t.sum(1) if t.dim() == 3 else t.flatten(3).sum((1, 3))


def sum_dtype(p: Tensor) -> torch.dtype:
    """Dtype in which squares are summed: float32, or the parameter's where that is wider."""
    return torch.promote_types(p.dtype, torch.float32)


def device_kind(t: Tensor) -> Literal["cpu", "other"]:
    """Return which set of measured constants holds: a CPU has caches, others want few calls."""
    return "cpu" if t.device.type == "cpu" else "other"

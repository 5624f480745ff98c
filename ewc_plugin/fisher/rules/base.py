"""What a layer rule is made of, and where the sample axis of its tensors lies."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
        names: Role -> parameter name, for the trainable parameters alone; set at capture.
    """

    a: Tensor
    params: dict[str, Tensor | None]
    options: Any = None
    names: dict[str, str] = field(default_factory=dict)

    def sum_dtype(self) -> torch.dtype:
        """Dtype of the sums of its parameters."""
        first = self.params[next(iter(self.names))]
        assert first is not None
        return sum_dtype(first)


@dataclass(frozen=True)
class Layout:
    """Where the samples are: along `dim`, `folded` entries each, in blocks or interleaved.

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


@dataclass(frozen=True)
class LayerRule:
    """How one torch function is served.

    Attributes:
        name: For `explain`.
        function: The torch function; None for a rule of a whole layer.
        bind: Takes the function's own arguments and returns the call; None where no
            rule holds.
        add: (call, a [N, K, ...], g [N, K, ...], into) adds the squares, summed over n, to
            `into`; K counts the entries that a sample has folded into its axis. Both tensors come
            in the dtype of the sums.
        pool: (call, a, g2, into) the same from g2 = sum_s g_s^2, for calls where the square of a
            gradient is linear in g^2; None where there are none.
        poolable: Whether `pool` holds for a call with this g.
        prepare: (call, a) -> what `add` takes for a, computed once for all vectors; None for a.
        add_several: `add` for a list of gradients, the squares of each summed; None where there is
            nothing to gain.
        at_once: (call, g, count) -> how many of `count` vectors' gradients it takes at once.
    """

    name: str
    function: Callable[..., Any] | None
    bind: Callable[..., LayerCall | None] | None
    add: Callable[[LayerCall, Tensor, Tensor, Sums], None]
    pool: Callable[[LayerCall, Tensor, Tensor, Sums], None] | None = None
    poolable: Callable[[LayerCall, Tensor], bool] = lambda call, g: False
    prepare: Callable[[LayerCall, Tensor], Tensor] | None = None
    add_several: Callable[[LayerCall, Tensor, list[Tensor], Sums], None] | None = None
    at_once: Callable[[LayerCall, Tensor, int], int] = lambda call, g, count: 1


def channel_sums(t: Tensor) -> Tensor:
    """[N, C] from t [N, K, C, ...]: the sum over all axes but samples and channels."""
    return t.sum(1) if t.dim() == 3 else t.flatten(3).sum((1, 3))


def sum_dtype(p: Tensor) -> torch.dtype:
    """Dtype in which squares are summed: float32, or the parameter's where that is wider."""
    return torch.promote_types(p.dtype, torch.float32)

"""The table of built-in layer rules, and `register_rule` for custom layers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_plugin.fisher.rules.base import LayerCall, LayerRule, Sums
from ewc_plugin.fisher.rules.conv import Convolution, TransposedConvolution
from ewc_plugin.fisher.rules.linear import Addmm, Linear, Matmul
from ewc_plugin.fisher.rules.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from ewc_plugin.fisher.rules.pointwise import Embedding, PReLU

RULES: dict[Any, LayerRule] = {  # torch function -> its rule
    F.linear: Linear("linear"),
    F.conv1d: Convolution("conv1d"),
    F.conv2d: Convolution("conv2d"),
    F.conv3d: Convolution("conv3d"),
    F.conv_transpose1d: TransposedConvolution("conv_transpose1d"),
    F.conv_transpose2d: TransposedConvolution("conv_transpose2d"),
    F.conv_transpose3d: TransposedConvolution("conv_transpose3d"),
    F.batch_norm: BatchNorm("batch_norm"),
    F.layer_norm: LayerNorm("layer_norm"),
    F.rms_norm: RMSNorm("rms_norm"),
    F.group_norm: GroupNorm("group_norm"),
    F.instance_norm: InstanceNorm("instance_norm"),
    F.embedding: Embedding("embedding"),
    F.prelu: PReLU("prelu"),
    torch.addmm: Addmm("addmm"),
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__),
        Matmul("matmul"),
    ),
}

Squares = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
LAYER_RULES: dict[type[nn.Module], Squares] = {}  # rules registered for custom layer types


def register_rule(layer_type: type[nn.Module]) -> Callable[[Squares], Squares]:
    """Register a custom rule for every layer of exactly this type.

    The rule maps (layer, a [N, ...], g [N, ...]), the layer's first input and the gradient at its
    output, to {parameter name in the layer: sum_n (gradient of sample n)^2}. It is tried on three
    samples against the sample loop before each pass, and left aside where it disagrees.

    Args:
        layer_type: A module class that takes one tensor and returns one, samples first.

    Returns:
        A decorator for the rule.

    Example:
        >>> import torch
        >>> from ewc_plugin.fisher.diagonal import explain
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.s = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.s
        >>> @register_rule(Scale)
        ... def scale_rule(layer, a, g):
        ...     return {"s": (a * g).square().sum(0)}
        >>> explain(nn.Sequential(Scale(), nn.Linear(3, 2)), (torch.ones(2, 3),))["0.s"].detail
        'Scale'
        >>> _ = LAYER_RULES.pop(Scale)
    """

    def register(squares: Squares) -> Squares:
        LAYER_RULES[layer_type] = squares
        return squares

    return register


class RegisteredRule(LayerRule):
    """Adapts a registered function to the `LayerRule` interface, for one layer."""

    def __init__(self, layer: nn.Module, squares: Squares) -> None:
        super().__init__(type(layer).__name__)
        self.layer, self.squares = layer, squares

    def add(self, call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
        """The squares that the registered function returns."""
        if a.size(1) > 1:  # [N, K, ...]: the layer runs on K rows per sample
            raise RuntimeError("A registered rule expects one row per sample.")
        result = self.squares(self.layer, a[:, 0], g[:, 0])
        for role, name in call.names.items():
            if role not in result or result[role].shape != into[name].shape:
                raise ValueError(
                    f"The rule registered for {self.name} must return squares of shape "
                    f"{tuple(into[name].shape)} for `{role}`, got {result.get(role)}."
                )
            into[name].add_(result[role])

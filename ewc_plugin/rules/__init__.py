"""Layer rules: squared per-sample gradients from a layer's input and its output gradient."""

from ewc_plugin.rules.base import LayerCall, LayerRule
from ewc_plugin.rules.conv import CONVOLUTIONS
from ewc_plugin.rules.linear import LINEAR
from ewc_plugin.rules.norm import NORMS
from ewc_plugin.rules.pointwise import POINTWISE

RULES = {rule.function: rule for rule in (LINEAR, *CONVOLUTIONS, *NORMS, *POINTWISE)}

__all__ = ["RULES", "LayerCall", "LayerRule"]

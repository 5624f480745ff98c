"""Layer rules: squared per-sample gradients from a layer's input and its output gradient."""

from ewc_plugin.rules.base import LayerCall, LayerRule
from ewc_plugin.rules.linear import LINEAR

RULES = {rule.function: rule for rule in (LINEAR,)}

__all__ = ["RULES", "LayerCall", "LayerRule"]

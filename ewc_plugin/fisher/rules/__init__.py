"""Layer rules: squared per-sample gradients from a layer's input and its output gradient."""

from ewc_plugin.fisher.rules.registry import register_rule

__all__ = ["register_rule"]

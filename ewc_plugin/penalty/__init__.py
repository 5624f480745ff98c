"""The quadratic penalty of EWC: its value, its gradient, and the implicit step."""

from ewc_plugin.penalty.penalty import QuadraticPenalty
from ewc_plugin.penalty.stability import DivergedError

__all__ = ["DivergedError", "QuadraticPenalty"]

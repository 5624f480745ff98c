"""Diagonal Elastic Weight Consolidation with an exact per-sample Fisher.

Names are loaded on first use, so that the maths (`ewc_plugin.fisher`, `ewc_plugin.penalty`) can be
had without importing Avalanche.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ewc_plugin.fisher import diagonal_fisher, explain
    from ewc_plugin.likelihoods import bernoulli_score, gaussian_score
    from ewc_plugin.metrics import ewc_metrics
    from ewc_plugin.penalty import QuadraticPenalty
    from ewc_plugin.plugin import DiagonalEWCPlugin
    from ewc_plugin.rules import register_rule
    from ewc_plugin.scores import FisherType
    from ewc_plugin.stability import DivergedError
    from ewc_plugin.strategy import DiagonalEWC
    from ewc_plugin.tidy_csv import TidyCSVLogger
    from ewc_plugin.window import FisherData, experience_batches

__version__ = "0.1.0"
__all__ = [
    "DiagonalEWC",
    "DiagonalEWCPlugin",
    "DivergedError",
    "FisherData",
    "FisherType",
    "QuadraticPenalty",
    "TidyCSVLogger",
    "bernoulli_score",
    "diagonal_fisher",
    "ewc_metrics",
    "experience_batches",
    "explain",
    "gaussian_score",
    "register_rule",
]

_HOME = {
    "DiagonalEWC": "strategy",
    "DiagonalEWCPlugin": "plugin",
    "DivergedError": "stability",
    "FisherData": "window",
    "FisherType": "scores",
    "QuadraticPenalty": "penalty",
    "TidyCSVLogger": "tidy_csv",
    "bernoulli_score": "likelihoods",
    "diagonal_fisher": "fisher",
    "ewc_metrics": "metrics",
    "experience_batches": "window",
    "explain": "fisher",
    "gaussian_score": "likelihoods",
    "register_rule": "rules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

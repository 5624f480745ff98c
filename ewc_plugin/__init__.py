"""Diagonal Elastic Weight Consolidation with an exact per-sample Fisher.

Names are loaded on first use, so that the maths (`ewc_plugin.fisher`, `ewc_plugin.penalty`) can be
had without importing Avalanche.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ewc_plugin.avalanche import (
        DiagonalEWC,
        DiagonalEWCPlugin,
        FisherData,
        TidyCSVLogger,
        ewc_metrics,
        experience_batches,
    )
    from ewc_plugin.fisher import (
        FisherType,
        bernoulli_score,
        diagonal_fisher,
        explain,
        gaussian_score,
        register_rule,
    )
    from ewc_plugin.fisher_file import load_fisher, save_fisher
    from ewc_plugin.penalty import DivergedError, QuadraticPenalty

__version__ = "0.2.0"
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
    "load_fisher",
    "register_rule",
    "save_fisher",
]

_HOME = {
    "DiagonalEWC": "avalanche",
    "DiagonalEWCPlugin": "avalanche",
    "DivergedError": "penalty",
    "FisherData": "avalanche",
    "FisherType": "fisher",
    "QuadraticPenalty": "penalty",
    "TidyCSVLogger": "avalanche",
    "bernoulli_score": "fisher",
    "diagonal_fisher": "fisher",
    "ewc_metrics": "avalanche",
    "experience_batches": "avalanche",
    "explain": "fisher",
    "gaussian_score": "fisher",
    "load_fisher": "fisher_file",
    "register_rule": "fisher",
    "save_fisher": "fisher_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

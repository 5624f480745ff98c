"""Diagonal Elastic Weight Consolidation with an exact per-sample Fisher.

Names are imported on first use, so that the maths (`ewc_plugin.fisher`, `ewc_plugin.penalty`) can
be used without importing Avalanche.
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
        adam_fisher,
        bernoulli_score,
        causal_lm,
        diagonal_fisher,
        explain,
        gaussian_score,
        log_likelihood_score,
        loss_score,
        masked_lm,
        register_rule,
        weighted_label_score,
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
    "adam_fisher",
    "bernoulli_score",
    "causal_lm",
    "diagonal_fisher",
    "ewc_metrics",
    "experience_batches",
    "explain",
    "gaussian_score",
    "load_fisher",
    "log_likelihood_score",
    "loss_score",
    "masked_lm",
    "register_rule",
    "save_fisher",
    "weighted_label_score",
]

_HOME = {
    **dict.fromkeys(__all__, "fisher"),
    **dict.fromkeys(("DiagonalEWC", "DiagonalEWCPlugin", "FisherData"), "avalanche"),
    **dict.fromkeys(("TidyCSVLogger", "ewc_metrics", "experience_batches"), "avalanche"),
    **dict.fromkeys(("DivergedError", "QuadraticPenalty"), "penalty"),
    **dict.fromkeys(("load_fisher", "save_fisher"), "fisher_file"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The diagonal Fisher information of a model, exact per sample."""

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from ewc_plugin.fisher.options import check_options
from ewc_plugin.fisher.rules import register_rule
from ewc_plugin.fisher.scores import FisherType, bernoulli_score, gaussian_score

__all__ = [
    "FisherType",
    "bernoulli_score",
    "check_options",
    "diagonal_fisher",
    "explain",
    "gaussian_score",
    "register_rule",
]

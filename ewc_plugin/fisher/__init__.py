"""The diagonal Fisher information of a model, exact per sample."""

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from ewc_plugin.fisher.likelihoods import bernoulli_score, gaussian_score
from ewc_plugin.fisher.rules import register_rule
from ewc_plugin.fisher.scores import FisherType

__all__ = [
    "FisherType",
    "bernoulli_score",
    "diagonal_fisher",
    "explain",
    "gaussian_score",
    "register_rule",
]

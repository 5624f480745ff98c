"""The diagonal Fisher information of a model, exact per sample."""

from ewc_plugin.fisher.adam import adam_fisher
from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from ewc_plugin.fisher.hugging_face import causal_lm, masked_lm
from ewc_plugin.fisher.likelihoods import (
    bernoulli_score,
    gaussian_score,
    log_likelihood_score,
    weighted_label_score,
)
from ewc_plugin.fisher.losses import loss_score
from ewc_plugin.fisher.options import check_options
from ewc_plugin.fisher.rules import register_rule
from ewc_plugin.fisher.scores import FisherType, Scores

__all__ = [
    "FisherType",
    "Scores",
    "adam_fisher",
    "bernoulli_score",
    "causal_lm",
    "check_options",
    "diagonal_fisher",
    "explain",
    "gaussian_score",
    "log_likelihood_score",
    "loss_score",
    "masked_lm",
    "register_rule",
    "weighted_label_score",
]

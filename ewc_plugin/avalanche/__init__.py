"""The adapter to Avalanche: strategy, plugin, metrics, logger. No other folder imports it."""

from ewc_plugin.avalanche.csv_logger import TidyCSVLogger
from ewc_plugin.avalanche.fisher_data import FisherData, experience_batches
from ewc_plugin.avalanche.metrics import ewc_metrics
from ewc_plugin.avalanche.plugin import DiagonalEWCPlugin
from ewc_plugin.avalanche.strategy import DiagonalEWC

__all__ = [
    "DiagonalEWC",
    "DiagonalEWCPlugin",
    "FisherData",
    "TidyCSVLogger",
    "ewc_metrics",
    "experience_batches",
]

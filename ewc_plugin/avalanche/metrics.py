"""Metrics of the EWC plugin for Avalanche's `EvaluationPlugin` and its loggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from torch import Tensor

from ewc_plugin.avalanche.plugin import DiagonalEWCPlugin


class _Named(PluginMetric[float]):
    """A metric with a name, of one of the plugin's attributes."""

    def __init__(self, name: str, read: Callable[[DiagonalEWCPlugin], Any]) -> None:
        super().__init__()
        self._name, self._read = name, read
        self.reset()

    def __str__(self) -> str:
        return self._name


class _EpochMean(_Named):
    """Mean of one of the plugin's attributes over the training samples of an epoch."""

    def reset(self) -> None:
        self._total, self._n = 0.0, 0

    def result(self) -> float:
        return self._total / max(self._n, 1)

    def before_training_epoch(self, strategy: Any) -> None:
        self.reset()

    def after_training_iteration(self, strategy: Any) -> None:
        plugin = ewc_plugin_of(strategy)
        if plugin is not None:
            value, n = self._read(plugin), len(strategy.mb_y)
            self._total += n * (0.0 if value is None else float(value))
            self._n += n

    def after_training_epoch(self, strategy: Any) -> list[MetricValue]:
        return _values(self, strategy, self.result(), add_experience=False)


class _AfterExperience(_Named):
    """One of the plugin's attributes, reported after an experience's Fisher is computed."""

    def reset(self) -> None:
        self._last = 0.0

    def result(self) -> float:
        return self._last

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        plugin = ewc_plugin_of(strategy)
        if plugin is not None:
            self._last = self._read(plugin)
        return _values(self, strategy, self._last, add_experience=True)


def ewc_metrics(*, epoch: bool = True, experience: bool = True) -> list[PluginMetric[float]]:
    """Return metrics of a strategy's `DiagonalEWCPlugin`; without one they have no values.

    Pass them to `EvaluationPlugin`, the same in every arm of a comparison. The TensorBoard and W&B
    loggers show them, and the interactive and text loggers, which print with the next epoch or
    evaluation; Avalanche's `CSVLogger` writes fixed columns and has no place for them.

    Args:
        epoch: EWC_Penalty (ewc_lambda times the penalty) and EWC_TaskLoss (without it), means over
            an epoch's samples.
        experience: EWC_FisherTrace (of the last experience, nats / theta^2), EWC_Share90 (the
            fraction of all parameters that hold 90 % of it) and EWC_FisherSeconds (in all so far).

    Returns:
        The metrics.

    Example:
        >>> [str(metric) for metric in ewc_metrics(epoch=False)]
        ['EWC_FisherTrace', 'EWC_Share90', 'EWC_FisherSeconds']
    """
    metrics: list[PluginMetric[float]] = []
    if epoch:
        metrics += [
            _EpochMean("EWC_Penalty", lambda plugin: plugin.penalty_loss),
            _EpochMean("EWC_TaskLoss", lambda plugin: plugin.task_loss),
        ]
    if experience:
        metrics += [
            _AfterExperience("EWC_FisherTrace", lambda plugin: fisher_trace(plugin.fisher)),
            _AfterExperience("EWC_Share90", lambda plugin: share_holding(plugin.fisher, 0.9)),
            _AfterExperience("EWC_FisherSeconds", lambda plugin: plugin.fisher_seconds),
        ]
    return metrics


def fisher_trace(fisher: dict[str, Tensor]) -> float:
    """sum_i F_i."""
    return sum(float(f.sum(dtype=torch.float64)) for f in fisher.values())


def share_holding(fisher: dict[str, Tensor], fraction: float) -> float:
    """Return the smallest fraction of the parameters that holds `fraction` of the trace of F.

    Args:
        fisher: By parameter name.
        fraction: Between 0 and 1.

    Returns:
        Between 0 and 1.

    Example:
        >>> share_holding({"w": torch.tensor([8.0, 1.0, 0.5, 0.5])}, 0.9)
        0.5
    """
    flat = torch.cat([f.flatten() for f in fisher.values()]).double()
    largest_first = flat.sort(descending=True).values.cumsum(0)
    needed = fraction * largest_first[-1] * (1 - 1e-12)  # so that rounding does not add a parameter
    return float((largest_first < needed).sum() + 1) / len(flat)


def ewc_plugin_of(strategy: Any) -> DiagonalEWCPlugin | None:
    """Return the first `DiagonalEWCPlugin` among the strategy's plugins, or None."""
    return next((p for p in strategy.plugins if isinstance(p, DiagonalEWCPlugin)), None)


def _values(
    metric: PluginMetric[float], strategy: Any, value: float, *, add_experience: bool
) -> list[MetricValue]:
    """Return the value as Avalanche's loggers take it; nothing without a plugin."""
    if ewc_plugin_of(strategy) is None:
        return []
    name = get_metric_name(metric, strategy, add_experience=add_experience, add_task=False)
    return [MetricValue(metric, name, value, strategy.clock.train_iterations)]

"""The plugins of each method: ours, and Avalanche's own for what a reader compares it with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.core import BasePlugin
from avalanche.training.losses import MaskedCrossEntropy
from avalanche.training.plugins import (
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.utils import ParamData
from torch import Tensor, nn

from ewc_plugin import DiagonalEWCPlugin
from ewc_plugin.fisher.scores import BATCHED
from experiments.data.streams import Stream
from experiments.data.tensor_path import FISHER_BATCH
from experiments.settings.own import OPTIONS, OwnFile, function_of
from experiments.settings.run import RunSettings
from experiments.training.avalanche_ewc import BuiltinEWC, in_order


class L2(DiagonalEWCPlugin):
    """EWC with F = 1 for every parameter that the experience has trained.

    A head that got no gradient in the last mini-batch belongs to another experience, and stays
    free.
    """

    def compute_fisher(self, strategy: Any) -> dict[str, Tensor]:
        """Return ones, by parameter name."""
        parameters = strategy.model.named_parameters()
        return {name: torch.ones_like(p) for name, p in parameters if p.grad is not None}


class SI(SynapticIntelligencePlugin):
    """Avalanche's SI, with copies of the weights where its own are views of them.

    On a CPU its `param.detach().cpu().flatten()` copies nothing, so that the weights before a step
    are those after it, every importance is zero, and the run is Naive's.
    """

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the weights that the experience starts from."""
        super().before_training_exp(strategy, **kwargs)
        _copy(self.ewc_data[0])

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the weights that the step starts from."""
        super().before_training_iteration(strategy, **kwargs)
        _copy(self.syn_data["old_theta"])


def _copy(stored: Mapping[str, ParamData]) -> None:
    for parameter in stored.values():
        parameter.data = parameter.data.clone()


class CurrentClasses(MaskedCrossEntropy):  # type: ignore[misc]
    """Cross-entropy over the classes of the experience that trains; over all in evaluation."""

    def __init__(self) -> None:
        super().__init__(mask="new")

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Do what Avalanche's method does, which besides prints that it is deprecated."""
        self.pre_adapt(strategy, strategy.experience)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Measure every experience by the same loss."""
        self.mask = "all"

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Train on the experience's classes again."""
        self.mask = "new"


@dataclass(frozen=True)
class MethodPlugins:
    """The plugins of a method.

    Attributes:
        early: Those that need Avalanche's own data sets, before the fast data path replaces them.
        late: Those that it feeds.
        criterion: The loss of the method; None for that of the settings.
    """

    early: tuple[Any, ...] = ()
    late: tuple[Any, ...] = ()
    criterion: Any = None

    @property
    def every(self) -> tuple[Any, ...]:
        """All of them."""
        loss = () if self.criterion is None else (self.criterion,)
        return self.early + self.late + loss


def criterion_of(settings: RunSettings) -> nn.Module | CurrentClasses:
    """The loss that the run trains on."""
    return CurrentClasses() if settings.loss_classes == "current" else nn.CrossEntropyLoss()


def own_method(settings: RunSettings, stream: Stream, files: Sequence[OwnFile]) -> MethodPlugins:
    """The plugins that an own function returns; one of them that is a loss too is the criterion.

    Args:
        settings: Of the run.
        stream: Of the run.
        files: Of own functions.

    Returns:
        The plugins, which see Avalanche's own data sets.

    Raises:
        ValueError: They are no list of plugins with one loss at most.
    """
    function = function_of("method", settings.method, settings.method_sha256, files)
    plugins = function(
        **{name: getattr(settings, name) for name in OPTIONS["method"]},
        n_classes=stream.n_outputs,
        benchmark=stream.benchmark,
    )
    if not isinstance(plugins, (list, tuple)):
        raise function.error("return a list of plugins", f", got {type(plugins).__name__}")
    for plugin in plugins:
        if not isinstance(plugin, BasePlugin):
            rule = "return a list of Avalanche plugins"
            raise function.error(rule, f", got one of {type(plugin).__name__}")
    losses = [plugin for plugin in plugins if callable(plugin)]
    if len(losses) > 1 or (losses and settings.loss_classes is not None):
        raise function.error("return one loss at most, and none with --loss current")
    others = tuple(plugin for plugin in plugins if plugin not in losses)
    return MethodPlugins(early=others, criterion=losses[0] if losses else None)


def method_plugins(settings: RunSettings) -> MethodPlugins:
    """The plugins of a method by name, new; its strength is `ewc_lambda`, whatever it is called."""
    match settings.method:
        case "avalanche-ewc":
            return MethodPlugins(late=(BuiltinEWC(settings),))
        case "ewc":
            return MethodPlugins(late=(_ewc(settings),))
        case "ewc+replay":
            return MethodPlugins((ReplayPlugin(settings.memory),), (_ewc(settings),))
        case "replay":
            return MethodPlugins((ReplayPlugin(settings.memory),))
        case "l2":
            return MethodPlugins(
                late=(L2(settings.ewc_lambda, settings.mode, settings.decay_factor),)
            )
        case "si":
            return MethodPlugins(late=(SI(settings.ewc_lambda),))
        case "mas":
            return MethodPlugins(late=(MASPlugin(settings.ewc_lambda),))
        case "lwf":
            return MethodPlugins((LwFPlugin(settings.ewc_lambda),))
    return MethodPlugins()


def _ewc(settings: RunSettings) -> DiagonalEWCPlugin:
    fast = settings.data_path == "fast"
    return DiagonalEWCPlugin(
        settings.ewc_lambda,
        settings.mode,
        settings.decay_factor,
        fisher_type=settings.fisher_type,
        fisher_batches=functools.partial(_fisher_batches, settings) if fast else None,
        normalize=settings.normalize,
        implicit=settings.penalty_step == "implicit",
    )


def _fisher_batches(settings: RunSettings, strategy: Any) -> Iterator[list[Tensor]]:
    """The current experience's samples; in Avalanche's mini-batches where F depends on them."""
    rows = in_order(strategy.experience.dataset, settings.importance_order)
    batched = settings.fisher_type in BATCHED
    return rows.batches(
        settings.importance_batch or settings.batch_size if batched else FISHER_BATCH
    )


def state_bytes(plugin: Any) -> int:
    """Memory that a method keeps between experiences, its tensors and the samples of replay."""
    if isinstance(plugin, DiagonalEWCPlugin):
        return plugin.penalty.nbytes
    if isinstance(plugin, ReplayPlugin):
        memory = plugin.storage_policy.buffer
        return len(memory) * (_nbytes(memory[0][0]) if len(memory) else 0)
    tensors = {id(t): t for t in _tensors(vars(plugin))}
    return sum(map(_nbytes, tensors.values()))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a plugin's attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, ParamData):
        yield value.data
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif type(value).__module__.startswith("avalanche.training.regularization"):
        yield from _tensors(vars(value))

"""The Fisher of a strategy's model, on batches prepared as the strategy prepares them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ewc_plugin.avalanche.likelihood import Likelihood, checked_likelihood
from ewc_plugin.avalanche.ranks import fisher_over_ranks, unwrapped, world_size
from ewc_plugin.avalanche.template import (
    feeds_its_own_way,
    left_as_it_was,
    overrides,
    template_output,
    template_targets,
    unpacked,
)
from ewc_plugin.batch_parts import labelled, logits_of
from ewc_plugin.batches import Batch, take
from ewc_plugin.contexts import evaluating, untouched_randomness
from ewc_plugin.fisher.diagonal import diagonal_fisher
from ewc_plugin.fisher.scores import BATCHED, FisherType, Score


class StrategyFisher:
    """A call of `diagonal_fisher` with a strategy's batches, forward pass and targets.

    Where a user's template overrides the methods that feed the model, and the plugin's `unpack`
    and `forward` are not overridden, the template's methods are called.

    Args:
        plugin: Its `unpack`, `forward` and `active_classes` are called.
        strategy: Whose model it is.
        fisher_type: The plugin's.
        likelihood: Of the outputs; None where `fisher_type` needs none, or it is not known yet.
        own_forward: Whether the plugin's `forward` was overridden by the user.
        own_unpack: Whether the plugin's `unpack` was overridden by the user.

    Attributes:
        by_template: Whether batches are unpacked, and outputs made, by the template.
    """

    def __init__(
        self,
        plugin: Any,
        strategy: Any,
        fisher_type: FisherType | Score,
        likelihood: Likelihood | None,
        *,
        own_forward: bool,
        own_unpack: bool,
    ) -> None:
        self._plugin, self._strategy = plugin, strategy
        self._fisher_type, self.likelihood = fisher_type, likelihood
        self._labels = fisher_type if needs_likelihood(fisher_type) else None
        self.model = unwrapped(strategy.model)
        self.by_template = not (own_forward or own_unpack) and feeds_its_own_way(strategy)
        self._targets_by_template = not own_unpack and overrides(
            strategy, "mb_y", "_unpack_minibatch"
        )

    def compute(
        self, batches: Callable[[], Iterable[Batch]], options: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Compute the Fisher over the batches of all ranks.

        Args:
            batches: Gives this rank's.
            options: Keyword arguments of `diagonal_fisher`.

        Returns:
            F, by parameter name.
        """
        defaults: dict[str, Any] = {"forward": self.logits, "targets": self.targets}
        if self._fisher_type in BATCHED:
            defaults["criterion"] = self._strategy._criterion
        options = defaults | options

        def fisher_of(share: Iterable[Batch], **more: Any) -> dict[str, Tensor]:
            share = iter(share)
            share = chain(list(islice(share, 1)), share)  # the first may settle the likelihood
            kind = (self.likelihood and self.likelihood.score) or self._fisher_type
            return diagonal_fisher(self.model, share, kind, **options | more)

        with untouched_randomness():
            if world_size() == 1:
                return fisher_of(self._prepared(batches()))
            return fisher_over_ranks(
                fisher_of,
                lambda: self._prepared(batches()),
                {name: p for name, p in self.model.named_parameters() if p.requires_grad},
                max_samples=options.get("max_samples"),
                fisher_type=self._fisher_type,
            )

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output as the criterion is given it."""
        if self.by_template:
            return template_output(self._strategy, model, batch)
        return self._plugin.forward(model, batch)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs that the likelihood has, inactive classes masked with -inf."""
        outputs: Tensor = logits_of(self.output(model, batch))
        if self._labels is None or not isinstance(outputs, Tensor):
            return outputs
        if self.likelihood is not None and self.likelihood.score is not None:
            return outputs.reshape(len(outputs), -1)
        if outputs.dim() != 2:
            return outputs  # `diagonal_fisher` raises an error for these
        active = self._plugin.active_classes(self._strategy, batch, outputs)
        return outputs if active is None else outputs.masked_fill(~active, -torch.inf)

    def targets(self, batch: Batch) -> Tensor:
        """Return the targets of a batch."""
        if self._targets_by_template:
            batch = batch if self.by_template else unpacked(self._strategy, batch)
            own: Tensor = template_targets(self._strategy, batch)
            return own
        targets: Tensor = self._plugin.unpack(batch).targets
        return targets

    def _prepared(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches as the template unpacks them, without samples that are ignored."""
        for batch in batches:
            if self.by_template:
                batch = unpacked(self._strategy, batch)
            if self._labels is None:
                yield batch
                continue
            if self.likelihood is None:
                with evaluating(self.model), left_as_it_was(self._strategy):
                    outputs, self._strategy.mbatch = self.output(self.model, batch), batch
                    found = checked_likelihood(self._strategy, outputs, self.targets(batch))
                self.likelihood = found.of_type(self._labels)
            ignored = self.likelihood.ignore_index
            keep = None if ignored is None else labelled(self.targets(batch), ignored)
            if keep is None:
                yield batch
            elif bool(keep.any()):
                yield take(batch, keep)


def needs_likelihood(fisher_type: FisherType | Score) -> TypeGuard[FisherType]:
    """Return whether a Fisher type is defined by labels, so that the likelihood must be known."""
    return isinstance(fisher_type, FisherType) and fisher_type not in BATCHED

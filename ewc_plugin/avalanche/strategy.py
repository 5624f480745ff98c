"""`DiagonalEWC`: a drop-in for Avalanche's `EWC` strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from ewc_plugin.avalanche.fisher_data import FisherData
from ewc_plugin.avalanche.plugin import DiagonalEWCPlugin
from ewc_plugin.fisher.scores import FisherType, Score
from ewc_plugin.penalty.options import Mode, Normalization


class DiagonalEWC(SupervisedTemplate):
    """Elastic Weight Consolidation with an exact per-sample Fisher.

    Arguments up to `eval_every` are those of `avalanche.training.supervised.EWC`, in its order; the
    others are `DiagonalEWCPlugin`'s. `plugins` is not changed.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Any,
        ewc_lambda: float,
        mode: Mode | str = Mode.SEPARATE,
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: list[Any] | None = None,
        evaluator: Any = default_evaluator,
        eval_every: int = -1,
        fisher_type: FisherType | str | Score = FisherType.PREDICTED,
        fisher_data: FisherData | str = FisherData.EXPERIENCE,
        fisher_batches: Callable[[Any], Iterable[Any]] | None = None,
        fisher_options: Mapping[str, Any] | None = None,
        normalize: Normalization | str | None = None,
        consolidate_every: int = 1,
        implicit: bool = False,
        storage_dtype: torch.dtype | None = None,
        storage_device: torch.device | str | None = None,
        **base_kwargs: Any,
    ) -> None:
        ewc = DiagonalEWCPlugin(
            ewc_lambda,
            mode,
            decay_factor,
            keep_importance_data,
            fisher_type=fisher_type,
            fisher_data=fisher_data,
            fisher_batches=fisher_batches,
            fisher_options=fisher_options,
            normalize=normalize,
            consolidate_every=consolidate_every,
            implicit=implicit,
            storage_dtype=storage_dtype,
            storage_device=storage_device,
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or []), ewc],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )

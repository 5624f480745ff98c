"""Squared mini-batch gradients, Avalanche's importances and EWC-DR's, for comparison alone."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.dense import find_class_dim
from ewc_plugin.fisher.label_scores import wide
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.per_sample import gradients_of
from ewc_plugin.fisher.scores import reversed_logits
from ewc_plugin.fisher.tracing.layer_calls import has_custom_function


def batched_importances(
    call: ModelCall,
    batches: Iterable[Batch],
    targets: Callable[[Batch], Tensor | None],
    criterion: Callable[[Tensor, Any], Tensor],
    *,
    reverse: bool = False,
) -> dict[str, Tensor]:
    """1/B sum_b (d criterion(logits_b, y_b) / d theta)^2 over the B mini-batches as they come.

    Its value depends on the batch size, on the order of the samples and on `reduction`. The
    operations are those of Avalanche's `EWCPlugin.compute_importances`, in its order and in the
    parameters' dtype, so the results are equal to the bit.

    Args:
        call: The model; its logits are the criterion's first argument.
        batches: The mini-batches.
        targets: Maps a batch to its second argument.
        criterion: The loss of a mini-batch.
        reverse: Whether the criterion is given the reversed logits, as EWC-DR has it.

    Returns:
        One tensor per parameter.

    Raises:
        ValueError: No batches, or the result is not finite.
    """
    importances = {name: torch.zeros_like(p).detach() for name, p in call.params.items()}
    n_batches = 0
    for batch in batches:
        call.state.restore()
        logits = call.forward(call.model, batch)
        loss = criterion(reversed_logits(logits) if reverse else logits, targets(batch))
        if not n_batches:
            call = replace(call, by_backward=has_custom_function(loss))
        grads = gradients_of(call, loss, None, retain_graph=False)
        for importance, grad in zip(importances.values(), grads, strict=True):
            if grad is not None:
                importance += grad.pow(2)
        n_batches += 1
    if not n_batches:
        raise ValueError("`batches` is empty: a Fisher needs at least one sample.")
    for name, importance in importances.items():
        importance /= float(n_batches)
        if not bool(importance.isfinite().all()):
            raise ValueError(
                f"The importance of `{name}` is not finite: the loss or its gradient is not, or "
                f"its square overflows {importance.dtype}. Did the training diverge?"
            )
    return importances


def mean_cross_entropy(
    class_dim: int | None, ignore_index: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The default criterion: of labels of any integer type, or of rows of probabilities.

    Args:
        class_dim: Axis of the classes in dense outputs; None: what the labels' shape says.
        ignore_index: The label that has no loss.

    Returns:
        A function of (outputs, y).
    """

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        y = wide(targets)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"`targets` must return a tensor for the default criterion, got {targets!r}. Pass "
                "a `criterion` that takes it."
            )
        if outputs.dim() > 2 and not y.is_floating_point():
            outputs = outputs.movedim(find_class_dim(outputs.shape, y.shape, class_dim), 1)
        try:
            return F.cross_entropy(outputs, y, ignore_index=ignore_index)
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"The default `criterion`, cross entropy, takes no outputs {tuple(outputs.shape)} "
                f"with targets {tuple(y.shape)} of {y.dtype}: {error} Pass a `criterion`."
            ) from error

    return criterion

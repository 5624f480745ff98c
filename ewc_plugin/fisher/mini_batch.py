"""Avalanche's importances: squares of mini-batch gradients, kept for parity alone."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch


def batched_importances(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    batches: Iterable[Batch],
    forward: Callable[[nn.Module, Batch], Tensor],
    targets: Callable[[Batch], Tensor],
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """1/B sum_b (d criterion(logits_b, y_b) / d theta)^2 over the B mini-batches as they come.

    Its value depends on the batch size, on the order of the samples and on `reduction`. The
    operations are those of Avalanche's `EWCPlugin.compute_importances`, in its order and in the
    parameters' dtype, so the results are equal to the bit.

    Args:
        model: In eval mode.
        params: The trainable parameters.
        batches: The mini-batches.
        forward: Maps (model, batch) to the criterion's first argument.
        targets: Maps a batch to its second.
        criterion: The loss of a mini-batch.

    Returns:
        One tensor per parameter.

    Raises:
        ValueError: No batches.
    """
    importances = {name: torch.zeros_like(p).detach() for name, p in params.items()}
    n_batches = 0
    for batch in batches:
        loss = criterion(forward(model, batch), targets(batch))
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for importance, grad in zip(importances.values(), grads, strict=True):
            if grad is not None:
                importance += grad.pow(2)
        n_batches += 1
    if not n_batches:
        raise ValueError("`batches` is empty: a Fisher needs at least one sample.")
    for importance in importances.values():
        importance /= float(n_batches)
    return importances

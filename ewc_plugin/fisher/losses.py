"""The score of any loss: minus its gradient at the outputs, sample by sample."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ewc_plugin.batches import Batch, join, n_samples, take
from ewc_plugin.fisher.outputs import default_targets
from ewc_plugin.fisher.scores import Score, ScoreError

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of gradients, relative to the largest
_HALF = 3e-2


def loss_score(
    criterion: Callable[[Tensor, Any], Tensor], targets: Callable[[Batch], Any] | None = None
) -> Score:
    """The score of a loss that is a sum over samples: F = 1/N sum_n (d loss_n / d theta)^2.

    v_n = -d loss_n / d outputs_n. Where loss_n = -log p(y_n | x_n) this is the empirical Fisher of
    that likelihood; of another loss it is an importance, and no Fisher information. The loss may
    have class weights, label smoothing or an `ignore_index`.

    Args:
        criterion: Maps (outputs [N, ...], targets) to the samples' losses, of any shape, or to
            their sum: `nn.CrossEntropyLoss(reduction="sum")`. A mean over the batch is refused.
        targets: Maps a batch to the criterion's second argument. Default: its labels. With
            `lambda batch: batch` the criterion sees all of it, as CTC needs.

    Returns:
        A score, to be passed as `fisher_type`.

    Raises:
        TypeError: `criterion` is no function.

    Example:
        >>> score = loss_score(torch.nn.MSELoss(reduction="sum"))
        >>> score(torch.tensor([[1.0], [3.0]]), (None, torch.tensor([[0.0], [5.0]])))
        tensor([[-2.],
                [ 4.]])
    """
    if not callable(criterion):
        raise TypeError(
            f"`criterion` must map (outputs, targets) to losses, got {criterion!r}. Pass a "
            "function or a module such as nn.CrossEntropyLoss(reduction='sum')."
        )
    read = targets or default_targets

    def gradient(outputs: Tensor, batch: Batch) -> Tensor:
        with torch.enable_grad():
            z = outputs.detach().clone().requires_grad_()
            loss = criterion(z, read(batch)).sum()
            if not loss.requires_grad:
                return torch.zeros_like(z)
            (found,) = torch.autograd.grad(loss, z, allow_unused=True)
        return torch.zeros_like(outputs) if found is None else found

    def score(outputs: Tensor, batch: Batch) -> Tensor:
        found = gradient(outputs, batch)
        _check_additive(gradient, found, outputs, batch)
        return -found

    score.__name__ = f"loss_score({getattr(criterion, '__name__', type(criterion).__name__)})"
    return score


def _check_additive(
    gradient: Callable[[Tensor, Batch], Tensor], found: Tensor, outputs: Tensor, batch: Batch
) -> None:
    """Raise where the first or last sample's gradient depends on the samples beside it."""
    N = n_samples(batch)
    largest = found.abs().max() if found.numel() else torch.zeros(())
    allowed = _TOLERANCE.get(found.dtype, _HALF) * largest
    pair = take(batch, slice(0, 1)) if N == 1 else batch
    for n in (0, N - 1):
        one = take(pair, slice(n, n + 1))
        alone = gradient(outputs[n : n + 1], one)
        if N == 1:  # beside a copy of itself
            found = gradient(torch.cat([outputs, outputs]), join([one, one]))
        if bool(((found[n] - alone[0]).abs() > allowed).any()):
            raise ScoreError(
                "`criterion` must be a sum over samples, and a sample's gradient depends on the "
                "samples beside it. Pass reduction='sum' or 'none', not a mean over the batch, and "
                "no loss that compares samples."
            )

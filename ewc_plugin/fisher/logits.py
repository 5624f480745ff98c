"""What a model's logits must be: finite, [N, C]."""

import torch
from torch import Tensor

from ewc_plugin.batches import Batch, n_samples


def checked_logits(logits: object, batch: Batch) -> Tensor:
    """The logits [N, C] of a batch, refused where they can't be a classifier's.

    Args:
        logits: What the model returned.
        batch: N samples.

    Returns:
        The logits.

    Raises:
        ValueError: Not a tensor [N, C].
    """
    N = n_samples(batch)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"`model` must return logits [N, C], got {type(logits).__name__}. "
            "Pass `forward`, which maps (model, batch) to them."
        )
    if logits.dim() != 2 or len(logits) != N:
        raise ValueError(
            f"`model` must return logits [N, C], got shape {tuple(logits.shape)} for N = {N}. "
            "Pass `forward`, which maps (model, batch) to them."
        )
    return logits


def check_finite(logits: Tensor, first: int) -> None:
    """Refuses NaN, inf, and a sample without any finite logit; -inf masks a class.

    Args:
        logits: [N, C].
        first: Index of its first sample in the whole stream.

    Raises:
        ValueError: A logit is not finite.
    """
    if bool(logits.isfinite().all()):
        return
    masked = logits == -torch.inf
    bad = (~logits.isfinite() & ~masked).any(1) | masked.all(1)
    if bool(bad.any()):
        raise ValueError(
            f"`model` gave a logit that is not finite for sample {first + int(bad.nonzero()[0])} "
            "of `batches` (counted from 0, in the order they came). Did the training diverge?"
        )

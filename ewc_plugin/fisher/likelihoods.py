"""Scores of models that are no softmax classifiers: pass one as `fisher_type`."""

import torch
from torch import Tensor

from ewc_plugin.batches import Batch


def gaussian_score(outputs: Tensor, batch: Batch, variance: float = 1.0) -> Tensor:
    """Of regression, y ~ N(outputs, variance I): the exact Fisher J^T J / variance.

    E[(y - mean)(y - mean)^T] / variance^2 = I / variance, whose square root has one column e_d /
    sqrt(variance) for each output d.

    Args:
        outputs: [N, D], the means. `nn.MSELoss` is the loss of variance D / 2.
        batch: Not looked at: the exact Fisher needs no targets.
        variance: Of the noise; fix it with `functools.partial`.

    Returns:
        [D, N, D].

    Example:
        >>> gaussian_score(torch.zeros(3, 1), None, variance=4.0).flatten()
        tensor([0.5000, 0.5000, 0.5000])
    """
    N, D = outputs.shape
    columns = torch.eye(D, dtype=outputs.dtype, device=outputs.device) / variance**0.5
    vectors: Tensor = columns[:, None].expand(D, N, D)
    return vectors


def bernoulli_score(outputs: Tensor, batch: Batch) -> Tensor:
    """Of independent yes/no labels, y_d ~ Bernoulli(sigmoid(outputs_d)): the exact Fisher.

    Args:
        outputs: [N, D], the logits of binary classifiers, as `nn.BCEWithLogitsLoss` takes them.
        batch: Not looked at.

    Returns:
        [D, N, D]: sqrt(p_d (1 - p_d)) e_d for each output d.

    Example:
        >>> bernoulli_score(torch.zeros(2, 1), None).flatten()
        tensor([0.5000, 0.5000])
    """
    p, q = outputs.sigmoid(), (-outputs).sigmoid()  # 1 - p would cancel near p = 1
    vectors: Tensor = torch.diag_embed((p * q).sqrt()).transpose(0, 1)
    return vectors

"""Scores of likelihoods other than the softmax classifier's, and one more of its labels."""

import math

import torch
from torch import Tensor

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.outputs import default_targets
from ewc_plugin.fisher.scores import Scores, label_scores


def gaussian_score(outputs: Tensor, batch: Batch, variance: float = 1.0) -> Tensor:
    """Score of regression, y ~ N(outputs, variance I): the exact Fisher J^T J / variance.

    E[(y - mean)(y - mean)^T] / variance^2 = I / variance, whose square root has one column e_d /
    sqrt(variance) for each output d.

    Args:
        outputs: [N, ...], the means of D values per sample. `nn.MSELoss` is the loss of variance
            D / 2.
        batch: Not looked at: the exact Fisher needs no targets.
        variance: Of the noise; fix it with `functools.partial`.

    Returns:
        [D, N, ...]; all samples share the memory of one.

    Example:
        >>> gaussian_score(torch.zeros(3, 1), None, variance=4.0).flatten()
        tensor([0.5000, 0.5000, 0.5000])
    """
    one = outputs.shape[1:]
    D = math.prod(one)
    columns = torch.eye(D, dtype=outputs.dtype, device=outputs.device) / variance**0.5
    vectors: Tensor = columns.view(D, 1, *one).expand(D, *outputs.shape)
    return vectors


def bernoulli_score(outputs: Tensor, batch: Batch) -> Scores:
    """Score of independent yes/no labels, y_d ~ Bernoulli(sigmoid(outputs_d)): the exact Fisher.

    Args:
        outputs: [N, ...], the logits of binary classifiers, as `nn.BCEWithLogitsLoss` takes them.
        batch: Not looked at.

    Returns:
        sqrt(p_d (1 - p_d)) e_d for each output d.

    Example:
        >>> bernoulli_score(torch.zeros(2, 1), None).stacked().flatten()
        tensor([0.5000, 0.5000])
    """
    deviation = (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()  # 1 - p would cancel near p = 1
    flat = deviation.reshape(len(outputs), math.prod(outputs.shape[1:]))

    def vector(d: int) -> Tensor:
        v = torch.zeros_like(flat)
        v[:, d] = flat[:, d]
        return v.view(outputs.shape)

    return Scores(flat.size(1), vector)


def weighted_label_score(outputs: Tensor, batch: Batch) -> Tensor:
    """Score of the data's label y, weighted by its probability: F = 1/N sum_n p(y_n | x_n) g_n^2.

    The term of the exact Fisher's sum over classes that the data's label has, alone: no Fisher
    information, and no mean over labels.

    Args:
        outputs: Logits [N, C].
        batch: (x, y, ...) or a mapping with "labels", with y [N] int64.

    Returns:
        sqrt(p(y_n)) (onehot(y_n) - p_n), [N, C].

    Source: The online EWC of Mammoth (Buzzega et al. 2020), file `models/ewc_on.py`.

    Example:
        >>> weighted_label_score(torch.zeros(1, 2), (None, torch.tensor([1]))).abs().sum() ** 2
        tensor(0.5000)
    """
    y = default_targets(batch)
    p = outputs.softmax(1)
    return p.gather(1, y[:, None]).sqrt() * label_scores(p, y)


def log_likelihood_score(outputs: Tensor, batch: Batch) -> Tensor:
    """Score for a `forward` that returns log p(y_n | x_n): F = 1/N sum_n (d log p_n / d theta)^2.

    For models whose likelihood is no function of a few outputs, such as flows and detectors. The
    sign does not matter, so that a loss per sample will do.

    Args:
        outputs: [N] or [N, 1], one value per sample.
        batch: Not looked at.

    Returns:
        Ones.

    Raises:
        ValueError: There is more than one value per sample.

    Example:
        >>> log_likelihood_score(torch.tensor([-1.5, -0.2]), None)
        tensor([1., 1.])
    """
    if outputs.numel() != len(outputs):
        raise ValueError(
            "`forward` must return one log-likelihood per sample, [N], for log_likelihood_score, "
            f"got shape {tuple(outputs.shape)}. Sum over all axes but the first."
        )
    return torch.ones_like(outputs)

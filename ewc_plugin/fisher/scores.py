"""Fisher types, and the score vectors v [N, C] at the logits that each of them squares.

A Fisher type only defines v in F = 1/N sum_n sum_s (J_n^T v_ns)^2, where J_n is the Jacobian of
sample n's logits. The backward passes do not depend on the Fisher type.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from ewc_plugin.batches import Batch

_BLOCK_ENTRIES = 2**18  # entries of EXACT's score vectors computed at a time


class FisherType(str, Enum):
    """Which labels the expectation in the Fisher runs over; or an importance of another kind.

    PREDICTED: the model's own argmax. EMPIRICAL: the data's labels. SAMPLED: labels drawn from
    the model's softmax. EXACT: every class, weighted by its probability.

    The others are no Fisher information, which is E[g^2] of the score g. CLASS_MEAN: squares of
    the classes' mean scores, at the predicted labels; CLASS_MEAN_EMPIRICAL: at the data's. See
    `class_mean`. REVERSED: g of the reversed logits, -z for z, at the data's labels;
    CLASS_MEAN_REVERSED: squares of its classes' means. BATCHED: Avalanche's definition, the square
    of a mini-batch's mean gradient; BATCHED_REVERSED: EWC-DR's, the same of the reversed logits.
    Both are kept for parity alone: they depend on the batches.

    Source: Kirkpatrick et al. 2017; Kunstner et al. 2019 (empirical against exact); Liu and Chang
        2026, arXiv 2603.18596 (BATCHED_REVERSED).
    """

    PREDICTED = "predicted"
    EMPIRICAL = "empirical"
    SAMPLED = "sampled"
    EXACT = "exact"
    BATCHED = "batched"
    CLASS_MEAN = "class_mean"
    CLASS_MEAN_EMPIRICAL = "class_mean_empirical"
    REVERSED = "reversed"
    CLASS_MEAN_REVERSED = "class_mean_reversed"
    BATCHED_REVERSED = "batched_reversed"

    @classmethod
    def parse(cls, value: "FisherType | str") -> "FisherType":
        """Look a type up by its value.

        Args:
            value: A `FisherType` or its string.

        Returns:
            The type.

        Raises:
            ValueError: No such type.

        Example:
            >>> FisherType.parse("exact")
            <FisherType.EXACT: 'exact'>
        """
        try:
            return cls(value)
        except ValueError:
            allowed = ", ".join(repr(t.value) for t in cls)
            raise ValueError(
                f"`fisher_type` must be one of {allowed}, or a function that gives score vectors, "
                f"got {value!r}."
            ) from None


# `fisher_type in BATCHED` is False for a function that gives score vectors.
BATCHED = (FisherType.BATCHED, FisherType.BATCHED_REVERSED)
"""Squares of mini-batches' mean gradients, which need no scores."""
CLASS_MEANS = (
    FisherType.CLASS_MEAN,
    FisherType.CLASS_MEAN_EMPIRICAL,
    FisherType.CLASS_MEAN_REVERSED,
)
"""Squares of classes' mean scores."""
REVERSED_LOGITS = (FisherType.REVERSED, FisherType.CLASS_MEAN_REVERSED, FisherType.BATCHED_REVERSED)
"""Gradients of the reversed logits."""
AT_DATA_LABELS = (
    FisherType.EMPIRICAL,
    FisherType.CLASS_MEAN_EMPIRICAL,
    FisherType.REVERSED,
    FisherType.CLASS_MEAN_REVERSED,
)
"""Scores of the data's labels."""


@dataclass(frozen=True)
class Scores:
    """`count` score vectors, each computed on demand: with 1,000 classes there may be 999.

    Attributes:
        count: Number S of vectors.
        vector: Maps s in [0, S) to v_s, of the outputs' shape.
        n_samples: How many samples have a label; None: all.
    """

    count: int
    vector: Callable[[int], Tensor]
    n_samples: int | None = None

    def stacked(self) -> Tensor:
        """All vectors at once, [S, N, C]."""
        return torch.stack([self.vector(s) for s in range(self.count)])


class ScoreError(ValueError):
    """A score that is none, whatever the batches."""


Score = Callable[[Tensor, Batch], Tensor | Scores]
"""Any other likelihood: maps (outputs [N, D], batch) to vectors [S, N, D] or, where S = 1, [N, D],
or to `Scores` where they are many. Each is d log p(y | x) / d outputs for one y, times the square
root of the weight that y has."""


def parsed_type(value: "FisherType | str | Score") -> "FisherType | Score":
    """A Fisher type looked up by its value, or the caller's own score."""
    if callable(value):
        return value
    return FisherType.parse(value)


def type_name(fisher_type: "FisherType | Score") -> str:
    """The type's value, or the name of the caller's own score."""
    if isinstance(fisher_type, FisherType):
        return fisher_type.value
    return str(getattr(fisher_type, "__name__", type(fisher_type).__name__))


def score_vectors(
    logits: Tensor,
    fisher_type: FisherType,
    *,
    targets: Tensor | None = None,
    n_draws: int = 1,
    generator: torch.Generator | None = None,
) -> Scores:
    """Vectors v_s with sum_s v_s v_s^T the (expected) outer product of d log p(y | x) / d logits.

    PREDICTED and EMPIRICAL: onehot(y) - p. SAMPLED: sqrt(share of draws) (onehot(y) - p) for each
    distinct y. EXACT: C - 1 columns L with L L^T = diag(p) - p p^T, over the classes with p > 0.
    The class means pull back the vectors of their labels.

    REVERSED: onehot(y) - softmax(-z), the gradient of the cross entropy of -z at y with respect to
    z. Its sign is that of +d loss / d z where the others have -d loss / d z; squares lose it.

    Args:
        logits: [N, C], finite or -inf for a class that is masked out.
        fisher_type: Any that is not batched.
        targets: [N] int64; the types at the data's labels alone read them.
        n_draws: Draws per sample, SAMPLED alone.
        generator: Draws the labels of SAMPLED; on its own device.

    Returns:
        The vectors, in float32 or the logits' dtype where that is wider.

    Raises:
        ValueError: A batched type has no score vectors; no targets for a type at the data's
            labels; fewer than 2 classes.

    Source: Kunstner et al. 2019, section 2 (the types); Liu and Chang 2026 (REVERSED); the factor
        of EXACT follows from
        diag(p) - p p^T = D (I - q q^T) D with q = sqrt(p), D = diag(q), and a
        Householder reflection.

    Example:
        >>> scores = score_vectors(torch.zeros(1, 2), FisherType.PREDICTED)
        >>> scores.count, scores.vector(0)
        (1, tensor([[ 0.5000, -0.5000]]))
    """
    if logits.size(1) < 2:
        raise ValueError(
            "`model` must return logits of at least 2 classes, got 1, whose softmax is constant. "
            "Give a binary head two logits, or use fisher_type=bernoulli_score; for regression "
            "gaussian_score."
        )
    logits = logits.detach()
    if fisher_type in REVERSED_LOGITS:
        logits = reversed_logits(logits)
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    if fisher_type in AT_DATA_LABELS:
        if targets is None:
            raise ValueError(
                f"`targets` are needed by fisher_type {fisher_type.value!r}, got None."
            )
        return Scores(1, lambda s: label_scores(p, targets))
    match fisher_type:
        case FisherType.PREDICTED | FisherType.CLASS_MEAN:
            predicted = logits.argmax(1)
            return Scores(1, lambda s: label_scores(p, predicted))
        case FisherType.SAMPLED:
            return _sampled(p, n_draws, generator)
        case FisherType.EXACT:
            return _exact(p)
        case _:
            raise ValueError(f"`fisher_type` {fisher_type.value!r} has no score vectors.")


def reversed_logits(logits: Tensor) -> Tensor:
    """-z, in which classes that are masked by -inf stay so."""
    return torch.where(logits == -torch.inf, logits, -logits)


def own_vectors(outputs: Tensor, score: Score, batch: Batch) -> Scores:
    """Compute and check the score vectors of a user-defined score.

    Args:
        outputs: [N, ...].
        score: The caller's.
        batch: What the outputs came from.

    Returns:
        The vectors, each checked when it is made.

    Raises:
        ScoreError: The score gives neither a tensor nor `Scores`.
        ValueError: Their shape does not fit the outputs, or one is not finite.
    """
    found = score(outputs.detach(), batch)
    if isinstance(found, Tensor):
        vectors = found.detach()
        if vectors.shape == outputs.shape:
            vectors = vectors[None]
        if vectors.shape[1:] != outputs.shape:
            _refuse_shape(vectors.shape, outputs.shape)
        found = Scores(len(vectors), lambda s: vectors[s])
    if not isinstance(found, Scores):
        raise ScoreError(
            "`fisher_type`, a score, must return a tensor [S, N, D] or [N, D], or `Scores`, got "
            f"{type(found).__name__}."
        )

    def checked(s: int) -> Tensor:
        v = found.vector(s).detach()
        if v.shape != outputs.shape:
            _refuse_shape((found.count, *v.shape), outputs.shape)
        if not bool(torch.isfinite(v).all()):
            raise ValueError("`fisher_type`, a score, gave a vector that is not finite.")
        return v

    return Scores(found.count, checked)


def _refuse_shape(got: Sequence[int], outputs: Sequence[int]) -> NoReturn:
    raise ValueError(
        f"`fisher_type`, a score, must give [S, N, D] or [N, D] for outputs {tuple(outputs)}, got "
        f"{tuple(got)}."
    )


def label_scores(p: Tensor, y: Tensor) -> Tensor:
    """onehot(y) - p [N, C], its entry at y summed from the others: 1 - p cancels near p = 1."""
    v = p.neg().scatter_(1, y[:, None], 0.0)
    return v.scatter_(1, y[:, None], -v.sum(1, keepdim=True))


def _sampled(p: Tensor, n_draws: int, generator: torch.Generator | None) -> Scores:
    """Scores of drawn labels; equal draws of one sample share a vector."""
    y = drawn_labels(p, n_draws, generator)
    counts = torch.zeros_like(p).scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))
    n_distinct = int((counts > 0).sum(1).max())
    share, label = (counts / n_draws).topk(n_distinct, dim=1)
    return Scores(
        n_distinct, lambda s: share[:, s, None].sqrt() * label_scores(p, label[:, s].contiguous())
    )


def drawn_labels(p: Tensor, n_draws: int, generator: torch.Generator | None) -> Tensor:
    """Labels [N, n_draws], drawn from probabilities p [N, C]."""
    device = p.device if generator is None else generator.device
    # One uniform number per draw in sample order: the labels do not depend on the batches.
    # Float32 below 1 times a float64 total stays below that total, so no masked class is drawn.
    u = torch.rand(len(p), n_draws, generator=generator, device=device, dtype=torch.float32)
    u = u.to(p.device, torch.float64)
    cdf = p.double().cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)


def _exact(p: Tensor) -> Scores:
    """Columns of L = D Q, Q an orthonormal basis of the complement of q = sqrt(p)."""
    # Q is the reflection H = I - w w^T / (1 + q_k) without column k; w = q + e_k, k = argmax q.
    # No entry cancels, so saturated outputs keep their digits.
    N, C = p.shape
    active = (p > 0).any(0).nonzero().squeeze(1)  # [A]
    if len(active) == 1:  # all samples are certain, and of the same class
        return Scores(1, lambda s: torch.zeros_like(p))
    q = p[:, active].sqrt()  # [N, A]
    q_top, top = q.max(1, keepdim=True)  # [N, 1]
    base = (-q * q / (1 + q_top)).scatter_(1, top, -q_top)  # [N, A]: w_i / (1 + q_k), times -q_i
    count = len(active) - 1
    width = max(1, _BLOCK_ENTRIES // p.numel())  # columns made at a time

    @lru_cache(maxsize=1)
    def block(first: int) -> tuple[Tensor, ...]:
        s = torch.arange(first, min(first + width, count), device=p.device)[:, None, None]
        j = torch.where(top == s, count, s)  # [S, N, 1]: each sample leaves its own column k out
        q_j = q.expand(len(s), *q.shape).gather(2, j)
        columns = (base * q_j).scatter_add_(2, j, q_j)  # [S, N, A]
        if count + 1 < C:
            columns = p.new_zeros(len(s), N, C).index_copy_(2, active, columns)
        return columns.unbind(0)

    return Scores(count, lambda s: block(s - s % width)[s % width])

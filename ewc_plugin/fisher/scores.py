"""Fisher types, and the score vectors v [N, C] at the logits that each of them squares.

Every Fisher type is data: F = 1/N sum_n sum_s (J_n^T v_ns)^2, where J_n is the Jacobian of sample
n's logits. What pulls the vectors back never asks which type they came from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.outputs import check_not_probabilities

Score = Callable[[Tensor, Batch], Tensor]
"""Any other likelihood: maps (outputs [N, D], batch) to vectors [S, N, D] or, where S = 1, [N, D].
Each is d log p(y | x) / d outputs for one y, times the square root of the weight that y has."""

_BLOCK_ENTRIES = 2**18  # of EXACT's vectors that are made at a time


class FisherType(str, Enum):
    """Which labels the expectation in the Fisher runs over.

    PREDICTED: the model's own argmax. EMPIRICAL: the data's labels. SAMPLED: labels drawn from
    the model's softmax. EXACT: every class, weighted by its probability. BATCHED: Avalanche's
    definition, the square of a mini-batch's mean gradient, kept for parity alone.

    Source: Kirkpatrick et al. 2017; Kunstner et al. 2019 (empirical against exact).
    """

    PREDICTED = "predicted"
    EMPIRICAL = "empirical"
    SAMPLED = "sampled"
    EXACT = "exact"
    BATCHED = "batched"

    @classmethod
    def parse(cls, value: "FisherType | str") -> "FisherType":
        """Looks a type up by its value.

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


def parsed_type(value: "FisherType | str | Score") -> "FisherType | Score":
    """A Fisher type looked up by its value, or the caller's own score."""
    if callable(value):
        return value
    return FisherType.parse(value)


@dataclass(frozen=True)
class Scores:
    """`count` score vectors, each made when it is asked for: with 1,000 classes they are many.

    Attributes:
        count: Number S of vectors.
        vector: Maps s in [0, S) to v_s [N, C].
    """

    count: int
    vector: Callable[[int], Tensor]


class LabelScores:
    """The score vectors of one Fisher type, for any outputs.

    Attributes:
        one_vector: Whether each sample is known to have one vector, before any is made.
    """

    def __init__(
        self,
        fisher_type: "FisherType | Score",
        n_draws: int,
        generator: torch.Generator,
        targets: Callable[[Batch], Tensor],
    ) -> None:
        self.fisher_type, self.n_draws = fisher_type, n_draws
        self.generator, self.targets = generator, targets
        self.one_vector = n_draws == 1 and fisher_type in (
            FisherType.PREDICTED,
            FisherType.EMPIRICAL,
            FisherType.SAMPLED,
        )

    def check_outputs(self, outputs: Tensor) -> None:
        """Raises where these outputs, [N, C], can't be what the scores are of."""
        if isinstance(self.fisher_type, FisherType):
            check_not_probabilities(outputs)

    def vectors(self, batch: Batch, outputs: Tensor) -> Scores:
        """The vectors of a batch, in its order; SAMPLED advances the generator.

        Args:
            batch: N samples.
            outputs: The model's, [N, C].

        Returns:
            The vectors [N, C].

        Raises:
            ValueError: The targets are no class indices of these outputs, or as `score_vectors`
                and `own_vectors`.
        """
        if not isinstance(self.fisher_type, FisherType):
            return own_vectors(outputs, self.fisher_type, batch)
        y = None
        if self.fisher_type is FisherType.EMPIRICAL:
            y = _checked_targets(self.targets(batch), outputs)
        return score_vectors(
            outputs, self.fisher_type, targets=y, n_draws=self.n_draws, generator=self.generator
        )


def _checked_targets(y: Tensor, logits: Tensor) -> Tensor:
    N, C = logits.shape
    if y.shape != (N,) or y.is_floating_point():
        raise ValueError(
            f"`targets` must be class indices [N] int64, got shape {tuple(y.shape)} {y.dtype}."
        )
    if bool((y < 0).any()) or bool((y >= C).any()):
        raise ValueError(
            f"`targets` must be in [0, {C}), the logits' classes, got {int(y.min())} to "
            f"{int(y.max())}."
        )
    return y.long()


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

    Args:
        logits: [N, C], finite or -inf for a class that is masked out.
        fisher_type: Any but BATCHED.
        targets: [N] int64; EMPIRICAL alone reads them.
        n_draws: Draws per sample, SAMPLED alone.
        generator: Draws the labels of SAMPLED; on its own device.

    Returns:
        The vectors, in float32 or the logits' dtype where that is wider.

    Raises:
        ValueError: BATCHED has no score vectors; EMPIRICAL without targets; fewer than 2 classes.

    Source: Kunstner et al. 2019, section 2 (the types); the factor follows from
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
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    match fisher_type:
        case FisherType.PREDICTED:
            predicted = logits.argmax(1)
            return Scores(1, lambda s: _label_scores(p, predicted))
        case FisherType.EMPIRICAL:
            if targets is None:
                raise ValueError("`targets` are needed by fisher_type 'empirical', got None.")
            return Scores(1, lambda s: _label_scores(p, targets))
        case FisherType.SAMPLED:
            return _sampled(p, n_draws, generator)
        case FisherType.EXACT:
            return _exact(p)
        case _:
            raise ValueError(f"`fisher_type` {fisher_type.value!r} has no score vectors.")


def own_vectors(outputs: Tensor, score: Score, batch: Batch) -> Scores:
    """The vectors of a caller's own score.

    Args:
        outputs: [N, D].
        score: The caller's.
        batch: What the outputs came from.

    Returns:
        The vectors.

    Raises:
        ValueError: Their shape does not fit the outputs, or one is not finite.
    """
    vectors = score(outputs.detach(), batch).detach()
    if vectors.dim() == 2:
        vectors = vectors[None]
    if vectors.dim() != 3 or vectors.shape[1:] != outputs.shape:
        raise ValueError(
            f"`fisher_type`, a score, must give [S, N, D] or [N, D] for outputs "
            f"{tuple(outputs.shape)}, got {tuple(vectors.shape)}."
        )
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError("`fisher_type`, a score, gave a vector that is not finite.")
    return Scores(len(vectors), lambda s: vectors[s])


def _label_scores(p: Tensor, y: Tensor) -> Tensor:
    """onehot(y) - p [N, C], its entry at y summed from the others: 1 - p cancels near p = 1."""
    v = p.neg().scatter_(1, y[:, None], 0.0)
    return v.scatter_(1, y[:, None], -v.sum(1, keepdim=True))


def _sampled(p: Tensor, n_draws: int, generator: torch.Generator | None) -> Scores:
    """Scores of drawn labels; equal draws of one sample share a vector."""
    device = p.device if generator is None else generator.device
    # One uniform number per draw in sample order: the labels do not depend on the batches.
    # Float32 below 1 times a float64 total stays below that total, so no masked class is drawn.
    u = torch.rand(len(p), n_draws, generator=generator, device=device, dtype=torch.float32)
    u = u.to(p.device, torch.float64)
    cdf = p.double().cumsum(1)
    y = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)  # [N, n_draws]
    counts = torch.zeros_like(p).scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))
    n_distinct = int((counts > 0).sum(1).max())
    share, label = (counts / n_draws).topk(n_distinct, dim=1)
    return Scores(
        n_distinct, lambda s: share[:, s, None].sqrt() * _label_scores(p, label[:, s].contiguous())
    )


def _exact(p: Tensor) -> Scores:
    """Columns of L = D Q, Q an orthonormal basis of the complement of q = sqrt(p)."""
    # Q is the reflection H = I - w w^T / (1 + q_k), w = q + e_k, k = argmax, less its column k.
    # No entry cancels, so saturated outputs keep their digits.
    N, C = p.shape
    active = (p > 0).any(0).nonzero().squeeze(1)  # [A]
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

"""The score vectors of a batch: what a Fisher type makes of its outputs and its labels."""

from collections.abc import Callable
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

from ewc_plugin.batches import Batch, n_samples
from ewc_plugin.fisher.dense import (
    counted_positions,
    dense_vectors,
    find_class_dim,
)
from ewc_plugin.fisher.outputs import check_not_probabilities, default_targets, found_targets
from ewc_plugin.fisher.scores import (
    AT_DATA_LABELS,
    FisherType,
    Score,
    Scores,
    own_vectors,
    score_vectors,
)

IGNORE_INDEX = -100  # torch's default

Targets = Callable[[Batch], Tensor | None]


class LabelScores:
    """The score vectors of one Fisher type, for any outputs.

    Args:
        fisher_type: Any that is not batched.
        n_draws: For SAMPLED.
        generator: For SAMPLED.
        targets: Maps a batch to its labels; None: `batch[1]`, or "labels" of a mapping.
        class_dim: Axis of the classes in dense outputs; None: what the labels' shape says.
        ignore_index: Label of samples and positions that have no score.
        positions: Maps a batch to the positions that have one, or to None: all.

    Attributes:
        one_vector: Whether each sample is known to have one vector, before any is made.
    """

    def __init__(
        self,
        fisher_type: FisherType | Score,
        n_draws: int,
        generator: torch.Generator,
        targets: Targets | None = None,
        *,
        class_dim: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        positions: Targets,
    ) -> None:
        self.fisher_type, self.n_draws, self.generator = fisher_type, n_draws, generator
        self.targets, self.positions = targets or found_targets, positions
        self.ignore_index = ignore_index
        self._class_dim = class_dim
        self.one_vector = n_draws == 1 and isinstance(fisher_type, FisherType)
        self.one_vector &= fisher_type is not FisherType.EXACT

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise where these outputs, [N, C], can't be what the scores are of."""
        if isinstance(self.fisher_type, FisherType) and outputs.dim() == 2:
            check_not_probabilities(outputs)
            if self._class_dim not in (None, 1, -1):
                raise ValueError(
                    f"`class_dim` is {self._class_dim}, but the outputs are logits [N, C] of shape "
                    f"{tuple(outputs.shape)}, whose classes are along axis 1. Leave it out."
                )

    def vectors(self, batch: Batch, outputs: Tensor) -> Scores:
        """The vectors of a batch, in its order; SAMPLED advances the generator.

        Args:
            batch: N samples.
            outputs: The model's, [N, C], or [N, ...] with the classes along one axis.

        Returns:
            The vectors, of the outputs' shape.

        Raises:
            ValueError: The targets are no class indices of these outputs, or as `score_vectors`,
                `dense_vectors` and `own_vectors`.
        """
        kind = self.fisher_type
        if not isinstance(kind, FisherType):
            return own_vectors(outputs, kind, batch)
        if outputs.dim() < 2:
            raise ValueError(
                f"`model` must return logits [N, C], got shape {tuple(outputs.shape)}. Give a "
                "binary head two logits; for a log-likelihood per sample use "
                "fisher_type=log_likelihood_score."
            )
        if outputs.dim() > 2:
            return self._dense(kind, batch, outputs)
        if kind not in AT_DATA_LABELS:
            return score_vectors(outputs, kind, n_draws=self.n_draws, generator=self.generator)
        y = self.sample_labels(batch)
        self.check_labels(y, outputs)
        counted = y != self.ignore_index
        of_all = score_vectors(outputs, kind, targets=y.long().where(counted, 0))
        if bool(counted.all()):
            return of_all
        n_counted = int(counted.sum())
        return Scores(1, lambda s: of_all.vector(s) * counted[:, None], n_counted)

    def _dense(self, kind: FisherType, batch: Batch, outputs: Tensor) -> Scores:
        y = self._needed_labels(batch) if kind in AT_DATA_LABELS else self.labels(batch)
        if self.targets is found_targets:
            _check_one_candidate(batch, y)
        mask = self.positions(batch)
        if self._class_dim is None:  # once: another batch may have as many positions as classes
            soft = y is not None and y.is_floating_point()  # rows of probabilities: no positions
            known = None if y is None or soft else y.shape
            self._class_dim = find_class_dim(outputs.shape, known, None)
            check_not_probabilities(outputs.movedim(self._class_dim, -1).flatten(0, -2))
        axis = find_class_dim(outputs.shape, None, self._class_dim)
        shape = outputs.shape[:axis] + outputs.shape[axis + 1 :]
        counted = counted_positions(shape, y, self.ignore_index, mask)
        if kind in AT_DATA_LABELS:
            if y is None:
                _refuse_labels(y, str(list(shape)))
            assert counted is not None
            self.check_labels(y[counted], outputs.movedim(axis, -1)[counted])
        return dense_vectors(
            outputs, axis, kind, counted, y, n_draws=self.n_draws, generator=self.generator
        )

    def _needed_labels(self, batch: Batch) -> Tensor | None:
        """The same; raise where a batch of the default form has none."""
        needed = default_targets if self.targets is found_targets else self.targets
        return wide(needed(batch))

    def labels(self, batch: Batch) -> Tensor | None:
        """The data's labels, in int64 if they are integers; None where there are none."""
        return wide(self.targets(batch))

    def sample_labels(self, batch: Batch) -> Tensor:
        """The data's labels, one per sample.

        Args:
            batch: N samples.

        Returns:
            Integers [N].

        Raises:
            ValueError: It has none.
        """
        y = self._needed_labels(batch)
        if not is_index(y, n_samples(batch)):
            _refuse_labels(y, "[N]")
        return y

    def check_labels(self, y: Tensor, logits: Tensor) -> None:
        """Raise where a label is neither a class that the sample can have nor ignored.

        Args:
            y: Labels [N].
            logits: [N, C].

        Raises:
            ValueError: A label is neither.
        """
        if y.is_floating_point() or y.is_complex():
            _refuse_labels(y, "[N]")
        C, counted = logits.size(1), y != self.ignore_index
        y = y[counted]
        if bool(((y < 0) | (y >= C)).any()):
            raise ValueError(
                f"`targets` must be in [0, {C}), the logits' classes, or {self.ignore_index} for "
                f"what is ignored, got {int(y.min())} to {int(y.max())}."
            )
        chosen = logits.detach()[counted].gather(1, y.long()[:, None])
        if bool((chosen == -torch.inf).any()):
            raise ValueError(
                "`targets` has a label whose logit is -inf, a class that the sample cannot have: "
                "its log-likelihood is -inf. Leave such samples out, give them the label "
                f"{self.ignore_index}, or use a `fisher_type` without the data's labels."
            )


def wide(y: Tensor | None) -> Tensor | None:
    """Integers as int64: in uint8, -100 equals 156."""
    if isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex()):
        return y.long()
    return y


def is_index(y: Tensor | None, N: int) -> TypeGuard[Tensor]:
    """Whether y can be the class indices of N samples."""
    return isinstance(y, Tensor) and y.shape == (N,) and not y.is_floating_point()


def _refuse_labels(y: Tensor | None, shape: str) -> NoReturn:
    got = "None" if y is None else f"shape {tuple(y.shape)} {y.dtype}"
    raise ValueError(f"`targets` must be class indices {shape} int64, got {got}.")


def _check_one_candidate(batch: Batch, y: Tensor | None) -> None:
    """Raise where another item of a tuple may be the labels as well as the second: a mask's may."""
    if y is None or not isinstance(batch, tuple | list):
        return
    for i, other in enumerate(batch[2:], 2):
        whole = isinstance(other, Tensor) and not other.is_floating_point()
        if whole and other.shape == y.shape and other.dtype != torch.bool:
            raise ValueError(
                f"`targets` is needed: items 1 and {i} of a batch both have the shape "
                f"{tuple(y.shape)} of labels, so either may be a mask. Pass "
                f"targets=lambda batch: batch[{i}], or the one that it is."
            )

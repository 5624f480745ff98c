"""Continual-learning metrics from the accuracy matrix R[i, j]: trained through i, tested on j.

Row 0 of the array is the untrained model, row i + 1 the model after experience i. Accuracies are
fractions in 0-1. A metric that a run does not define (one experience; joint training, which has no
rows in between) is NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]  # [T + 1, T]

METRICS = (
    "average_accuracy",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "forgetting_avalanche",
    "learning_accuracy",
)


def continual_metrics(accuracy: Matrix) -> dict[str, float]:
    """All metrics of one run, by name.

    With T experiences, R[-1] the untrained model and R[i] the model after experience i:

    - average accuracy: mean_j R[T-1, j];
    - backward transfer: mean_{j<T-1} (R[T-1, j] - R[j, j]);
    - forward transfer: mean_{j>0} (R[j-1, j] - R[-1, j]);
    - forgetting: mean_{j<T-1} (max_{0<=i<T-1} R[i, j] - R[T-1, j]);
    - forgetting as Avalanche's metric has it: mean_{j<T-1} (R[j, j] - R[T-1, j]);
    - learning accuracy: mean_j R[j, j].

    Args:
        accuracy: R with the untrained row first, [T + 1, T]; NaN where nothing was measured.

    Returns:
        One float per name in `METRICS`; NaN where undefined.

    Raises:
        ValueError: The array is not [T + 1, T].

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840 (average accuracy and the transfers);
    `avalanche.evaluation.metrics.forgetting_bwt` (the last definition of forgetting).

    Example:
        >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]])
        >>> {name: round(value, 3) for name, value in continual_metrics(R).items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'average_accuracy': 0.75, 'backward_transfer': -0.2, 'forward_transfer': 0.1,
         'forgetting': 0.2, 'forgetting_avalanche': 0.2, 'learning_accuracy': 0.85}
    """
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] + 1:
        raise ValueError(f"`accuracy` must have the shape [T + 1, T], got {accuracy.shape}.")
    untrained, trained = accuracy[0], accuracy[1:]
    learned, last = np.diagonal(trained), trained[-1]
    drop = (learned - last)[:-1]
    best_before = trained[:-1].max(axis=0, initial=-np.inf)  # NaN if any row is missing
    return {
        "average_accuracy": float(last.mean()),
        "backward_transfer": _mean(-drop),
        "forward_transfer": _mean(np.diagonal(trained, offset=1) - untrained[1:]),
        "forgetting": _mean((best_before - last)[:-1]),
        "forgetting_avalanche": _mean(drop),
        "learning_accuracy": _mean(learned),
    }


def accuracy_matrix(train_exp: ArrayLike, eval_exp: ArrayLike, accuracy: ArrayLike) -> Matrix:
    """R from the rows of `accuracy.csv` of one run.

    Args:
        train_exp: Experience trained through, by row; -1 is the untrained model.
        eval_exp: Experience tested on.
        accuracy: Fraction in 0-1.

    Returns:
        R with the untrained row first, [T + 1, T]; NaN where there is no row.
    """
    i, j = np.asarray(train_exp, int), np.asarray(eval_exp, int)
    n = int(j.max(initial=-1)) + 1
    matrix = np.full((n + 1, n), np.nan)
    matrix[i + 1, j] = np.asarray(accuracy, float)
    return matrix


def seen_accuracy(accuracy: Matrix) -> Matrix:
    """Mean accuracy over the experiences seen so far, [T]: mean_{j<=i} R[i, j] for each i."""
    trained = accuracy[1:]
    return np.array([trained[i, : i + 1].mean() for i in range(len(trained))])


def _mean(values: Matrix) -> float:
    return float(values.mean()) if values.size else float("nan")

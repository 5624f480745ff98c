"""The metrics against hand-computed matrices and against Avalanche's own."""

import math

import numpy as np
import pytest

from experiments.results.metrics import METRICS, continual_metrics, seen_accuracy

R = np.array([
    [0.10, 0.12, 0.08],  # untrained
    [0.90, 0.20, 0.10],
    [0.95, 0.80, 0.30],
    [0.60, 0.70, 0.85],
])


def test_metrics_of_a_matrix_computed_by_hand():
    assert continual_metrics(R) == pytest.approx(
        {
            "average_accuracy": (0.60 + 0.70 + 0.85) / 3,
            "backward_transfer": ((0.60 - 0.90) + (0.70 - 0.80)) / 2,
            "forward_transfer": ((0.20 - 0.12) + (0.30 - 0.08)) / 2,
            "forgetting": ((0.95 - 0.60) + (0.80 - 0.70)) / 2,
            "forgetting_avalanche": ((0.90 - 0.60) + (0.80 - 0.70)) / 2,
            "learning_accuracy": (0.90 + 0.80 + 0.85) / 3,
        },
        abs=1e-15,
    )


def test_the_best_accuracy_may_come_before_the_experience_was_trained_on():
    lucky = np.array([[0.1, 0.1, 0.1], [0.9, 0.99, 0.1], [0.9, 0.8, 0.1], [0.9, 0.8, 0.9]])
    assert continual_metrics(lucky)["forgetting"] == pytest.approx((0.0 + 0.19) / 2)
    assert continual_metrics(lucky)["forgetting_avalanche"] == 0.0


def test_joint_training_defines_the_average_accuracy_only():
    joint = R.copy()
    joint[1:-1] = np.nan
    metrics = continual_metrics(joint)
    assert metrics.pop("average_accuracy") == pytest.approx(2.15 / 3)
    assert metrics.pop("forward_transfer") != 0  # NaN as well; see below
    assert all(math.isnan(value) for value in metrics.values())


def test_one_experience_has_no_transfer_and_no_forgetting():
    metrics = continual_metrics(np.array([[0.1], [0.9]]))
    defined = {name for name in METRICS if not math.isnan(metrics[name])}
    assert defined == {"average_accuracy", "learning_accuracy"}


def test_a_matrix_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[T \+ 1, T\], got \(3, 3\)"):
        continual_metrics(np.zeros((3, 3)))


def test_seen_accuracy_averages_over_what_was_trained_on():
    assert seen_accuracy(R) == pytest.approx([0.90, 1.75 / 2, 2.15 / 3])

"""An own benchmark: the number of its experiences and its scenario, which are settings."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.settings.own import OwnFunction


@dataclass(frozen=True)
class OwnBenchmark:
    """What an own function returned.

    Attributes:
        benchmark: Avalanche's object.
        train: The experiences to train on; of an online stream, the parts of each original one.
        test: As many experiences to evaluate on.
        scenario: `task` with several task labels; `domain` if all have the same classes; `class`.
        n_classes: The largest class, plus one.
    """

    benchmark: Any
    train: Sequence[Sequence[Any]]
    test: Sequence[Any]
    scenario: str
    n_classes: int


@functools.lru_cache(maxsize=1)
def own_benchmark(
    function: OwnFunction, seed: int, n_experiences: int, validation: bool
) -> OwnBenchmark:
    """Call a function for a benchmark; the last result is kept.

    Args:
        function: Of the user's.
        seed: Of the run. The global random numbers begin with it too.
        n_experiences: Which the function may have an argument for.
        validation: Whether to test on validation data; the function must have an argument for it.

    Returns:
        The benchmark, checked.

    Raises:
        ValueError: It is none, or not one that the runs can be made on.
    """
    if validation and "validation" not in function.parameters:
        raise function.error("have an argument `validation`, to evaluate on validation data")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    made = function(seed=seed, n_experiences=n_experiences, validation=validation)
    train_stream = getattr(made, "train_stream", getattr(made, "train_online_stream", None))
    test_stream = getattr(made, "test_stream", None)
    if train_stream is None or test_stream is None:
        rule = "return an Avalanche benchmark with a `train_stream` and a `test_stream`"
        raise function.error(rule, f", got {type(made).__name__}")
    try:
        parts, test = list(train_stream), list(test_stream)
        origins = itertools.groupby(parts, lambda e: id(getattr(e, "origin_experience", e)))
        train = [list(group) for _, group in origins]
        classes = [_classes(experience) for experience in (*parts, *test)]
        labels = {label for experience in (*parts, *test) for label in _task_labels(experience)}
    except Exception as error:  # the user's code may raise any
        rule = "return experiences whose `dataset` has classes as its `targets`"
        raise function.error(rule, error) from error
    n = len(test)
    if len(train) != n or n == 0:
        got = f", got {len(train)} and {n}"
        raise function.error("return as many experiences to train on as to test on", got)
    if "n_experiences" in function.parameters and n != n_experiences:
        rule = f"return the {n_experiences} experiences that --experiences asks for"
        raise function.error(rule, f", got {n}")
    same = all(found == classes[-1] for found in classes[len(parts) :])
    scenario = "task" if len(labels) > 1 else "domain" if same else "class"
    return OwnBenchmark(made, train, test, scenario, 1 + max(map(max, classes)))


@functools.cache
def size_and_scenario(
    function: OwnFunction, seed: int, n_experiences: int, validation: bool
) -> tuple[int, str]:
    """The number of experiences and the scenario of what `own_benchmark` returns."""
    made = own_benchmark(function, seed, n_experiences, validation)
    return len(made.test), made.scenario


def _task_labels(experience: Any) -> list[int]:
    """The task labels of an experience; none where its stream has none."""
    of_samples = torch.as_tensor(list(getattr(experience.dataset, "targets_task_labels", ())))
    return [*getattr(experience, "task_labels", ()), *of_samples.unique().tolist()]


def _classes(experience: Any) -> frozenset[int]:
    """The classes of an experience, of which there is at least one."""
    found = torch.as_tensor(list(experience.dataset.targets)).unique()
    if found.is_floating_point() or len(found) == 0 or found.min() < 0:
        raise ValueError(f"targets are {found.tolist()[:3]}")
    return frozenset(found.tolist())

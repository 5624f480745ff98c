"""What an unset setting of a run stands for: tables hold the value that was used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import combinations
from typing import Any

import pandas as pd

from experiments.settings.run import WITH_FISHER, RunSettings, hash_of, takes_mini_batches

UNSET = {
    "normalize": "none",
    "penalty_step": "gradient",
    "importance_order": "dataset",  # in which Avalanche's benchmarks are sorted by class
    "optimizer_state": "kept",
    "pixels": "normalized",
    "loss_classes": "all",
    "head": "linear",
}
_NAMES = tuple(one.name for one in fields(RunSettings))


def used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the value of each that is unset and has an effect.

    Args:
        settings: Fields of `RunSettings` by name, among other columns of a row or not.

    Returns:
        All of it; what has no effect with the method, such as lambda with naive, stays unset.
    """
    batched = takes_mini_batches(settings.get("method", ""), settings.get("fisher_type"))
    applies = dict.fromkeys((*UNSET, "eval_every"), True)
    applies |= dict.fromkeys(("normalize", "penalty_step"), settings.get("method") in WITH_FISHER)
    applies |= dict.fromkeys(("importance_order", "importance_batch"), batched)
    filled = {k: v for k, v in {**UNSET, **_numbers(settings)}.items() if applies[k]}
    return {**settings, **{k: v for k, v in filled.items() if pd.isna(settings.get(k))}}


def given(row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a row of a table, as `RunSettings` has them: None where they are unset.

    Args:
        row: Of `used`, or with empty settings in the place of their values, as old tables have it.
    """
    values = {name: row.get(name) for name in _NAMES}
    values = {k: None if pd.isna(v) or v == UNSET.get(k) else v for k, v in values.items()}
    # Such a number can have been given, or unset; which of them, the hash tells.
    doubtful = [name for name, value in _numbers(values).items() if values[name] == value]
    for n in range(len(doubtful), -1, -1):
        for names in combinations(doubtful, n):
            unset = {**values, **dict.fromkeys(names)}
            if row.get("config_hash") in (None, hash_of(unset)):
                return unset
    return values


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"importance_batch": settings.get("batch_size"), "eval_every": 1}

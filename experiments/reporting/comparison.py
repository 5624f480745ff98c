"""Checks against Avalanche's built-in EWC.

The same numbers where the definitions agree (`parity_checks`); paired differences of results where
they don't.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.results import schemas, tables
from experiments.results.statistics import paired_differences
from experiments.settings.run import STREAM


def parity_table(runs: pd.DataFrame, numerical: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """All checks of a job.

    Args:
        runs: Rows of `runs.csv`.
        numerical: Rows of `parity_checks.numerical_checks`.

    Returns:
        Rows of `parity.csv`.
    """
    order = sorted(numerical, key=lambda row: [row[name] for name in STREAM])
    return tables.frame([*order, *paired_differences(runs)], schemas.PARITY)

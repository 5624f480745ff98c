"""Checks against Avalanche's built-in EWC.

The same numbers where the definitions agree (`parity_checks`); paired differences of results where
they don't.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from experiments.results import tables
from experiments.settings.run import PENALISED, STREAM, Job, RunSettings

COMPARED = ("average_accuracy", "forgetting")
SETTINGS_OF_A_PAIR = [
    name
    for name in tables.RUNS.columns
    if name in tables.SETTING_NAMES and name not in ("method", "fisher_type", "ewc_lambda")
]


def checked_cells(job: Job, cells: Sequence[RunSettings]) -> list[RunSettings]:
    """One cell per benchmark, dataset and scenario, if the job compares both EWC methods."""
    if not (job.compares and {cell.method for cell in cells} >= set(PENALISED)):
        return []
    return list({tuple(getattr(cell, name) for name in STREAM): cell for cell in cells}.values())


def parity_table(runs: pd.DataFrame, numerical: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """All checks of a job.

    Args:
        runs: Rows of `runs.csv`.
        numerical: Rows of `parity_checks.numerical_checks`.

    Returns:
        Rows of `parity.csv`.
    """
    order = sorted(numerical, key=lambda row: [row[name] for name in STREAM])
    return tables.frame([*order, *paired_differences(runs)], tables.PARITY)


def paired_differences(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Ours less the built-in, seed by seed, with a 95 % interval and an equivalence verdict.

    Each of our cells is compared with each of the built-in's of the same settings; with several
    lambdas each, that is every pair.
    """
    done = runs[runs["status"] == "ok"]
    ours, theirs = (done[done["method"] == m] for m in ("ewc", "avalanche-ewc"))
    pairs = ours.merge(
        theirs, on=[n for n in SETTINGS_OF_A_PAIR if n in done], suffixes=("", "_builtin")
    )
    columns = [*STREAM, "config_hash", "config_hash_builtin"]
    for key, pair in pairs.groupby(columns, sort=False):
        for metric in COMPARED:
            a, b = (pair[c].to_numpy(float) for c in (metric, f"{metric}_builtin"))
            difference = tables.interval(a - b)
            higher_is_better = a - b if metric == "average_accuracy" else b - a
            first = pair.iloc[0]
            yield {
                **dict(zip(STREAM, key, strict=False)),
                "check": f"paired seeds, {first['fisher_type']} λ = {first['ewc_lambda']:g} "
                f"against built-in λ = {first['ewc_lambda_builtin']:g}",
                "quantity": metric,
                "n": difference["n"],
                "ours": a.mean(),
                "builtin": b.mean(),
                "difference": difference["mean"],
                "ci_low": difference["ci_low"],
                "ci_high": difference["ci_high"],
                "tolerance": tables.MARGIN,
                "verdict": tables.equivalence(higher_is_better),
            }

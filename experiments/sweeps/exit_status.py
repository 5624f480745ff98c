"""The runs of this command that did not end well, which decide its exit status."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

SAME_GRID = ["benchmark", "dataset", "scenario", "method"]

_unsuccessful: list[tuple[str, str, str]] = []  # run id, status, reason
_n_runs = 0


def note(runs: pd.DataFrame, wanted: Collection[str] = ()) -> None:
    """Count the runs of a job.

    A run that diverged is no surprise where the job tries several lambdas or learning rates.

    Args:
        runs: The job's rows of `runs.csv`.
        wanted: Ids of runs that should be among them.
    """
    global _n_runs
    gone = sorted(set(wanted) - set(runs["run_id"]))
    _n_runs += len(runs) + len(gone)
    varied = runs.groupby(SAME_GRID)[["ewc_lambda", "learning_rate"]].nunique()
    expected = bool((varied > 1).any(axis=None))
    bad = runs[runs["status"].eq("failed") | (runs["status"].eq("diverged") & (not expected))]
    _unsuccessful.extend(zip(bad["run_id"], bad["status"], bad["reason"], strict=True))
    _unsuccessful.extend((run_id, "gone", "its file was taken from the folder") for run_id in gone)


def last_line() -> str:
    """Return how many runs failed, and the first one's reason; "" if none did. Reset the count."""
    global _n_runs
    bad, n = list(_unsuccessful), _n_runs
    _unsuccessful.clear()
    _n_runs = 0
    if not bad:
        return ""
    run_id, status, reason = bad[0]
    return f"error: {len(bad)} of {n} runs did not end well; {run_id} {status}: {reason}"

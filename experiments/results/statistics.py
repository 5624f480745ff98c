"""Means, intervals, paired differences and verdicts over the seeds of a cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.results import schemas
from experiments.results.schemas import CELL, SETTING_NAMES, SUMMARISED, SUMMARY
from experiments.results.tables import frame
from experiments.settings.run import STREAM

CONFIDENCE = 0.95
MARGIN = 0.01  # of the equivalence tests, in accuracy; fixed before any run


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample standard deviation and 95 % Student interval over the seeds of each cell.

    Args:
        runs: Rows of `runs.csv`; only those with status `ok` count.

    Returns:
        One row per cell and metric. With one seed, spread and interval are NaN.
    """
    done = runs[runs["status"] == "ok"]
    rows = []
    for key, cell in done.groupby(CELL, dropna=False, sort=False):
        for metric in SUMMARISED:
            values = cell[metric].dropna().to_numpy(dtype=float)
            if values.size:
                rows.append({
                    **dict(zip(CELL, key, strict=True)),
                    "metric": metric,
                    **interval(values),
                })
    return frame(rows, SUMMARY)


def distinctions(runs: pd.DataFrame) -> dict[str, str]:
    """What tells the cells of a grid apart besides their label, by config hash.

    Args:
        runs: Rows of `runs.csv`.

    Returns:
        Such as `epochs 4, mode online`: the settings in which a cell differs from others of its
        benchmark, dataset, scenario and method; "" where there are none.
    """
    told = {}
    for _, alike in runs.groupby(CELL[:4], sort=False):
        varied = varied_settings(alike)
        for cell in alike.drop_duplicates("config_hash").to_dict("records"):
            values = [f"{n.replace('_', ' ')} {_shown(cell[n])}" for n in varied]
            told[cell["config_hash"]] = ", ".join(values)
    return told


def _shown(value: Any) -> str:
    if pd.isna(value):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def varied_settings(runs: pd.DataFrame) -> list[str]:
    """The settings that tell cells of one method apart, besides Fisher type and lambda."""
    cells = runs.drop_duplicates("config_hash")
    names = [n for n in SETTING_NAMES if n in runs and n not in (*CELL, "seed")]
    by = cells.groupby(CELL[:4])
    return [name for name in names if (by[name].nunique(dropna=False) > 1).any()]


def interval(values: np.ndarray[Any, Any], confidence: float = CONFIDENCE) -> dict[str, float]:
    """n, mean, sample standard deviation and Student's interval for the mean.

    Args:
        values: One number per seed, [n], n >= 1.
        confidence: Coverage, 0-1.

    Returns:
        `n`, `mean`, `std`, `ci_low`, `ci_high`, in the values' unit.
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"n": n, "mean": mean, "std": np.nan, "ci_low": np.nan, "ci_high": np.nan}
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / np.sqrt(n)
    return {"n": n, "mean": mean, "std": std, "ci_low": mean - half, "ci_high": mean + half}


def equivalence(differences: np.ndarray[Any, Any], margin: float = MARGIN) -> str:
    """What paired differences (ours - theirs) say, tested at 5 %.

    Equivalent: both one-sided tests reject |mean| >= margin, that is, the 90 % interval lies inside
    the margin. Otherwise better or worse, if the 95 % interval excludes zero. Else undecided.

    Args:
        differences: One per seed, [n]; higher is better for ours.
        margin: Half-width of the zone that counts as equal, in the differences' unit.

    Returns:
        `equivalent`, `better`, `worse` or `undecided`.

    Source: the two one-sided tests of Schuirmann 1987, as the documentation of SAS's TTEST states
    them.
    """
    inner, outer = interval(differences, 2 * CONFIDENCE - 1), interval(differences)
    if -margin < inner["ci_low"] and inner["ci_high"] < margin:
        return "equivalent"
    if outer["ci_low"] > 0:
        return "better"
    return "worse" if outer["ci_high"] < 0 else "undecided"


COMPARED = ("average_accuracy", "forgetting")


SETTINGS_OF_A_PAIR = [
    name
    for name in schemas.RUNS.columns
    if name in schemas.SETTING_NAMES and name not in ("method", "fisher_type", "ewc_lambda")
]


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
            difference = interval(a - b)
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
                "tolerance": MARGIN,
                "verdict": equivalence(higher_is_better),
            }


def chosen_lambdas(summary: pd.DataFrame) -> pd.DataFrame:
    """Per dataset, benchmark, scenario and method the lambda of the best mean average accuracy.

    Args:
        summary: Rows of the `summary.csv` of a tuning run, measured on validation data.

    Returns:
        The chosen cells' rows of the metric `average_accuracy`; of equals the smallest lambda.
    """
    rows = summary[(summary["metric"] == "average_accuracy") & summary["ewc_lambda"].notna()]
    rows = rows.sort_values(["mean", "ewc_lambda"], ascending=[False, True])
    return rows.groupby(["benchmark", "dataset", "scenario", "method"], as_index=False).first()


LOWER_IS_BETTER = ("forgetting",)


UPPER_BOUND = "joint"  # sees all data at once: nothing that the others could be expected to beat
SAME_TEST = [*STREAM, "n_experiences", "validation"]  # what makes accuracies comparable


def best_cells(runs: pd.DataFrame, metric: str) -> set[str]:
    """The cells that are best on their benchmark by more than their seeds explain.

    Among the cells of one stream, joint training left out, the one with the best mean is best if
    the 95 % interval of its difference from every other excludes zero: Student's interval of the
    paired differences where both have the same seeds, Welch's where they don't. Where one of them
    has a single seed there is no interval, and nothing is best; nor where there is one cell only.
    The intervals are not corrected for the number of cells.

    Args:
        runs: Rows of `runs.csv`; only those with status `ok` count.
        metric: A column of it. Of `forgetting` less is better.

    Returns:
        Their `config_hash`.

    Source: Welch 1947 as `scipy.stats.ttest_ind` has it.
    """
    done = runs[(runs["status"] == "ok") & (runs["method"] != UPPER_BOUND)]
    done = done[done[metric].notna()]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    best = set()
    for _, group in done.groupby(SAME_TEST):
        cells = {
            str(key): sign * cell.set_index("seed")[metric]
            for key, cell in group.groupby("config_hash")
        }
        first, *others = sorted(cells, key=lambda key: -cells[key].mean())
        if others and all(_exceeds(cells[first], cells[other]) for other in others):
            best.add(first)
    return best


def _exceeds(a: pd.Series[float], b: pd.Series[float]) -> bool:
    """Whether the 95 % interval of mean(a) - mean(b), both by seed, lies above zero."""
    if min(len(a), len(b)) < 2:
        return False
    if set(a.index) == set(b.index):
        return interval((a - b).to_numpy(float))["ci_low"] > 0
    if a.std() == b.std() == 0:  # no spread: Welch's statistic is not defined
        return bool(a.mean() > b.mean())
    welch: Any = stats.ttest_ind(a, b, equal_var=False)
    return bool(welch.confidence_interval(CONFIDENCE).low > 0)


def by_lambda(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean and 95 % interval of `metric` per lambda, and how many of the runs diverged.

    Args:
        runs: Rows of `runs.csv` that differ in lambda and seed alone.
        metric: A column of theirs.

    Returns:
        Columns `ewc_lambda`, `n` (complete runs), `diverged`, `mean`, `std`, `ci_low`, `ci_high`;
        NaN where no run is complete.
    """
    rows = []
    for ewc_lambda, group in runs.groupby("ewc_lambda", dropna=False):
        done = group.loc[group["status"] == "ok", metric].to_numpy(dtype=float)
        nothing = {"n": 0} | dict.fromkeys(("mean", "std", "ci_low", "ci_high"), np.nan)
        rows.append({
            "ewc_lambda": ewc_lambda,
            "diverged": int((group["status"] == "diverged").sum()),
            **(interval(done) if len(done) else nothing),
        })
    return pd.DataFrame(rows)

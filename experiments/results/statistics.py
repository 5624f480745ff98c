"""Means, intervals, paired differences and verdicts over the seeds of a cell."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.results.provenance import MEASUREMENT, provenance_of
from experiments.results.schemas import (
    CELL,
    COMPARED,
    COMPARISONS,
    METHOD_SETTINGS,
    SETTING_NAMES,
    SHARED_SETTINGS,
    SUMMARISED,
    SUMMARY,
    UNITS,
)
from experiments.results.tables import frame
from experiments.settings.run import STREAM
from experiments.settings.unset import given

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
    rows: list[dict[str, Any]] = []
    for _, cell in done.groupby(CELL, dropna=False, sort=False):
        settings = {name: cell[name].iloc[0] for name in SUMMARY.columns if name in cell}
        for metric in SUMMARISED:
            values = cell[metric].dropna().to_numpy(dtype=float)
            if values.size:
                rows.append({
                    **settings,
                    "metric": metric,
                    "unit": UNITS[metric],
                    **interval(values),
                    **provenance_of(cell),
                })
    return frame(rows, SUMMARY)


def as_given(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs.csv` whose settings are empty where they were unset."""
    return runs.assign(**pd.DataFrame(map(given, runs.to_dict("records")), runs.index))


def varied_settings(runs: pd.DataFrame) -> list[str]:
    """The settings that tell cells of one method apart, besides those that every label names."""
    cells = as_given(runs.drop_duplicates("config_hash"))
    names = [n for n in SETTING_NAMES if n in runs and n not in (*CELL, "seed", "normalize")]

    def varies(name: str) -> bool:
        # A file's hash tells nothing that its name does not, but for another version of it.
        same = [*CELL[:4], "model"] if name == "model_sha256" else CELL[:4]
        return bool((cells.groupby(same)[name].nunique(dropna=False) > 1).any())

    return [name for name in names if varies(name)]


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


def differs(differences: np.ndarray[Any, Any]) -> str:
    """Whether the 95 % interval of paired differences excludes zero.

    Args:
        differences: One per seed, [n].

    Returns:
        `yes` or `no`; `unknown` for one seed.
    """
    found = interval(differences)
    if np.isnan(found["ci_low"]):
        return "unknown"
    return "yes" if found["ci_low"] > 0 or found["ci_high"] < 0 else "no"


def within_margin(differences: np.ndarray[Any, Any], margin: float = MARGIN) -> str:
    """Whether paired differences are smaller than the margin, tested at 5 %.

    Both one-sided tests reject |mean| >= margin, that is, the 90 % interval lies inside the margin.

    Args:
        differences: One per seed, [n].
        margin: Half-width of the zone that counts as equal, in the differences' unit.

    Returns:
        `yes` or `no`; `unknown` for one seed.

    Source: the two one-sided tests of Schuirmann 1987, as the documentation of SAS's TTEST states
    them.
    """
    found = interval(differences, 2 * CONFIDENCE - 1)
    if np.isnan(found["ci_low"]):
        return "unknown"
    return "yes" if -margin < found["ci_low"] and found["ci_high"] < margin else "no"


def paired_differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Differences between methods, seed by seed, with their 95 % intervals.

    Our EWC less every other method but joint training, and every other less Naive, where the
    settings that both have are the same. With several lambdas each, that is every pair. Of a
    logger's file, whose names may mean anything, every cell less each that comes before it.

    Args:
        runs: Rows of `runs.csv`; only those with status `ok` count.

    Returns:
        Rows of `comparisons.csv`.
    """
    done = runs[runs["status"] == "ok"]
    if is_logged(done):
        cells = [cell for _, cell in done.groupby("config_hash", sort=False)]
        cells.sort(key=lambda cell: cell["method"].iloc[0].casefold() != "naive")
        found = [row for a, b in itertools.combinations(cells, 2) for row in _pair(b, a)]
        return pd.DataFrame(found, columns=list(COMPARISONS.columns))  # without settings
    done = done[~done["method"].isin([UPPER_BOUND])]
    others = [m for m in done["method"].unique() if m not in ("ewc", "naive")]
    done = done.sort_values(["fisher_type", "normalize", "ewc_lambda"], kind="stable")
    pairs = [("ewc", other) for other in [*others, "naive"]] + [(m, "naive") for m in others]
    rows = [row for pair in pairs for row in _pair(*(done[done["method"] == m] for m in pair))]
    return frame(rows, COMPARISONS).sort_values(list(STREAM), kind="stable", ignore_index=True)


def differences(runs: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Differences between the cells of each pair, seed by seed, with their 95 % intervals.

    Args:
        runs: Rows of `runs.csv`; only those with status `ok` count.
        pairs: The `config_hash` of two cells, whatever they differ in; the first less the second.

    Returns:
        Rows like those of `comparisons.csv`, with every setting of both: `other_` is the second's.
    """
    cells = dict(tuple(runs[runs["status"] == "ok"].groupby("config_hash")))
    names = [name for name in (*SETTING_NAMES, "config_hash") if name in runs and name != "seed"]
    rows: list[dict[str, Any]] = []
    for one, other in pairs:
        pair = cells[one].merge(cells[other], on="seed", suffixes=("", "_theirs"))
        if len(pair):
            sides = {f"other_{name}": pair[f"{name}_theirs"].iloc[0] for name in names}
            rows += _rows(pair, {**{name: pair[name].iloc[0] for name in names}, **sides})
    return pd.DataFrame(rows)


def is_logged(runs: pd.DataFrame) -> bool:
    """Whether runs are of a logger's file, which has no settings."""
    return len(runs) > 0 and bool(runs["epochs"].isna().all())


def _pair(mine: pd.DataFrame, theirs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of `comparisons.csv` for the runs of one method and those of another."""
    if mine.empty or theirs.empty:
        return
    # Where both have a penalty, its form is the same too; Naive has none.
    form = ["mode", "decay_factor"] if theirs["mode"].notna().any() else []
    shared = [name for name in (*SHARED_SETTINGS, *form) if name in mine]
    pairs = mine.merge(theirs, on=[*shared, "seed"], suffixes=("", "_theirs"))
    own = [*(name for name in METHOD_SETTINGS if name not in shared), "config_hash"]
    for _, pair in pairs.groupby(["config_hash", "config_hash_theirs"], sort=False):
        first = pair.iloc[0]
        sides = {f"other_{n}": first[n if n in form else f"{n}_theirs"] for n in [*own, *form]}
        yield from _rows(pair, {**{name: first[name] for name in [*shared, *own]}, **sides})


def _rows(pair: pd.DataFrame, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each metric that both sides have of a seed, with the settings of both."""
    provenance = provenance_of(_both(pair))
    for metric in COMPARED:
        found = pair[[metric, f"{metric}_theirs"]].dropna().to_numpy(float)
        if len(found):
            yield {**settings, **_difference(metric, found[:, 0], found[:, 1]), **provenance}


def _difference(metric: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The columns of `comparisons.csv` on a metric of the same seeds, [n] each."""
    found = interval(a - b)
    answers = {"differs": differs(a - b), "within_margin": within_margin(a - b)}
    return {
        "metric": metric,
        "unit": UNITS[metric],
        "n": found["n"],
        "mean": a.mean(),
        "other_mean": b.mean(),
        "difference": found["mean"],
        "ci_low": found["ci_low"],
        "ci_high": found["ci_high"],
        "margin": MARGIN,
        **answers,
        "verdict": _verdict(metric, found["mean"], **answers),
    }


def _verdict(metric: str, difference: float, differs: str, within_margin: str) -> str:
    """One of `VERDICTS` on the first of two methods."""
    if differs == "unknown":
        return "one seed"
    if differs == "yes":
        word = "better" if (difference > 0) != (metric in LOWER_IS_BETTER) else "worse"
        return f"{word}, within the margin" if within_margin == "yes" else word
    return "equivalent" if within_margin == "yes" else "undecided"


def _both(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the columns on the code of both sides' runs, a row per run."""
    theirs = {f"{name}_theirs": name for name in MEASUREMENT}
    other = pairs.reindex(columns=list(theirs)).rename(columns=theirs)
    return pd.concat([pairs.reindex(columns=list(MEASUREMENT)), other], ignore_index=True)


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
        Columns `ewc_lambda`, `metric`, `unit`, `validation`, `n` (complete runs), `diverged`,
        `mean`, `std`, `ci_low`, `ci_high`; NaN where no run is complete.
    """
    rows = []
    for ewc_lambda, group in runs.groupby("ewc_lambda", dropna=False):
        done = group.loc[group["status"] == "ok", metric].to_numpy(dtype=float)
        nothing = {"n": 0} | dict.fromkeys(("mean", "std", "ci_low", "ci_high"), np.nan)
        rows.append({
            "ewc_lambda": ewc_lambda,
            "metric": metric,
            "unit": UNITS[metric],
            "validation": bool(group["validation"].iloc[0]),
            "diverged": int((group["status"] == "diverged").sum()),
            **(interval(done) if len(done) else nothing),
            **provenance_of(group),
        })
    return pd.DataFrame(rows)

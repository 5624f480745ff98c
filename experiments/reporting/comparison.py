"""Paired differences and checks in words: the answer first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from experiments.reporting.labels import LABELS, cell_labels, labelled_setting, stream_title
from experiments.results.schemas import METHOD_SETTINGS, SETTING_NAMES, SHARED_SETTINGS, VERDICTS
from experiments.settings.run import STREAM

METRIC_WORDS = {"average_accuracy": "accuracy"}


def stream_of(row: Mapping[str, Any]) -> str:
    """The title of the stream of a row of `comparisons.csv`."""
    title = stream_title(*(row[name] for name in STREAM))
    return title + (", validation images" if row["validation"] else "")


def sides(comparisons: pd.DataFrame) -> dict[str, str]:
    """A label for each compared cell, by `config_hash`: `EWC, per sample, predicted, λ = 30`."""
    names = [n for n in (*SETTING_NAMES, "config_hash") if f"other_{n}" in comparisons]
    others = comparisons.drop(columns=names).rename(columns={f"other_{n}": n for n in names})
    both = pd.concat([comparisons.astype(object), others.astype(object)], ignore_index=True)
    return cell_labels(both, with_type=True)


def pair_of(row: Mapping[str, Any], labels: Mapping[str, str]) -> tuple[str, str, str]:
    """Both sides of a row in words, and the settings that two methods share, named once.

    Args:
        row: Of `comparisons.csv`.
        labels: Of `sides`.

    Returns:
        Such as `EWC, per sample, λ = 1`, `Naive` and `10 epochs`, which may be empty.
    """
    mine, theirs = (labels[row[n]].split(", ") for n in ("config_hash", "other_config_hash"))
    shared: list[str] = []
    if mine[0] != theirs[0]:  # of one method, what they share is its name
        shared = [part for part in mine if part in theirs and not part.startswith("λ")]
    first, second = (", ".join(p for p in own if p not in shared) for own in (mine, theirs))
    return first, second, ", ".join(shared)


def pair_text(first: str, second: str, common: str) -> str:
    """`EWC, per sample, λ = 1 − Naive (10 epochs)`."""
    return f"{first} − {second}" + (f" ({common})" if common else "")


def main_pairs(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """The rows; of more than `most`, those of our EWC beside Avalanche's, if there are any."""
    if len(rows) <= most:
        return rows
    ours = rows[(rows["method"] == "ewc") & (rows["other_method"] == "avalanche-ewc")]
    return ours if len(ours) else rows


def has_several_lambdas(rows: pd.DataFrame) -> pd.Series[bool]:
    """Whether a row's methods are compared at many lambdas: the test must not choose from them."""
    arms = [n for n in METHOD_SETTINGS if n != "ewc_lambda"]
    pair = [*SHARED_SETTINGS, *arms, *(f"other_{name}" for name in arms)]
    sizes = rows.groupby([n for n in pair if n in rows], dropna=False)["metric"].transform("size")
    return sizes > MOST_SENTENCES


def difference_text(difference: float, low: float, high: float) -> str:
    """`+0.0052 [−0.0028, +0.0132]`; the difference alone where there is no interval."""
    interval = f" [{low:+.4f}, {high:+.4f}]" if pd.notna(low) else ""
    return f"{difference:+.4f}{interval}".replace("-", "−")


SENTENCES = {
    "better": "is better than",
    "worse": "is worse than",
    "better, within the margin": "is better, by less than the margin, than",
    "worse, within the margin": "is worse, by less than the margin, than",
    "equivalent": "is equivalent to",
    "undecided": "can't be told from",
    "one seed": "has one seed beside",
}


def answers(comparisons: pd.DataFrame, *, all_pairs: bool = False) -> Iterator[str]:
    """Sentences on our EWC beside Avalanche's, or beside Naive where that is missing.

    One per pair; of more than `MOST_SENTENCES` pairs that share their settings, such as all Fisher
    types with one loss, one from the worst to the best. Without our EWC, on all pairs of methods.

    Args:
        comparisons: Rows of `comparisons.csv`, or of `statistics.differences`.
        all_pairs: Whether they are on all pairs anyway.

    Yields:
        Sentences; of a stream with several lambdas, which the images of the test must not choose
        from, only how many pairs there are.
    """
    if comparisons.empty:
        return
    labels = sides(comparisons)
    accuracy = comparisons[comparisons["metric"] == "average_accuracy"]
    for _, rows in accuracy.groupby([*STREAM, "validation"], sort=False):
        ours = rows[(rows["method"] == "ewc") & (not all_pairs)]
        for other in ("avalanche-ewc", "naive"):
            pairs = ours[ours["other_method"] == other]
            if len(pairs):
                break
        else:
            pairs = rows
        settings = [name for name in SHARED_SETTINGS if name in pairs]
        groups = [part for _, part in pairs.groupby(settings, dropna=False, sort=False)]
        said = [words for part in groups for words in _sentences(part, labels)]
        if has_several_lambdas(pairs).any() or not said or len(said) > 2 * MOST_SENTENCES:
            yield f"{stream_of(rows.iloc[0])}: {len(pairs)} pairs of settings, see the table."
        else:
            yield from said


MOST_SENTENCES = 3


def _sentences(rows: pd.DataFrame, labels: Mapping[str, str]) -> Iterator[str]:
    """A sentence per row; one on many; none on many that have not one method on each side."""
    ordered = rows.sort_values("difference").to_dict("records")
    if len(rows) <= MOST_SENTENCES:
        for row in rows.to_dict("records"):
            first, second, common = pair_of(row, labels)
            yield (
                f"{stream_of(row)}: {first} {SENTENCES[row['verdict']]} {second}: "
                f"{difference_of(row)} in average accuracy, {_conditions(row, common)}."
            )
    elif rows["method"].nunique() == rows["other_config_hash"].nunique() == 1:
        worst, best = ordered[0], ordered[-1]
        counts = rows["verdict"].value_counts()
        found = ", ".join(f"{counts[v]} {v.replace(',', '')}" for v in VERDICTS if v in counts)
        (low, second, common), (high, *_) = pair_of(worst, labels), pair_of(best, labels)
        yield (
            f"{', '.join(filter(None, (stream_of(worst), common)))}: of {len(rows)} kinds of "
            f"{LABELS.get(worst['method'], worst['method'])} beside {second}, {found}, from "
            f"{difference_of(worst)} ({low}) to {difference_of(best)} ({high}) in average "
            f"accuracy, {_conditions(worst, '')}."
        )


def difference_of(row: Mapping[str, Any]) -> str:
    """`difference_text` of a row of `comparisons.csv`."""
    return difference_text(row["difference"], row["ci_low"], row["ci_high"])


def _conditions(row: Mapping[str, Any], common: str) -> str:
    known = {labelled_setting(name, row[name]) for name in ("n_experiences", "batch_size")}
    others = [part for part in common.split(", ") if part not in known]
    settings = ", ".join(filter(None, (*others, shared_settings(row))))
    return f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{row['n']} ({settings})"


def shared_settings(row: Mapping[str, Any]) -> str:
    """Return the settings that distinguish comparisons of the same stream."""
    if pd.isna(row["epochs"]):  # of a logger's file
        return f"{row['n_experiences']} experiences"
    network = (
        f"{row['hidden_layers']}x{row['hidden_size']}" if row["model"] == "mlp" else row["model"]
    )
    return f"{row['n_experiences']} experiences, {network}, mini-batches of {row['batch_size']}"


def comparison_rows(comparisons: pd.DataFrame) -> list[dict[str, str]]:
    """Paired differences as text, a row each."""
    labels = sides(comparisons) if len(comparisons) else {}
    return [
        {
            "stream": stream_of(row),
            "compared": pair_text(*pair_of(row, labels)),
            "metric": METRIC_WORDS.get(row["metric"], row["metric"]),
            "difference": difference_of(row),
            "verdict": str(row["verdict"]),
            "n": str(row["n"]),
            "means": f"{row['mean']:.4f}, {row['other_mean']:.4f}",
        }
        for row in comparisons.to_dict("records")
    ]


def checks_text(checks: pd.DataFrame) -> str:
    """`6 of 6 checks hold`, with what was only measured."""
    claimed = checks[checks["tolerance"].notna()]
    text = f"{(claimed['verdict'] == 'equal').sum()} of {len(claimed)} checks hold"
    measured = len(checks) - len(claimed)
    return text + (f"; {measured} differences are measured without a claim" if measured else "")


def check_rows(checks: pd.DataFrame) -> list[dict[str, str]]:
    """Return checks as text, a row each."""
    return [
        {
            "stream": stream_title(*(row[name] for name in STREAM)),
            "what": f"{row['what']}, {row['scope']}"
            + (f", penalty {row['penalty']}" if pd.notna(row["penalty"]) else ""),
            "Fisher": str(row["fisher_type"]),
            "beside": str(row["against"]),
            "dtype": str(row["dtype"]),
            "size": f"{row['size']} {row['size_of']}",
            "error": f"{row['largest_relative_error']:.1e}",
            "tolerance": "" if pd.isna(row["tolerance"]) else f"{row['tolerance']:g}",
            "verdict": str(row["verdict"]),
        }
        for row in checks.to_dict("records")
    ]

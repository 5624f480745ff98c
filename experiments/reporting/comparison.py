"""Paired differences and checks in words: the answer first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from experiments.reporting.labels import cell_labels, stream_title
from experiments.results.schemas import SETTING_NAMES

STREAM = ("benchmark", "dataset", "scenario")
METRIC_WORDS = {"average_accuracy": "accuracy"}


def stream_of(row: Mapping[str, Any]) -> str:
    """The title of the stream of a row of `comparisons.csv`."""
    title = stream_title(*(row[name] for name in STREAM))
    return title + (", validation images" if row["validation"] else "")


def sides(comparisons: pd.DataFrame) -> dict[str, str]:
    """A label for each compared cell, by `config_hash`: `EWC, per sample, predicted, λ = 30`.

    Args:
        comparisons: Rows of `comparisons.csv`, or of `statistics.differences`.
    """
    names = [n for n in (*SETTING_NAMES, "config_hash") if f"other_{n}" in comparisons]
    others = comparisons.drop(columns=names).rename(columns={f"other_{n}": n for n in names})
    both = pd.concat([comparisons.astype(object), others.astype(object)], ignore_index=True)
    return cell_labels(both, with_type=True)


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
    """A sentence per stream: our EWC beside Avalanche's, or beside Naive where that is missing.

    Without our EWC, a sentence on each pair of methods.

    Args:
        comparisons: Rows of `comparisons.csv`, or of `statistics.differences`.
        all_pairs: Whether there is a sentence on each pair anyway.

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
        title = stream_of(rows.iloc[0])
        if len(pairs) > MOST_SENTENCES:
            yield f"{title}: {len(pairs)} pairs of settings, see the table."
            continue
        for row in pairs.to_dict("records"):
            found = difference_text(row["difference"], row["ci_low"], row["ci_high"])
            words = SENTENCES[row["verdict"]]
            yield (
                f"{title}: {labels[row['config_hash']]} {words} "
                f"{labels[row['other_config_hash']]}: "
                f"{found} in average accuracy, n = {row['n']} ({shared_settings(row)})."
            )


MOST_SENTENCES = 3


def shared_settings(row: Mapping[str, Any]) -> str:
    """Return the settings that distinguish comparisons of the same stream."""
    if pd.isna(row["epochs"]):  # of a logger's file
        return f"{row['n_experiences']} experiences"
    network = (
        f"{row['hidden_layers']}x{row['hidden_size']}" if row["model"] == "mlp" else row["model"]
    )
    return f"{row['n_experiences']} experiences, {network}, mini-batches of {row['batch_size']}"


def comparison_rows(comparisons: pd.DataFrame) -> list[dict[str, str]]:
    """Paired differences as text, a row each.

    Args:
        comparisons: Rows of `comparisons.csv`, or of `statistics.differences`.

    Returns:
        Columns by name; `stream` first.
    """
    labels = sides(comparisons) if len(comparisons) else {}
    return [
        {
            "stream": stream_of(row),
            "compared": f"{labels[row['config_hash']]} − {labels[row['other_config_hash']]}",
            "metric": METRIC_WORDS.get(row["metric"], row["metric"]),
            "difference": difference_text(row["difference"], row["ci_low"], row["ci_high"]),
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
    """Return checks as text, a row each.

    Args:
        checks: Rows of `checks.csv`.

    Returns:
        Columns by name; `stream` first.
    """
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

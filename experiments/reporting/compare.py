"""Does one method beat another, by how much, with what interval? From a results folder.

Paired differences, seed by seed, come first; then how many of the equalities with Avalanche's EWC
hold. `--against` compares every arm of the folder with one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import tyro
from rich.console import Console

from experiments.reporting.folders import given_or_newest, notes
from experiments.reporting.labels import cell_labels, method_place, setting_text
from experiments.reporting.terminal import print_checks, print_comparisons
from experiments.results import statistics
from experiments.results.logged import load_results
from experiments.results.schemas import SETTING_NAMES, SHARED_SETTINGS

MOST_NAMES = 20  # of an error


@dataclass(frozen=True)
class Compare:
    """Print which method is better in a results folder, and by how much."""

    folder: Annotated[str | None, tyro.conf.Positional] = None
    """Folder of results, or file of `TidyCSVLogger`. Unset: your newest below runs/."""
    against: str | None = None
    """The arm that every other one is compared with: a method's name, or its name as printed, and
    settings, with commas: naive, or ewc,fisher_type=exact,lambda=30. Unset: our EWC less each
    other method, such as Avalanche's EWC, and each other less Naive."""
    checks: bool = False
    """Print each equality with Avalanche's EWC too, not only how many hold."""


def run(settings: Compare) -> pd.DataFrame:
    """Print the comparison.

    Raises:
        ValueError: The folder holds neither runs to compare nor checks, or `against` is no arm.
    """
    folder, console = given_or_newest(settings.folder, "runs", "checks"), Console()
    found = load_results(folder)
    if not {"runs", "checks"} & set(found):
        raise ValueError(f"`folder` must hold runs.csv or checks.csv, got {folder}.")
    comparisons = pd.DataFrame()
    if "runs" in found:
        runs, against = found["runs"], settings.against
        comparisons = (
            statistics.paired_differences(runs)
            if against is None
            else statistics.differences(runs, pairs_against(runs, against))
        )
        if comparisons.empty:
            console.print("No two methods have the same seeds and settings.")
        print_comparisons(comparisons, console, all_pairs=against is not None)
        if note := notes(folder, runs):
            console.print(f"NOTE: {note}", style="bold yellow", soft_wrap=True)
    if "checks" in found:
        print_checks(found["checks"], console, all_of_them=settings.checks)
    return comparisons


def pairs_against(runs: pd.DataFrame, against: str) -> list[tuple[str, str]]:
    """Each cell with the one that it is compared with, on the same stream.

    Args:
        runs: Rows of `runs.csv`; only those with status `ok` count.
        against: As `Compare` has it.

    Returns:
        The `config_hash` of both, in the methods' usual order.

    Raises:
        ValueError: `against` names no arm, or several between which nothing decides.
    """
    done = runs[runs["status"] == "ok"]
    cells = done.drop_duplicates("config_hash")
    place = {
        "method": lambda names: names.map(method_place),
        "ewc_lambda": lambda values: values.fillna(-1.0),
    }
    for name in ("ewc_lambda", "fisher_type", "method"):  # the last one counts most
        cells = cells.sort_values(name, key=place.get(name), kind="stable")
    labels = cell_labels(cells, with_type=True)
    named = _named(cells, labels, against)
    return [
        pair
        for _, stream in cells.groupby(statistics.SAME_TEST, sort=False)
        for pair in _pairs(stream, named, labels, against)
    ]


def _named(cells: pd.DataFrame, labels: Mapping[str, str], against: str) -> set[str]:
    """The cells that have this name; else those to which all its parts apply."""
    exact = {key for key, label in labels.items() if _plain(label) == _plain(against)}
    found = exact or {
        cell["config_hash"]
        for cell in cells.to_dict("records")
        if all(_applies(part, cell, labels[cell["config_hash"]]) for part in against.split(","))
    }
    if not found:
        raise ValueError(f"`against` must name an arm, got {against}. {_listed(labels.values())}")
    return found


def _applies(part: str, cell: Mapping[str, Any], label: str) -> bool:
    """Whether `naive`, `per sample` or `lambda=30` is true of a cell."""
    if _plain(part) in map(_plain, [cell["method"], *label.split(",")]):
        return True
    name, _, value = part.partition("=")
    name = {"λ": "ewc_lambda", "lambda": "ewc_lambda"}.get(name.strip(), name.strip())
    if name not in SETTING_NAMES or name not in cell:
        return False
    try:
        return float(value) == float(cell[name])
    except (TypeError, ValueError):
        return _plain(value) == _plain(setting_text(cell[name]))


def _plain(text: str) -> str:
    """The text without spaces, in small letters."""
    return "".join(text.split()).casefold()


def _pairs(
    stream: pd.DataFrame, named: set[str], labels: Mapping[str, str], against: str
) -> Iterator[tuple[str, str]]:
    is_named = stream["config_hash"].isin(named)
    references, others = stream[is_named], stream[~is_named]
    shared = [name for name in SHARED_SETTINGS if name in stream]
    if others.empty and len(references) > 1:
        raise _ambiguous(references, labels, against)
    for _, cell in others.iterrows() if len(references) else ():
        same = [one[shared].equals(cell[shared]) for _, one in references.iterrows()]
        found = references if len(references) == 1 else references[same]
        if len(found) != 1:
            raise _ambiguous(references, labels, against)
        yield cell["config_hash"], found["config_hash"].iloc[0]


def _ambiguous(cells: pd.DataFrame, labels: Mapping[str, str], against: str) -> ValueError:
    several = _listed(labels[key] for key in cells["config_hash"])
    return ValueError(f"`against` must name one arm, got {against}, which several are. {several}")


def _listed(labels: Any) -> str:
    names = list(dict.fromkeys(label.replace("\N{NO-BREAK SPACE}", " ") for label in labels))
    more = f"; and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"There are: {'; '.join(names[:MOST_NAMES])}{more}."

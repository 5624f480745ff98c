"""Does one method beat another, by how much, with what interval? From a results folder.

Paired differences, seed by seed, come first; then how many of the equalities with Avalanche's EWC
hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import tyro
from rich.console import Console

from experiments.reporting.folders import given_or_newest
from experiments.reporting.terminal import print_checks, print_comparisons
from experiments.results import statistics
from experiments.results.logged import load_results, logged_note
from experiments.results.provenance import mixed_code


@dataclass(frozen=True)
class Compare:
    """Print which method is better in a results folder, and by how much."""

    folder: Annotated[str | None, tyro.conf.Positional] = None
    """Folder of results, or file of `TidyCSVLogger`. Unset: your newest below runs/."""
    checks: bool = False
    """Print each equality with Avalanche's EWC too, not only how many hold."""


def run(settings: Compare) -> pd.DataFrame:
    """Print the comparison.

    Args:
        settings: Which folder.

    Returns:
        Rows of `comparisons.csv`.

    Raises:
        ValueError: The folder holds neither runs to compare nor checks.
    """
    folder, console = given_or_newest(settings.folder, "runs", "checks"), Console()
    found = load_results(folder)
    if not {"runs", "checks"} & set(found):
        raise ValueError(f"`folder` must hold runs.csv or checks.csv, got {folder}.")
    comparisons = pd.DataFrame()
    if "runs" in found:
        comparisons = statistics.paired_differences(found["runs"])
        if comparisons.empty:
            console.print("No two methods have the same seeds and settings.")
        print_comparisons(comparisons, console)
        if note := mixed_code(found["runs"]) or logged_note(found["runs"]):
            console.print(f"NOTE: {note}", style="bold yellow", soft_wrap=True)
    if "checks" in found:
        print_checks(found["checks"], console, all_of_them=settings.checks)
    return comparisons

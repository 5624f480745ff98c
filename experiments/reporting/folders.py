"""The results folder that a command shows if none is named, and notes on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from experiments.results.logged import logged_note
from experiments.results.provenance import mixed_code
from experiments.results.store import PARTS, PLAN, has_parts, unfinished

OWN, COMMITTED = Path("runs"), Path("results/main")


def given_or_newest(folder: Path | str | None, *tables: str) -> Path:
    """The folder; unset, the newest below `runs` with a table or runs, else the committed results.

    Args:
        folder: As named by the user.
        tables: Names without .csv; the folder has one of them.

    Returns:
        The folder. Which one was chosen is printed to the error stream, since a table may go into a
        file.

    Raises:
        ValueError: It is not there, or there is none.
    """
    if folder is not None:
        if not Path(folder).exists():
            raise ValueError(f"`folder` must be a folder or file that is there, got {folder}.")
        return Path(folder)
    found = [(file, file.parent) for name in tables for file in OWN.rglob(f"{name}.csv")]
    if {"runs", "*"} & set(tables):  # a sweep that was stopped has no tables yet
        plans = [(file, file.parents[1]) for file in OWN.rglob(f"{PARTS}/{PLAN}")]
        found += [(file, folder) for file, folder in plans if has_parts(folder)]
    if found:
        newest = max(found, key=lambda pair: pair[0].stat().st_mtime)[1]
        why = "the newest folder below runs/"
    else:
        newest, why = COMMITTED, "committed results, since there are none below runs/"
        if not newest.is_dir():
            raise ValueError(
                "`folder` must be named: there are no results below runs/ here. `python -m "
                "experiments` makes some."
            )
    print(f"{newest}: {why}. Name another to see that one.", file=sys.stderr)
    return newest


def notes(folder: Path | str, runs: pd.DataFrame) -> str:
    """Notes on a folder's runs: unfinished, of mixed code, or of a logger; "" without any.

    Args:
        folder: Of results, or file of `TidyCSVLogger`.
        runs: Its rows of `runs.csv`.
    """
    found = (unfinished(Path(folder), runs), mixed_code(runs), logged_note(runs))
    return " ".join(filter(None, found))

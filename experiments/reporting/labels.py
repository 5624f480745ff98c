"""What methods and cells are called in tables and figures."""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.results.statistics import varied_settings

LABELS = {
    "naive": "Naive",
    "avalanche-ewc": "Avalanche's EWC",
    "ewc": "EWC, per sample",
    "joint": "Joint (upper bound)",
}


def cell_labels(runs: pd.DataFrame, *, with_lambda: bool = True) -> dict[str, str]:
    """What to call each cell: its method, lambda and whatever else tells it from the others.

    Args:
        runs: Rows of `runs.csv`.
        with_lambda: Whether lambda is part of the name.

    Returns:
        By `config_hash`.
    """
    varied = varied_settings(runs)
    cells = runs.drop_duplicates("config_hash")
    several = cells.groupby("method")["fisher_type"].nunique()
    labels = {}
    for cell in cells.to_dict("records"):
        words = [LABELS[cell["method"]]]
        if with_lambda and pd.notna(cell["ewc_lambda"]):
            words.append(f"λ = {cell['ewc_lambda']:g}")
        if several[cell["method"]] > 1 and pd.notna(cell["fisher_type"]):
            words.append(cell["fisher_type"])
        words += [_setting(name, cell[name]) for name in varied if pd.notna(cell[name])]
        labels[str(cell["config_hash"])] = ", ".join(words)
    return labels


def _setting(name: str, value: Any) -> str:
    """A word speaks for itself; a number needs its name."""
    if isinstance(value, str):
        return value
    return f"{name.replace('_', ' ')} {value}"

"""Labels of streams, methods and cells in tables and figures, and number formats."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from experiments.results.statistics import varied_settings
from experiments.settings.run import WITH_FISHER, RunSettings
from experiments.settings.unset import UNSET
from experiments.settings.values import is_own

LABELS = {
    "naive": "Naive",
    "avalanche-ewc": "Avalanche's EWC",
    "ewc": "EWC",
    "l2": "L2",
    "si": "SI",
    "mas": "MAS",
    "lwf": "LwF",
    "replay": "Replay",
    "ewc+replay": "EWC and replay",
    "joint": "Joint (upper bound)",
}
# Importances that are no mean of squared scores of single samples, the Fisher information.
IMPORTANCES = {
    "batched": "per mini-batch",
    "class_mean": "class means",
    "class_mean_empirical": "class means, data's labels",
    "reversed": "reversed logits",
    "class_mean_reversed": "class means, reversed logits",
    "batched_reversed": "per mini-batch, reversed logits",
}
NORMALIZED = {
    "mean": "F by its mean",
    "trace": "F by its trace",
    "max": "F by its maximum",
    "avalanche": "F at Avalanche's scale",
}
# Values of settings that say nothing alone.
VALUES = {
    ("importance_order", "shuffled"): "importance shuffled",
    ("optimizer_state", "reset"): "optimizer reset",
    ("pixels", "unit"): "pixels in 0 to 1",
    ("loss_classes", "all"): "loss over all classes",
    ("loss_classes", "current"): "loss over current classes",
    ("head", "cosine"): "cosine head",
    ("penalty_step", "implicit"): "implicit step",
}
# Settings whose value is a count, by what is counted.
COUNTS = {
    "n_experiences": "{} experiences",
    "epochs": "{} epochs",
    "iterations": "{} iterations",
    "batch_size": "mini-batches of {}",
    "importance_batch": "importance batches of {}",
    "hidden_size": "{} hidden units",
    "hidden_layers": "{} hidden layers",
    "memory": "{} samples in memory",
}
BENCHMARKS = {"split": "Split", "permuted": "Permuted", "rotated": "Rotated"}
DATASETS = {"mnist": "MNIST", "digits": "digits", "fashion-mnist": "Fashion-MNIST"}


SHA256 = re.compile("[0-9a-f]{64}")


def method_of(row: Mapping[str, Any], *, with_type: bool = False) -> str:
    """The method of a row in words, with what its importances are and are divided by.

    Args:
        row: With the settings of a run; of a logger's file, which has none, the method is called as
            it is there.
        with_type: Whether the labels of a Fisher are named too.

    Returns:
        Such as `EWC, per sample, predicted, F by its mean`.
    """
    method, kind = str(row["method"]), row["fisher_type"]
    is_ours = method in WITH_FISHER and pd.notna(row["epochs"])
    words = [method if pd.isna(row["epochs"]) else LABELS.get(method, method)]
    if is_ours:
        words.append(IMPORTANCES.get(kind, "per sample"))
    if with_type and pd.notna(kind) and not (is_ours and kind in IMPORTANCES):
        words.append(str(kind))
    if (normalize := row.get("normalize")) in NORMALIZED:
        words.append(NORMALIZED[normalize])
    return ", ".join(words)


def method_place(method: str) -> int:
    """Return a method's sort position; methods missing from `LABELS` come before joint."""
    names = list(LABELS)
    return names.index(method) if method in names else names.index("joint")


def stream_title(benchmark: str, dataset: str, scenario: str) -> str:
    """A stream's title: `Permuted MNIST, domain-incremental`."""
    name = f"{BENCHMARKS.get(benchmark, benchmark)} {DATASETS.get(dataset, dataset)}"
    if is_own(benchmark):
        name = benchmark
    return f"{name}, {scenario}-incremental"


def number(value: float) -> str:
    """A number in the one format of tables and figures: 0.001, 30, 1000, 1e4, 2.5e6, 1e-4."""
    text = f"{value:g}"
    if value and (abs(value) >= 1e4 or abs(value) < 1e-3):
        text = re.sub(r"\.?0*e\+?(-?)0*(\d+)", r"e\1\2", f"{value:.3e}")
    return text


def lambda_text(value: float) -> str:
    """`λ = 30`, which no line break parts."""
    return f"λ = {number(value)}".replace(" ", "\N{NO-BREAK SPACE}")


def in_words(name: str) -> str:
    """The name of a column in words."""
    return name.replace("_", " ")


def setting_text(value: Any) -> str:
    """The value of a setting; nothing where it has none."""
    if value is None or pd.isna(value):
        return ""
    if isinstance(value, float):
        return number(value)
    return value[:8] if SHA256.fullmatch(str(value)) else str(value)


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` letters."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) or text


def cell_labels(
    runs: pd.DataFrame, *, with_lambda: bool = True, with_type: bool | None = None
) -> dict[str, str]:
    """Return a label for each cell: method, lambda, and the settings that distinguish it.

    Args:
        runs: Rows of `runs.csv`.
        with_lambda: Whether lambda is part of the name.
        with_type: Whether the Fisher type is; None: where a method has several.

    Returns:
        By `config_hash`.
    """
    varied = varied_settings(runs)
    cells = runs.drop_duplicates("config_hash")
    if (cells["eval_every"] == cells["n_experiences"]).all():  # of a search, whatever it varies
        varied = [name for name in varied if name != "eval_every"]
    several = cells.groupby("method")["fisher_type"].nunique()
    labels = {}
    for cell in cells.to_dict("records"):
        names_type = several[cell["method"]] > 1 if with_type is None else with_type
        words = [method_of(cell, with_type=names_type)]
        set_ = [n for n in varied if pd.notna(cell[n]) and not _is_usual(n, cell[n])]
        words += [labelled_setting(name, cell[name]) for name in set_]
        if with_lambda and pd.notna(cell["ewc_lambda"]):
            words.append(lambda_text(cell["ewc_lambda"]))
        labels[str(cell["config_hash"])] = ", ".join(words)
    return labels


def run_labels(cells: Sequence[RunSettings]) -> dict[str, str]:
    """A label for each run, by `run_id`: stream, method, lambda, other settings, and seed."""
    runs = pd.DataFrame([{**asdict(cell), "config_hash": cell.config_hash} for cell in cells])
    labels = cell_labels(runs) if len(runs) else {}
    return {
        cell.run_id: f"{stream_title(cell.benchmark, cell.dataset, cell.scenario)}: "
        f"{labels[cell.config_hash]}, seed {cell.seed}"
        for cell in cells
    }


def _is_usual(name: str, value: Any) -> bool:
    """Whether a label leaves the value out: there are two losses, and neither is the usual one."""
    return name != "loss_classes" and value == UNSET.get(name)


def labelled_setting(name: str, value: Any) -> str:
    """A setting in words: `cosine head`, `mini-batches of 128`, `learning rate 0.1`."""
    if known := VALUES.get((name, value)):
        return known.replace(" ", "\N{NO-BREAK SPACE}")
    if isinstance(value, str):
        return setting_text(value)
    text = COUNTS.get(name, in_words(name) + " {}").format(setting_text(value))
    text = text.removesuffix("s") if name in COUNTS and value == 1 else text
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def without_common(labels: Sequence[str]) -> tuple[str, list[str]]:
    """Return what labels such as `a, b, c` and `a, b, d` share, and what is left of each.

    Args:
        labels: Parts separated by commas.

    Returns:
        `a, b`, and `c`, `d`; nothing is taken where a label would be left empty.
    """
    parts = [label.split(", ") for label in labels]
    common = [part for part in parts[0] if all(part in other for other in parts)] if parts else []
    rest = [", ".join(part for part in own if part not in common) for own in parts]
    if len(labels) < 2 or not all(rest):
        return "", list(labels)
    return ", ".join(common), rest

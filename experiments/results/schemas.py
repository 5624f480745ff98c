"""The columns of each result table, with their types and ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pandas as pd
import pandera.pandas as pa

from experiments.results import provenance
from experiments.results.metrics import METRICS
from experiments.settings.run import STREAM, RunSettings

Schema = pa.DataFrameSchema
_FRACTION = pa.Check.in_range(0, 1)
_INT_OR_NONE = pd.Int64Dtype()


def _setting_columns() -> dict[str, pa.Column]:
    """One column per field of `RunSettings`, typed as it is; nullable where it may be None."""
    columns = {}
    for name, hint in get_type_hints(RunSettings).items():
        kinds = {type(kind) if isinstance(kind, str) else kind for kind in _plain_types(hint)}
        nullable = type(None) in kinds
        (kind,) = kinds - {type(None)}
        # Not required where it may be None: a setting can be added and old tables still be read.
        columns[name] = pa.Column(
            _INT_OR_NONE if kind is int and nullable else kind,
            nullable=nullable,
            coerce=True,
            required=not nullable,
        )
    return columns


def _plain_types(hint: Any) -> Iterator[Any]:
    """The types in a union, and the values in a literal."""
    arguments = get_args(hint)
    for argument in arguments:
        yield from _plain_types(argument)
    if not arguments:
        yield hint


def _text(**options: Any) -> pa.Column:
    return pa.Column(str, coerce=True, **options)


def _number(*checks: pa.Check, **options: Any) -> pa.Column:
    return pa.Column(float, list(checks), coerce=True, **options)


def _count(minimum: int) -> pa.Column:
    return pa.Column(int, pa.Check.ge(minimum), coerce=True)


# Not required, and `tables.read` fills them in: older tables do not have them.
PROVENANCE = {name: _text(nullable=True, required=False) for name in provenance.MEASUREMENT}
_SETTINGS = _setting_columns()
SETTING_NAMES = tuple(_SETTINGS)


# Of `ewc_plugin.TidyCSVLogger`'s files alone: our own runs test on one stream.
LOGGER_COLUMNS = ("stream", "task")
ACCURACY = pa.DataFrameSchema(
    {
        "run_id": _text(),
        **{k: _SETTINGS[k] for k in ("benchmark", "dataset", "scenario", "method")},
        **{k: _SETTINGS[k] for k in ("fisher_type", "ewc_lambda", "seed")},
        "train_exp": _count(-1),
        "eval_exp": _count(0),
        "accuracy": _number(_FRACTION),
        "loss": _number(nullable=True),
        "n_samples": _count(1),
        "stream": _text(required=False),
        "task": pa.Column("Int64", nullable=True, coerce=True, required=False),
    },
    unique=["run_id", "stream", "train_exp", "eval_exp"],
    strict=True,
    name="accuracy.csv",
)


RUNS = pa.DataFrameSchema(
    {
        "run_id": _text(unique=True),
        "status": _text(checks=pa.Check.isin(["ok", "diverged", "failed"])),
        "reason": _text(nullable=True),
        **_SETTINGS,
        **{name: _number(pa.Check.in_range(-1, 1), nullable=True) for name in METRICS},
        **{name: _number(pa.Check.ge(0)) for name in ("train_s", "fisher_s", "eval_s")},
        **{name: _number(pa.Check.ge(0)) for name in ("peak_rss_mb", "penalty_state_mb")},
        "config_hash": _text(),
        # Not required: tables from before they were recorded are still read.
        **{name: _text(nullable=True, required=False) for name in provenance.COLUMNS},
    },
    strict=True,
    name="runs.csv",
)


CELL = ["benchmark", "dataset", "scenario", "method", "fisher_type", "ewc_lambda", "config_hash"]
SUMMARISED = (*METRICS, "train_s", "fisher_s", "eval_s", "penalty_state_mb")
UNITS = {
    **dict.fromkeys(METRICS, "fraction"),
    **dict.fromkeys(("train_s", "fisher_s", "eval_s"), "s"),
    "penalty_state_mb": "MiB",
}
_INTERVAL = {name: _number(nullable=True) for name in ("ci_low", "ci_high")}
# Settings in which compared methods may differ; all others, except the seed, must be equal.
METHOD_SETTINGS = (
    *("method", "fisher_type", "mode", "decay_factor", "normalize", "penalty_step", "ewc_lambda"),
    *("importance_batch", "importance_order", "memory", "method_sha256"),
)
SHARED_SETTINGS = tuple(n for n in SETTING_NAMES if n not in (*METHOD_SETTINGS, "seed"))
SUMMARY = pa.DataFrameSchema(
    {
        **{name: _SETTINGS[name] for name in CELL[:-1]},
        "metric": _text(checks=pa.Check.isin(SUMMARISED)),
        "unit": _text(),
        "n": _count(1),
        "mean": _number(),
        "std": _number(pa.Check.ge(0), nullable=True),
        **_INTERVAL,
        **{n: _SETTINGS[n] for n in SETTING_NAMES if n not in (*CELL, "seed")},
        "config_hash": _text(),
        **PROVENANCE,  # several, where a cell mixes them
    },
    unique=["config_hash", "metric"],
    strict=True,
    name="summary.csv",
)


COMPARED = ("average_accuracy", "forgetting")
_YES_OR_NO = pa.Check.isin(["yes", "no", "unknown"])
VERDICTS = (
    *("better", "better, within the margin", "worse", "worse, within the margin"),
    *("equivalent", "undecided", "one seed"),
)
COMPARISONS = pa.DataFrameSchema(
    {
        **{name: _SETTINGS[name] for name in STREAM},
        "metric": _text(checks=pa.Check.isin(COMPARED)),
        **{name: _SETTINGS[name] for name in METHOD_SETTINGS},
        **{f"other_{name}": _SETTINGS[name] for name in METHOD_SETTINGS},
        "unit": _text(),
        "n": _count(1),
        "mean": _number(),
        "other_mean": _number(),
        "difference": _number(),
        **_INTERVAL,
        "margin": _number(pa.Check.ge(0)),
        "differs": _text(checks=_YES_OR_NO),
        "within_margin": _text(checks=_YES_OR_NO),
        # Not required, and empty: older tables do not have it.
        "verdict": _text(nullable=True, required=False, checks=pa.Check.isin(VERDICTS)),
        **{name: _SETTINGS[name] for name in SHARED_SETTINGS if name not in STREAM},
        "config_hash": _text(),
        "other_config_hash": _text(),
        **PROVENANCE,
    },
    unique=["config_hash", "other_config_hash", "metric"],
    strict=True,
    name="comparisons.csv",
)


CHECKS = pa.DataFrameSchema(
    {
        **{name: _SETTINGS[name] for name in STREAM},
        "scope": _text(checks=pa.Check.isin(["one network", "whole run"])),
        "what": _text(),
        "fisher_type": _SETTINGS["fisher_type"],
        "penalty": _text(nullable=True),
        "against": _text(),
        "dtype": _text(checks=pa.Check.isin(["float32", "float64"])),
        "size": _count(1),
        "size_of": _text(),
        "ours": _number(nullable=True),
        "other": _number(nullable=True),
        "largest_relative_error": _number(pa.Check.ge(0)),
        "tolerance": _number(pa.Check.ge(0), nullable=True),
        "verdict": _text(checks=pa.Check.isin(["equal", "different", "measured"])),
        **{
            name: _SETTINGS[name]
            for name in SETTING_NAMES
            if name not in (*STREAM, "fisher_type", "method", "validation")
        },
        **PROVENANCE,
    },
    strict=True,
    name="checks.csv",
)


REPRODUCE = pa.DataFrameSchema(
    {
        "protocol": _text(),
        "source": _text(),
        "setting": _text(),
        "reduced": _text(nullable=True),
        "arm": _text(unique=True),
        **{k: _SETTINGS[k] for k in ("scenario", "method", "fisher_type", "ewc_lambda")},
        "reference": _number(_FRACTION, nullable=True),
        "reference_where": _text(nullable=True),
        "rule": _text(nullable=True),
        "n": _count(0),
        "diverged": _count(0),
        **{k: _number(nullable=True) for k in ("mean", "std", "ci_low", "ci_high")},
        "run_s": _number(pa.Check.ge(0), nullable=True),
        "fisher_s": _number(pa.Check.ge(0), nullable=True),
        "against": _text(nullable=True),
        **{f"difference{k}": _number(nullable=True) for k in ("", "_ci_low", "_ci_high")},
        "differs": _text(nullable=True, checks=_YES_OR_NO),
        "within_margin": _text(nullable=True, checks=_YES_OR_NO),
        "reproduced": _text(checks=pa.Check.isin(["yes", "no", "no reference", "not run"])),
        **PROVENANCE,
    },
    strict=True,
    name="reproduce.csv",
)


TUNED = pa.DataFrameSchema(
    {
        **{name: column for name, column in _SETTINGS.items() if name != "seed"},
        "metric": _text(checks=pa.Check.isin(["average_accuracy"])),
        "unit": _text(),
        "n": _count(1),
        "mean": _number(_FRACTION),
        "std": _number(pa.Check.ge(0), nullable=True),
        **_INTERVAL,
        "margin": _number(pa.Check.ge(0)),
        **{
            name: _number(pa.Check.ge(0))
            for name in ("lowest_as_good", "highest_as_good", "smallest_tried", "largest_tried")
        },
        "n_values": _count(1),
        "place": _text(checks=pa.Check.isin(["inside", "smallest", "largest"])),
        "seeds": _text(),
        "config_hash": _text(unique=True),
        **PROVENANCE,
    },
    strict=True,
    name="tuned.csv",
)


SCHEMAS = {
    schema.name: schema
    for schema in (ACCURACY, RUNS, SUMMARY, COMPARISONS, CHECKS, REPRODUCE, TUNED)
}

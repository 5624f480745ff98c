"""The result tables: their schemas, how they are written and read, and the statistics in them.

Every file is checked when it is written and when it is read. Files are replaced by rename after
their bytes are on the disk, so that a reader sees the old table or the new one, never a part.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pandera.pandas as pa
from scipy import stats

from experiments.results.files import replace_file
from experiments.results.metrics import METRICS
from experiments.settings.run import RunSettings

Schema = pa.DataFrameSchema

CONFIDENCE = 0.95
MARGIN = 0.01  # of the equivalence tests, in accuracy; fixed before any run

_FRACTION = pa.Check.in_range(0, 1)
_SETTING_TYPES = {int: int, float: float, bool: bool, str: str}
_INT_OR_NONE = pd.Int64Dtype()


def _setting_columns() -> dict[str, pa.Column]:
    """One column per field of `RunSettings`, typed as it is; nullable where it may be None."""
    columns = {}
    for name, hint in get_type_hints(RunSettings).items():
        arguments = get_args(hint)
        nullable = type(None) in arguments
        kinds = [a if isinstance(a, type) else type(a) for a in arguments] or [hint]
        kind = next(k for k in kinds if k is not type(None))
        # Not required where it may be None: a setting can be added and old tables still be read.
        columns[name] = pa.Column(
            _INT_OR_NONE if kind is int and nullable else _SETTING_TYPES[kind],
            nullable=nullable,
            coerce=True,
            required=not nullable,
        )
    return columns


def _text(**options: Any) -> pa.Column:
    return pa.Column(str, coerce=True, **options)


def _number(*checks: pa.Check, **options: Any) -> pa.Column:
    return pa.Column(float, list(checks), coerce=True, **options)


def _count(minimum: int) -> pa.Column:
    return pa.Column(int, pa.Check.ge(minimum), coerce=True)


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
    },
    strict=True,
    name="runs.csv",
)
CELL = ["benchmark", "dataset", "scenario", "method", "fisher_type", "ewc_lambda", "config_hash"]
SUMMARISED = (*METRICS, "train_s", "fisher_s", "eval_s", "penalty_state_mb")
SUMMARY = pa.DataFrameSchema(
    {
        **{k: _SETTINGS[k] for k in CELL[:-1]},
        "config_hash": _text(),
        "metric": _text(checks=pa.Check.isin(SUMMARISED)),
        "n": _count(1),
        "mean": _number(),
        "std": _number(pa.Check.ge(0), nullable=True),
        "ci_low": _number(nullable=True),
        "ci_high": _number(nullable=True),
    },
    unique=["config_hash", "metric"],
    strict=True,
    name="summary.csv",
)
PARITY = pa.DataFrameSchema(
    {
        **{k: _SETTINGS[k] for k in ("benchmark", "dataset", "scenario")},
        "check": _text(),
        "quantity": _text(),
        "n": _count(1),
        "ours": _number(nullable=True),
        "builtin": _number(nullable=True),
        "difference": _number(nullable=True),
        "ci_low": _number(nullable=True),
        "ci_high": _number(nullable=True),
        "tolerance": _number(pa.Check.ge(0), nullable=True),
        "verdict": _text(
            checks=pa.Check.isin([
                "equal",
                "different",
                "measured",
                "equivalent",
                "better",
                "worse",
                "undecided",
            ])
        ),
    },
    strict=True,
    name="parity.csv",
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
        "verdict": _text(
            nullable=True,
            checks=pa.Check.isin(["equivalent", "better", "worse", "undecided"]),
        ),
        "reproduced": _text(checks=pa.Check.isin(["yes", "no", "no reference", "not run"])),
    },
    strict=True,
    name="reproduce.csv",
)
SCHEMAS = {schema.name: schema for schema in (ACCURACY, RUNS, SUMMARY, PARITY, REPRODUCE)}


class TableError(ValueError):
    """A table that can't be trusted; the message says which file, what is wrong, what to do."""


def empty(schema: Schema) -> pd.DataFrame:
    """A table of the schema without rows."""
    columns = schema.columns.items()
    return pd.DataFrame(columns=[n for n, c in columns if c.required or n not in LOGGER_COLUMNS])


def frame(rows: Iterable[dict[str, Any]], schema: Schema) -> pd.DataFrame:
    """The rows as a table, columns in the schema's order and types; checked."""
    return check(pd.DataFrame(list(rows), columns=list(empty(schema))), schema)


def check(table: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """The table with the schema's types.

    Raises:
        TableError: It does not fit the schema.
    """
    try:
        return schema.validate(table)
    except (pa.errors.SchemaError, pa.errors.SchemaErrors) as error:
        reason = " ".join(str(error).split())
        raise TableError(f"{schema.name} does not fit its schema: {reason}") from error


def write(table: pd.DataFrame, folder: Path, schema: Schema) -> Path:
    """Checks the table and replaces `folder/<schema.name>` by it, floats at full precision."""
    path = folder / str(schema.name)
    replace_file(path, check(table, schema).to_csv(index=False, lineterminator="\n"))
    return path


def read(folder: Path, schema: Schema) -> pd.DataFrame:
    """The table in `folder/<schema.name>`, checked; an empty one where there is no file.

    Raises:
        TableError: The file is not a table of the schema.
    """
    path = folder / str(schema.name)
    if not path.exists():
        return empty(schema)
    texts = {name: str for name, c in schema.columns.items() if c.dtype.type is str}
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("its last line is not complete")
        table = pd.read_csv(io.StringIO(text), float_precision="round_trip", dtype=texts)
        # A table from before an optional setting was added has none of it.
        optional = [name for name in empty(schema) if not schema.columns[name].required]
        table = table.assign(**{name: None for name in optional if name not in table})
        return check(table, schema)[[name for name in schema.columns if name in table]]
    except (TableError, ValueError, pd.errors.ParserError) as error:
        raise TableError(f"`{path}` can't be read ({error}); move it away or restore it.") from None


def load(folder: str | Path) -> dict[str, pd.DataFrame]:
    """All tables of a results folder by name (`accuracy`, `runs`, `summary`, `parity`, ...).

    Raises:
        TableError: The folder holds none of them, or one that does not fit its schema.
    """
    folder = Path(folder)
    tables = {
        name.removesuffix(".csv"): read(folder, schema)
        for name, schema in SCHEMAS.items()
        if (folder / name).exists()
    }
    if not tables:
        raise TableError(f"`{folder}` holds none of {', '.join(SCHEMAS)}.")
    return tables


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

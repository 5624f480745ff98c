"""Result tables as files: read and written whole, checked against their schema both times.

Files are replaced by rename after their bytes are on the disk, so that a reader sees the old table
or the new one, never a part.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaErrorReason as Reason

from experiments.results.files import replace_file
from experiments.results.provenance import MEASUREMENT, NOT_RECORDED
from experiments.results.record import one_line
from experiments.results.schemas import LOGGER_COLUMNS, RUNS, SCHEMAS, Schema
from experiments.settings.unset import used
from experiments.settings.values import shown


class TableError(ValueError):
    """A table that can't be trusted; the message says which file, what is wrong, what to do."""


def empty(schema: Schema) -> pd.DataFrame:
    """A table of the schema without rows."""
    columns = schema.columns.items()
    return pd.DataFrame(columns=[n for n, c in columns if c.required or n not in LOGGER_COLUMNS])


def frame(rows: Iterable[dict[str, Any]], schema: Schema, *, strict: bool = False) -> pd.DataFrame:
    """The rows as a table, columns in the schema's order and types; checked."""
    return check(pd.DataFrame(list(rows), columns=list(empty(schema))), schema, strict=strict)


def check(table: pd.DataFrame, schema: Schema, *, strict: bool = False) -> pd.DataFrame:
    """The table with the schema's types.

    Args:
        table: Of values of those types, or of others that stand for them, such as 1.0 for 1.
        schema: Its columns.
        strict: Refuse a value that a column's type changes, such as 1.5 to 1, as in a file that
            was edited.

    Raises:
        TableError: It does not fit the schema.
    """
    try:
        with np.errstate(invalid="ignore"):  # of 1e300 as an integer, which is refused
            checked = schema.validate(table)
    except pa.errors.SchemaErrors as errors:
        raise TableError(_problem(errors.schema_errors[0], table, schema)) from errors
    except pa.errors.SchemaError as error:
        raise TableError(_problem(error, table, schema)) from error
    for name in checked if strict else ():
        _check_unchanged(table[name], checked[name], table, schema)
    return checked


def _check_unchanged(
    before: pd.Series, after: pd.Series, table: pd.DataFrame, schema: Schema
) -> None:
    """Raise a `TableError` where a column's type has changed a value, such as 1.5 to 1."""
    if before.dtype == after.dtype:
        return
    given = before.notna().to_numpy()
    changed = before[given].to_numpy(object) != after[given].to_numpy(object)
    for value, row in zip(before[given][changed], before.index[given][changed], strict=True):
        raise TableError(
            f"`{before.name}` of {_where(table, row)} in {schema.name} can't be "
            f"{shown(str(value))} (its type is {schema.columns[str(before.name)].dtype})"
        )


def _where(table: pd.DataFrame, row: Any) -> str:
    return f"row {row}" if "run_id" not in table else f"{table['run_id'].loc[row]}"


def _problem(error: pa.errors.SchemaError, table: pd.DataFrame, schema: Schema) -> str:
    """The file, the run and the column of the first value that does not fit, in one line."""
    code, cases = error.reason_code, error.failure_cases
    if code is Reason.COLUMN_NOT_IN_SCHEMA:
        return f"{schema.name} has a column `{shown(str(cases))}`, which it must not have"
    if code is Reason.COLUMN_NOT_IN_DATAFRAME:
        return f"{schema.name} lacks the column `{cases}`"
    if not isinstance(cases, pd.DataFrame):  # about the column as a whole
        return f"`{error.schema.name}` in {schema.name} can't be {cases}"
    place = cases["index"].iloc[-1]
    where = _where(table, place)
    if code in (Reason.DUPLICATES, Reason.SERIES_CONTAINS_DUPLICATES):
        return f"{schema.name} has the same row of {where} twice: not unique"
    rule = str(getattr(error.check, "error", None) or error.check)
    value = shown(str(cases["failure_case"].iloc[-1]))
    return f"`{error.schema.name}` of {where} in {schema.name} can't be {value} ({rule})"


def write(table: pd.DataFrame, folder: Path, schema: Schema) -> Path:
    """Check the table and put it in `folder/<schema.name>`, floats at full precision."""
    path = folder / str(schema.name)
    content = check(table, schema).to_csv(index=False, lineterminator="\n").encode()
    if not path.exists() or path.read_bytes() != content:
        replace_file(path, content)
    return path


def write_rows(rows: Iterable[dict[str, Any]], folder: Path, schema: Schema) -> pd.DataFrame:
    """Write the rows as `write` does; return them as a table."""
    table = frame(rows, schema)
    write(table, folder, schema)
    return table


def read(folder: Path, schema: Schema) -> pd.DataFrame:
    """The table in `folder/<schema.name>`, checked; an empty one where there is no file.

    Raises:
        TableError: The file is not a table of the schema.
    """
    path = folder / str(schema.name)
    if path.exists() and not path.is_file():
        raise TableError(f"`{path}` can't be read (it is no regular file); move it away.")
    return read_file(path, schema) if path.exists() else empty(schema)


def read_file(path: Path, schema: Schema) -> pd.DataFrame:
    """The table in a file of any name, checked.

    Raises:
        TableError: The file is not a table of the schema.
    """
    texts = {
        name: str for name, c in schema.columns.items() if isinstance(c.dtype.type, pd.StringDtype)
    }
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("its last line is not complete")
        table = pd.read_csv(
            io.StringIO(text),
            float_precision="round_trip",
            dtype=texts,
            keep_default_na=False,  # the text "NA" is a text
            na_values=[""],
        )
        # A table from before an optional setting was added has none of it.
        optional = [name for name in empty(schema) if not schema.columns[name].required]
        table = table.assign(**{name: None for name in optional if name not in table})
        if schema is RUNS:  # older ones have nothing where a setting was unset
            table = pd.DataFrame(map(used, table.to_dict("records")), columns=table.columns)
        measured = [name for name in MEASUREMENT if name in table]
        table = table.assign(**{n: table[n].astype(object).fillna(NOT_RECORDED) for n in measured})
        return check(table, schema, strict=True)[[name for name in schema.columns if name in table]]
    except (TableError, ValueError, pd.errors.ParserError) as error:
        why = one_line(str(error))
        raise TableError(f"`{path}` can't be read ({why}); move it away or restore it.") from None


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
    if {"runs", "accuracy"} <= tables.keys():
        from experiments.results.integrity import check_runs  # which needs this module

        try:
            check_runs(tables["runs"], tables["accuracy"])
        except TableError as error:
            raise TableError(f"The tables in `{folder}` don't agree: {error}.") from None
    if not tables:
        raise TableError(f"`{folder}` holds none of {', '.join(SCHEMAS)}.")
    return tables

"""Reference pages from the code: the command line's help, and the tables' columns."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
from unittest import mock

import pandera.pandas as pa

import experiments
from experiments import __main__ as cli
from experiments.results import schemas

TYPES = {"float64": "number", "int64": "integer", "Int64": "integer", "bool": "true or false"}


def command_line() -> str:
    """The help of every command, as Markdown."""
    parts = [f"```text\n{_help()}```\n"]
    parts += [f"## {name}\n\n```text\n{_help(name)}```\n" for name in (*cli.JOBS, *cli.STUDIES)]
    return "\n".join(parts)


def _help(*command: str) -> str:
    shown = io.StringIO()
    plain = {"COLUMNS": "84", "NO_COLOR": "1", "TERM": "dumb", "PYTHONWARNINGS": ""}
    with (
        mock.patch.dict(os.environ, plain),
        contextlib.redirect_stdout(shown),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*command, "--help"])
    return "\n".join(line.rstrip() for line in shown.getvalue().strip().splitlines()) + "\n"


def all_schemas() -> dict[str, pa.DataFrameSchema]:
    """The schema of every table by file name, those that studies share first."""
    names = [module.name for module in pkgutil.walk_packages(experiments.__path__, "experiments.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    found = [value for module in modules for value in vars(module).values()]
    studies = {one.name: one for one in found if isinstance(one, pa.DataFrameSchema)}
    return {**schemas.SCHEMAS, **studies}


def schema_tables() -> str:
    """The columns of each result table with their types and ranges, as Markdown."""
    return "\n".join(_schema_table(name, schema) for name, schema in all_schemas().items())


def _schema_table(name: str, schema: pa.DataFrameSchema) -> str:
    rows = [
        f"### `{name}`\n",
        "| column | type | values | may be empty |",
        "| --- | --- | --- | --- |",
    ]
    for column, rule in schema.columns.items():
        checks = "; ".join(_in_words(check) for check in rule.checks)
        empty = "yes" if rule.nullable or not rule.required else ""
        kind = TYPES.get(str(rule.dtype), "text")
        rows.append(f"| `{column}` | {kind} | {checks} | {empty} |")
    return "\n".join(rows) + "\n"


def _in_words(check: pa.Check) -> str:
    """The rule of a check, such as "in [0, 1]"."""
    found = check.statistics or {}
    if "allowed_values" in found:
        return ", ".join(f"`{value}`" for value in found["allowed_values"])
    if {"min_value", "max_value"} <= found.keys():
        return f"in [{found['min_value']}, {found['max_value']}]"
    if "min_value" in found:
        return f"at least {found['min_value']}"
    return str(check.error or check.name)

"""`results/README.md` describes every column of every table, and no other."""

import importlib
import pkgutil
import re

import pandera.pandas as pa
import pytest

import experiments
from experiments.results.schemas import PROVENANCE, RUNS, SETTING_NAMES
from support.paths import RESULTS

TEXT = (RESULTS / "README.md").read_text(encoding="utf-8")
SECTIONS = {
    match[1]: section
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)
    if (match := re.match(r"`(\w+\.csv)`", section))
}


def all_schemas():
    """Every table's schema by file name."""
    names = [module.name for module in pkgutil.walk_packages(experiments.__path__, "experiments.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    found = [value for module in modules for value in vars(module).values()]
    return {schema.name: schema for schema in found if isinstance(schema, pa.DataFrameSchema)}


SCHEMAS = all_schemas()


def described(name):
    """The columns that a file's section has a row for."""
    first_cells = re.findall(r"^\| ([^|]*) \|", SECTIONS[name], flags=re.MULTILINE)
    return {column for cell in first_cells for column in re.findall(r"`(\w+)`", cell)}


def test_every_table_has_a_section_and_every_section_a_table():
    assert SECTIONS.keys() == SCHEMAS.keys()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_column_is_described_and_no_other(name):
    columns = set(SCHEMAS[name].columns)
    elsewhere = set(PROVENANCE) | (set() if name == RUNS.name else set(SETTING_NAMES))
    assert columns - elsewhere <= described(name) <= columns


@pytest.mark.parametrize("name", PROVENANCE)
def test_the_columns_of_every_table_are_described(name):
    assert f"| `{name}` |" in TEXT

"""`results/README.md` describes every column of every table, and no other."""

import re
import sys

import pytest

from experiments.results.schemas import PROVENANCE, RUNS, SETTING_NAMES
from support.paths import RESULTS, ROOT

sys.path.append(str(ROOT / "docs"))
import generated  # noqa: E402

TEXT = (RESULTS / "README.md").read_text(encoding="utf-8")
SECTIONS = {
    match[1]: section
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)
    if (match := re.match(r"`(\w+\.csv)`", section))
}


SCHEMAS = generated.all_schemas()


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

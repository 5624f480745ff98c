"""Every table that a study or benchmark writes says which code made its rows, and when."""

import importlib
import pkgutil
from pathlib import Path

import pandas as pd
import pandera.pandas as pa
import pytest

from experiments import studies, timing
from experiments.reporting.study_output import columns, study_output
from experiments.results import provenance, schemas, tables
from experiments.results.provenance import MEASUREMENT, NOT_RECORDED, provenance_of
from experiments.studies import importance
from experiments.studies.importance import Importance

TABLE = pa.DataFrameSchema(
    {**columns(int, "n"), **schemas.PROVENANCE}, strict=True, name="table.csv"
)


def study_schemas():
    for room in (studies, timing):
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, pa.DataFrameSchema):
                    yield value


@pytest.mark.parametrize(
    "schema", [*study_schemas(), *schemas.SCHEMAS.values()], ids=lambda s: s.name
)
def test_every_schema_has_the_columns(schema):
    if schema.name != "accuracy.csv":  # whose rows join with runs.csv
        assert set(MEASUREMENT) <= schema.columns.keys()


def test_rows_of_a_study_are_of_its_code_and_this_commit_now(tmp_path):
    table = study_output(Importance(out=str(tmp_path))).table([{"n": 1}], TABLE)
    assert table["code_hash"].item() == provenance.code_hash(Path(importance.__file__))
    assert table["commit"].item() == (provenance.commit() or NOT_RECORDED)
    assert pd.Timestamp(table["measured_at"].item()).tzinfo is not None


def test_older_rows_read_as_not_recorded_and_stay_so(tmp_path):
    (tmp_path / "table.csv").write_text("n\n1\n")
    old = tables.read(tmp_path, TABLE)
    assert set(old[list(MEASUREMENT)].iloc[0]) == {NOT_RECORDED}
    both = pd.concat([old, pd.DataFrame([{"n": 2}])], ignore_index=True)
    written = study_output(Importance(out=str(tmp_path))).table(both, TABLE)
    assert written["code_hash"].iloc[0] == NOT_RECORDED != written["code_hash"].iloc[1]


def test_a_tree_with_changes_is_recorded_as_such(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *a: " M x.py" if a[0] == "status" else "abc")
    assert provenance.commit.__wrapped__() == "abc+"


def test_a_row_of_several_runs_names_every_version_and_the_latest_time():
    rows = pd.DataFrame({
        "code_hash": ["b", "a", None],
        "commit": ["1", "1", "1"],
        "measured_at": ["2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", None],
    })
    found = provenance_of(rows)
    assert found["code_hash"] == f"a b {NOT_RECORDED}"
    assert (found["commit"], found["measured_at"]) == ("1", "2026-01-02T00:00:00+00:00")

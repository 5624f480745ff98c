"""What a study has measured outlives a kill, and is taken by the same command alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from experiments.reporting import study_output as module
from experiments.reporting.study_output import columns, study_output
from experiments.results.schemas import PROVENANCE
from experiments.studies.importance import Importance

TABLE = module.pa.DataFrameSchema(
    {**columns(str, "cell"), **columns(float, "value", nullable=True), **PROVENANCE},
    strict=True,
    name="table.csv",
)


class KilledError(Exception):
    """In the place of a kill."""


def study(settings, killed_at=None):
    """A study of three cells; the cells that it measured, and its table."""
    output, measured, rows = study_output(settings), [], []

    def measure(name):
        if name == killed_at:
            raise KilledError
        measured.append(name)
        yield {"cell": name, "value": np.float32(1 / 3)}
        yield {"cell": name, "value": float("nan")}

    for name in "abc":
        rows += output.cell(name, partial(measure, name))
    return measured, output.table(rows, TABLE)


@pytest.fixture
def stopped(tmp_path):
    settings = Importance(out=str(tmp_path))
    with pytest.raises(KilledError):
        study(settings, killed_at="c")
    return settings


def test_a_killed_study_goes_on(stopped, tmp_path):
    measured, table = study(stopped)
    assert measured == ["c"]
    _, whole = study(replace(stopped, out=str(tmp_path / "whole")))
    assert table[["cell", "value"]].equals(whole[["cell", "value"]])
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["environment.json", "table.csv"]
    assert not (tmp_path / module.CELLS).exists()


def test_other_settings_or_code_measure_anew(stopped, monkeypatch):
    with pytest.raises(KilledError):
        study(replace(stopped, seed=5), killed_at="b")
    monkeypatch.setattr(module, "provenance", lambda entry: dict.fromkeys(PROVENANCE, "other"))
    measured, table = study(stopped)
    assert measured == ["a", "b", "c"]
    assert set(table["code_hash"]) == {"other"}


@pytest.mark.parametrize("content", ["", '[{"cell": "a", "va', "{}", "[1]"])
def test_a_file_that_holds_no_rows_is_measured_anew(stopped, tmp_path, content):
    for file in (tmp_path / module.CELLS).iterdir():
        file.write_text(content)
    measured, _ = study(stopped)
    assert measured == ["a", "b", "c"]

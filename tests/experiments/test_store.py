"""Nothing that was computed is lost, and nothing half-written becomes a table."""

import json
import os

import pandas as pd
import pytest

from experiments.data.sources import find_data
from experiments.results import schemas, tables
from experiments.results.store import PARTS, PLOTS, Store
from experiments.settings.run import RunSettings
from experiments.training.run import run

DIGITS = find_data("digits", None)


@pytest.fixture(scope="module")
def results():
    """Three runs that differ in their seed, as plain data."""
    common = {"n_experiences": 2, "epochs": 1, "hidden_size": 8}
    return [
        run(RunSettings("split", "digits", "domain", "naive", seed, **common), DIGITS)
        for seed in range(3)
    ]


def ids(folder):
    return list(tables.read(folder, schemas.RUNS)["run_id"])


@pytest.mark.filterwarnings("ignore:Mismatched null-like values:FutureWarning")  # pandas 2
def test_results_become_tables(tmp_path, results):
    store = Store(tmp_path)
    for result in results:
        store.add(result)
    accuracy, runs = store.write_tables()
    assert list(runs["seed"]) == [0, 1, 2]
    assert len(accuracy) == 3 * 3 * 2  # seeds x (untrained + 2) x 2
    expected = results[1].rows[5]["accuracy"]
    row = accuracy[(accuracy["seed"] == 1) & (accuracy["train_exp"] == 1)].iloc[1]
    assert row["accuracy"] == expected
    pd.testing.assert_frame_equal(tables.read(tmp_path, schemas.ACCURACY), accuracy)


@pytest.mark.parametrize("name", [PARTS, PLOTS])
def test_a_file_in_the_place_of_a_folder_is_named_before_any_run(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"`out` must be a folder .*{name} .File exists"):
        Store(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_result_survives_the_process_that_made_it(tmp_path, results):
    Store(tmp_path).add(results[0])  # killed before the tables were rebuilt
    assert Store(tmp_path).finished() == {results[0].record["run_id"]}


def test_runs_in_the_tables_outlive_their_own_files(tmp_path, results):
    store = Store(tmp_path)
    store.add(results[0])
    store.write_tables()
    for path in (tmp_path / PARTS).iterdir():
        path.unlink()  # as in a fresh clone, where only the tables are committed
    store = Store(tmp_path)
    store.add(results[1])
    store.write_tables()
    assert ids(tmp_path) == [r.record["run_id"] for r in results[:2]]


def test_a_repeated_run_replaces_its_own_rows_only(tmp_path, results):
    store = Store(tmp_path)
    for result in results[:2]:
        store.add(result)
    store.write_tables()
    again = json.loads(json.dumps(vars(results[0])))
    again["record"]["train_s"] = 123.0
    store.add(type(results[0]).sealed(**again))
    accuracy, runs = store.write_tables()
    assert len(runs) == 2
    assert list(runs["train_s"])[0] == 123.0
    assert list(runs["train_s"])[1] == results[1].record["train_s"]
    assert len(accuracy) == 12


def test_failed_runs_are_kept_and_tried_again(tmp_path, results):
    record = {**results[0].record, "status": "failed", "reason": "RuntimeError: no luck"}
    store = Store(tmp_path)
    store.add(type(results[0]).sealed(record, []))
    store.write_tables()
    assert list(tables.read(tmp_path, schemas.RUNS)["reason"]) == ["RuntimeError: no luck"]
    assert store.finished() == set()


def test_leftovers_of_a_killed_write_are_swept_and_nobody_elses_file_is(tmp_path, results):
    store = Store(tmp_path)
    store.add(results[0])
    left = [
        folder / ".half.json.a1b2c3d4.ewc-plugin.tmp" for folder in (tmp_path, tmp_path / PARTS)
    ]
    users = [tmp_path / name for name in ("my.csv.tmp", "runs.csv.bak.tmp", "a.ewc-plugin.tmp")]
    for path in (*left, *users):
        path.write_text('{"record": {')
    Store(tmp_path).write_tables()
    assert ids(tmp_path) == [results[0].record["run_id"]]
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in users)


@pytest.mark.parametrize("text", ['{"record": {', "[]", '{"record": {"run_id": 1}, "rows": []}'])
def test_a_damaged_part_never_stops_the_other_runs(tmp_path, results, text):
    lines = []
    store = Store(tmp_path, lines.append)
    store.add(results[0])
    (tmp_path / PARTS / "broken.json").write_text(text)
    assert store.finished() == {results[0].record["run_id"]}
    assert len(lines) == 1
    assert "broken.json` is not a run's result (" in lines[0]
    assert (tmp_path / PARTS / "broken.json.damaged").read_text() == text
    assert store.finished() == Store(tmp_path).finished()
    assert len(lines) == 1


def test_a_full_disk_loses_no_table(tmp_path, results, monkeypatch):
    store = Store(tmp_path)
    store.add(results[0])
    store.write_tables()
    before = (tmp_path / "runs.csv").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "replace", _no_space)
        store.add(results[1])
    assert (tmp_path / "runs.csv").read_bytes() == before
    assert Store(tmp_path).finished() == {results[0].record["run_id"]}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder that can be written to"):
        Store(tmp_path / "file")


def _no_space(*paths):
    raise OSError(28, "No space left on device")

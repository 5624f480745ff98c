"""Rows, files and checkpoints know the code that made them, and a changed value is found."""

import json
import math

import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.data.sources import find_data
from experiments.results import environment, provenance, schemas, tables
from experiments.results.provenance import code_hash, content_digest, mixed_code
from experiments.results.record import RunResult, one_line
from experiments.results.store import PARTS, Store, read_results
from experiments.settings.run import RunSettings
from experiments.sweeps import worker
from experiments.training.checkpoint import read_checkpoint
from experiments.training.run import Run, run
from support.killed import KilledError
from support.paths import RESULTS

DIGITS = find_data("digits", None)
SWEEP = ["sweep", "--dataset", "digits", "--methods", "naive", "--hidden-size", "8"]
SWEEP += ["--experiences", "2", "--epochs", "1", "--processes", "1", "--quiet", "--seeds", "0"]
CELL = RunSettings("split", "digits", "domain", "naive", 0, n_experiences=2, hidden_size=8)


@pytest.fixture(scope="module")
def result():
    return run(CELL, DIGITS)


@pytest.fixture
def folder(tmp_path, result):
    store = Store(tmp_path)
    store.add(result)
    store.write_tables()
    return tmp_path


def change(value):
    if isinstance(value, str):
        return f"{value}x"
    return not value if isinstance(value, bool) else value + 1


def test_a_row_names_its_code_commit_and_time(result):
    assert result.record["code_hash"] == code_hash()
    assert pd.Timestamp(result.record["measured_at"]).tzinfo is not None
    assert result.record["digest"] == content_digest(result.record, result.rows)


def test_the_hash_is_of_the_package_and_of_what_a_run_imports():
    names = {path.relative_to(provenance.EXPERIMENTS).as_posix() for path in _sources()}
    assert {"training/run.py", "data/tensor_path.py", "settings/run.py"} <= names
    assert not any(name.startswith(("reporting", "studies", "sweeps")) for name in names)


def _sources():
    return provenance._imported(provenance.ENTRY)


def changes(result):
    for name, value in result.record.items():
        if name != "digest" and value not in (None, "") and value == value:
            yield "record", name, value
    for name, value in result.rows[3].items():
        if value is not None and name not in ("train_exp", "eval_exp"):
            yield "row", name, value


def test_any_changed_value_changes_the_digest(result):
    digest = result.record["digest"]
    n = 0
    for where, name, value in changes(result):
        record, rows = dict(result.record), [dict(row) for row in result.rows]
        (record if where == "record" else rows[3])[name] = change(value)
        assert content_digest(record, rows) != digest, name
        n += 1
    assert n > 30
    assert content_digest(result.record, result.rows[:-1]) != digest


def test_the_digest_survives_json_csv_and_the_order_of_rows(folder, result):
    read = tables.load(folder)
    rows = read["accuracy"].to_dict("records")
    assert content_digest(read["runs"].to_dict("records")[0], rows[::-1]) == result.record["digest"]
    part = json.loads(next((folder / PARTS).glob("*.json")).read_text())
    assert content_digest(part["record"], part["rows"]) == result.record["digest"]


EDITS = [
    ("runs.csv", "digest", None),
    ("accuracy.csv", "loss", 0.5),
    ("accuracy.csv", "n_samples", 7),
    ("accuracy.csv", "accuracy", 0.123),
    ("runs.csv", "train_s", 1.0),
    ("runs.csv", "peak_rss_mb", 1.0),
    ("runs.csv", "penalty_state_mb", 1.0),
    ("runs.csv", "reason", "none"),
    ("runs.csv", "status", "diverged"),
    ("runs.csv", "code_hash", "0123456789ab"),
    ("runs.csv", "measured_at", "2020-01-01"),
]


@pytest.mark.parametrize(("name", "column", "value"), EDITS)
def test_an_edit_of_a_table_is_refused_wherever_it_is_read(folder, capsys, name, column, value):
    table = pd.read_csv(folder / name, float_precision="round_trip")
    table[column] = table[column].astype(object)
    table.loc[1 if name == "accuracy.csv" else 0, column] = value
    table.to_csv(folder / name, index=False)
    with pytest.raises(tables.TableError, match="don't agree"):
        tables.load(folder)
    assert main(["table", str(folder)]) == 2
    assert "don't agree" in capsys.readouterr().err
    for part in (folder / PARTS).glob("*.json"):
        part.unlink()
    with pytest.raises(tables.TableError, match="don't agree"):
        read_results(folder)


def test_committed_tables_from_before_are_read_as_not_recorded():
    runs = pd.DataFrame({"code_hash": [None, None, "a"]})
    assert mixed_code(runs[:2]) == ""
    assert "2 by not recorded, 1 by a" in mixed_code(runs)
    assert len(tables.load(RESULTS / "main")["runs"])


def test_a_folder_of_other_code_is_added_to_only_when_told_to(folder, result, capsys):
    record = {**result.record, "code_hash": "0123456789ab"}
    Store(folder).add(RunResult.sealed(record, result.rows))
    assert main([*SWEEP, "--out", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with 1 runs of other code (0123456789ab)" in line
    assert main([*SWEEP[:-3], "--seeds", "0", "--mix-code", "--out", str(folder)]) == 0
    assert "2 versions of the code" in capsys.readouterr().out
    assert main(["table", str(folder)]) == 0
    assert "2 versions of the code" in capsys.readouterr().err
    assert main(["compare", str(folder)]) == 0
    assert "2 versions of the code" in capsys.readouterr().out
    page = folder / "page.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    assert "2 versions of the code" in page.read_text(encoding="utf-8")
    hashes = tables.load(folder)["summary"]["code_hash"]
    assert set(hashes) == {"0123456789ab", code_hash()}


def test_a_worker_of_other_code_runs_nothing(monkeypatch):
    with pytest.raises(worker.OtherCodeError, match="start it anew"):
        worker.run_cell("0123456789ab", CELL, DIGITS, None, None, lambda event: None)


def killed(path):
    def observe(done, accuracy):
        raise KilledError

    with pytest.raises(KilledError):
        Run(CELL, DIGITS).run(observe, path)


def test_no_flipped_bit_of_a_checkpoint_is_gone_on_with(tmp_path):
    path, lines = tmp_path / "checkpoint", []
    killed(path)
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 40):
        flipped = bytearray(content)
        flipped[place] ^= 16
        path.write_bytes(flipped)
        assert read_checkpoint(path, CELL, DIGITS, lines.append) is None
    assert len(lines) >= 40
    assert all("its checkpoint is damaged; the run starts anew" in line for line in lines)
    path.write_bytes(content)
    assert read_checkpoint(path, CELL, DIGITS) is not None


def test_a_checkpoint_of_other_code_is_not_gone_on_with(tmp_path, monkeypatch):
    path, lines = tmp_path / "checkpoint", []
    killed(path)
    monkeypatch.setattr("experiments.training.checkpoint.code_hash", lambda: "0123456789ab")
    assert read_checkpoint(path, CELL, DIGITS, lines.append) is None
    assert lines == [f"{CELL.run_id}: its checkpoint is of another code; the run starts anew."]


@pytest.mark.parametrize(
    "text", ["a\rb\nc", "NA", "nan", "x" * 2000, "\x1b[31m", "\ud800", '"', "λ"]
)
def test_any_reason_comes_back_from_the_tables(tmp_path, text):
    reason = one_line(text)
    store = Store(tmp_path)
    failure = run(CELL, DIGITS)
    store.add(RunResult.sealed({**failure.record, "status": "failed", "reason": reason}, []))
    store.write_tables()
    for part in (tmp_path / PARTS).glob("*.json"):
        part.unlink()
    (found,) = tables.read(tmp_path, schemas.RUNS)["reason"]
    assert found == reason
    assert Store(tmp_path).finished() == set()
    assert not math.isnan(len(reason))


@pytest.mark.parametrize(
    ("state", "commit", "changed"), [("abc", "abc", False), ("abc+", "abc", True), (None,) * 3]
)
def test_the_environment_says_whether_sources_were_changed(
    tmp_path, monkeypatch, state, commit, changed
):
    monkeypatch.setattr(environment, "commit", lambda: state)
    environment.write_environment(tmp_path, None)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert (found["commit"], found["uncommitted_changes"]) == (commit, changed)

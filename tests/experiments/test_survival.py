"""Kills, full disks, edited files and clocks that jump: complete tables or one clear line."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.results import schemas, tables
from experiments.results.store import PARTS, PLAN, Store
from support.paths import ROOT

TIMES = ["train_s", "fisher_s", "eval_s", "peak_rss_mb", "measured_at", "digest"]
SWEEP = ["sweep", "--dataset", "digits", "--methods", "naive", "ewc", "--ewc-lambda", "10"]
SWEEP += [
    "--hidden-size",
    "8",
    "--experiences",
    "2",
    "--epochs",
    "1",
    "--processes",
    "1",
    "--quiet",
]
SWEEP += ["--benchmark", "split", "--scenario", "domain", "--seeds", "0", "1"]


def complete(folder):
    """The tables without what depends on the clock or the machine."""
    found = tables.load(folder)
    summary = found["summary"]
    summary = summary[~summary["metric"].isin(TIMES)].drop(columns="measured_at")
    summary = summary.reset_index(drop=True)
    return found["accuracy"], found["runs"].drop(columns=TIMES), summary


def assert_same_tables(one, other):
    for a, b in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([*SWEEP, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(undisturbed, tmp_path):
    """The folder of the undisturbed sweep, to be spoilt."""
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(undisturbed), str(folder)], check=True)
    return folder


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path, undisturbed):
    n = 50
    arguments = [str(tmp_path), str(n), *SWEEP, "--checkpoint"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "kill_loop.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    kills, sweeps = map(int, done.stdout.split())
    assert kills == n
    expected = complete(undisturbed)
    for i in range(sweeps):
        assert_same_tables(complete(tmp_path / str(i)), expected)
        files = [p for p in (tmp_path / str(i)).rglob("*") if p.is_file() and p.name != PLAN]
        left = {p.suffix for p in files}
        assert left <= {".csv", ".json", ".png", ""}  # no temporary file, no checkpoint


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    """`kill -9` of the whole command after experience 2 of 4, in the middle of training on."""
    long = [
        "sweep",
        "--dataset",
        "digits",
        "--methods",
        "ewc",
        "--ewc-lambda",
        "10",
        "--seeds",
        "0",
    ]
    long += ["--experiences", "4", "--epochs", "30", "--processes", "1", "--quiet"]
    command = [sys.executable, "-m", "experiments", *long]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--out", str(whole)], cwd=ROOT, check=True)
    process = subprocess.Popen([*command, "--checkpoint", "--out", str(killed)], cwd=ROOT)
    seen, deadline = set(), time.monotonic() + 120
    while len(seen) < 2 and time.monotonic() < deadline:
        seen |= {path.stat().st_mtime_ns for path in (killed / PARTS).glob("*.checkpoint")}
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list((killed / PARTS).glob("*.json"))
    subprocess.run([*command, "--checkpoint", "--out", str(killed)], cwd=ROOT, check=True)
    assert_same_tables(complete(killed), complete(whole))
    assert not list(killed.rglob("*.checkpoint"))


def test_a_clock_that_jumps_changes_nothing(tmp_path, undisturbed, monkeypatch):
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
    assert main([*SWEEP, "--out", str(tmp_path)]) == 0
    assert_same_tables(complete(tmp_path), complete(undisturbed))
    runs = tables.load(tmp_path)["runs"]
    assert runs[["train_s", "fisher_s", "eval_s"]].to_numpy().max() < 600


@pytest.mark.parametrize("call", [3, 6, 9])
def test_a_full_disk_is_said_and_the_command_goes_on_later(
    tmp_path, undisturbed, monkeypatch, capsys, call
):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) >= call:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main([*SWEEP, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert not list(tmp_path.rglob("*.tmp"))
    assert main([*SWEEP, "--out", str(tmp_path)]) == 0
    assert_same_tables(complete(tmp_path), complete(undisturbed))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_really_full_disk_and_then_a_read_only_one(small_disk, undisturbed, capsys):
    arguments = [*SWEEP, "--out", str(small_disk)]
    (small_disk / "ballast").write_bytes(bytes(30_000))
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    remount(small_disk, "ro")
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`out` must be a folder that can be written to" in line
    assert "Read-only file system" in line
    remount(small_disk, "rw,size=16m")
    assert main(arguments) == 0
    assert_same_tables(complete(small_disk), complete(undisturbed))


def edit_csv(folder, name, change):
    path = folder / name
    table = pd.read_csv(path, float_precision="round_trip")
    change(table).to_csv(path, index=False)


def without_parts(folder):
    for path in (folder / PARTS).glob("*.json"):
        path.unlink()


def put(column, value, row=0):
    def change(table):
        table[column] = table[column].astype(object)
        table.loc[row, column] = value
        return table

    return change


EDITS = {
    "an accuracy": ("accuracy.csv", put("accuracy", 0.123, row=5), "`average_accuracy` of"),
    "a lambda": ("runs.csv", put("ewc_lambda", 11.0), "are not those of its id"),
    "a lambda of rows": ("accuracy.csv", put("ewc_lambda", 11.0), "not the same in both tables"),
    "a metric": ("runs.csv", put("forgetting", 0.5), "`forgetting` of"),
    "an id": ("runs.csv", put("config_hash", "0123456789"), "are not those of its id"),
    "a row less": ("accuracy.csv", lambda t: t.drop(index=3), "has 5 rows of accuracy, not 6"),
    "a run less": ("runs.csv", lambda t: t.drop(index=0), "which runs.csv lacks"),
    "an impossible run": ("runs.csv", put("epochs", 0), "can't be a run: `epochs` must be a whole"),
    "a row twice": ("accuracy.csv", lambda t: pd.concat([t, t[:1]]), "not unique"),
    "an older schema": ("runs.csv", lambda t: t.drop(columns="epochs"), "epochs"),
    "a newer schema": ("runs.csv", lambda t: t.assign(new=1), "has a column `new`"),
    "a text for a number": ("runs.csv", put("epochs", "x", row=1), "-s1 in runs.csv can't be x"),
    "a number out of range": ("runs.csv", put("train_s", -1), "-s0 in runs.csv can't be -1.0"),
    "a word of ours": ("runs.csv", put("status", "good"), "`status` of split-digits"),
    "a part of an epoch": ("runs.csv", put("epochs", 1.5), "`epochs` of split"),
    "a part of a sample": ("accuracy.csv", put("n_samples", 90.5), "`n_samples` of split"),
    "another spelling": ("runs.csv", put("learning_rate", "1_000"), "`learning_rate` of split"),
    "no value": ("accuracy.csv", put("n_samples", None), "`n_samples` of split-digits"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_table_is_noticed_or_mended(copy, undisturbed, capsys, edit):
    name, change, said = EDITS[edit]
    edit_csv(copy, name, change)
    try:
        tables.read(copy, schemas.SCHEMAS[name])
    except tables.TableError as error:
        assert len(str(error).replace(str(copy), "")) < 300  # no dump
        schema_fits = False
    else:
        schema_fits = True
    if schema_fits:  # the runs' own files are there, and they count
        Store(copy).write_tables()
        assert_same_tables(complete(copy), complete(undisturbed))
        edit_csv(copy, name, change)
    before = (copy / name).read_bytes()
    without_parts(copy)
    assert main([*SWEEP, "--out", str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert (copy / name).read_bytes() == before


def test_a_table_from_before_an_optional_setting_is_read(copy, undisturbed):
    edit_csv(copy, "runs.csv", lambda table: table.drop(columns=["normalize", "penalty_step"]))
    without_parts(copy)
    assert main([*SWEEP, "--out", str(copy)]) == 0
    assert_same_tables(complete(copy), complete(undisturbed))


@pytest.mark.parametrize("name", ["runs.csv", "accuracy.csv"])
def test_a_table_that_is_cut_off_is_noticed(copy, capsys, name):
    content = (copy / name).read_bytes()
    for length in (len(content) - 2, len(content) // 2):
        (copy / name).write_bytes(content[:length])
        assert main([*SWEEP, "--out", str(copy)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name}` can't be read" in line
    (copy / name).unlink()  # what the message says to do
    assert main([*SWEEP, "--out", str(copy)]) == 0
    assert (copy / name).read_bytes() == content


PART_EDITS = {
    "accuracy": lambda part: part["rows"][-1].update(accuracy=0.123),
    "row": lambda part: part["rows"].pop(),
    "lambda": lambda part: part["record"].update(ewc_lambda=11.0),
    "seed": lambda part: part["rows"][0].update(seed=7),
    "name": lambda part: part["record"].update(run_id="other"),
    "column": lambda part: part["record"].update(new=1),
    "missing": lambda part: part["record"].pop("epochs"),
    "rows": lambda part: part.pop("rows"),
    "part of an epoch": lambda part: part["record"].update(epochs=1.5),
    "text": lambda part: part["record"].update(epochs="1"),
    "no integer": lambda part: part["record"].update(epochs=1e300),
    "part of a sample": lambda part: part["rows"][0].update(n_samples=90.5),
}


@pytest.mark.parametrize("edit", PART_EDITS)
def test_an_edited_part_is_named_set_aside_and_made_again(copy, undisturbed, capsys, edit):
    path = sorted((copy / PARTS).glob("*.json"))[1]
    part = json.loads(path.read_text())
    PART_EDITS[edit](part)
    path.write_text(json.dumps(part))
    assert main([*SWEEP, "--out", str(copy)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path.name}` is not a run's result (" in line
    assert json.loads((path.parent / f"{path.name}.damaged").read_text()) == part
    assert_same_tables(complete(copy), complete(undisturbed))


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def with_its_new_name_taken(path):
    path.write_text("")
    (path.parent / f"{path.name}.damaged" / "full").mkdir(parents=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("spoil", [as_folder, as_pipe, with_its_new_name_taken])
def test_what_is_no_file_in_the_place_of_a_part_is_named_once(copy, undisturbed, capsys, spoil):
    for name in ("runs.csv", "accuracy.csv"):
        (copy / name).unlink()
    path = sorted((copy / PARTS).glob("*.json"))[1]
    spoil(path)
    assert main([*SWEEP, "--out", str(copy)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path.name}` is not a run's result (" in line
    assert_same_tables(complete(copy), complete(undisturbed))


@pytest.mark.slow
def test_ctrl_c_at_the_terminal_ends_in_one_line(tmp_path):
    """It reaches every process of the command at once, also while they start."""
    longer = {"--processes": "2", "--epochs": "30"}
    arguments = [longer.get(before, one) for before, one in zip(["", *SWEEP], SWEEP, strict=False)]
    arguments += ["--out", str(tmp_path)]
    for wait_for in (0, 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments", *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (tmp_path / PARTS / "lock").exists():
            time.sleep(0.05)
        while time.monotonic() < deadline and len(list(tmp_path.rglob("*s?.json"))) < wait_for:
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        # Python may have itself killed in place of that, if it was at an import; 130 to a shell.
        assert process.returncode in (130, -signal.SIGINT)
        assert errors.decode().splitlines() == [
            "Interrupted; the same command goes on from what is stored."
        ]
    assert 1 <= len(Store(tmp_path).finished()) <= 4


@pytest.mark.slow
def test_ctrl_c_while_modules_are_imported_ends_in_one_line(tmp_path):
    for seconds in (0.4, 0.8, 1.2):
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments", *SWEEP, "--out", str(tmp_path)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert len(errors.splitlines()) == 1


def test_the_environment_is_that_of_the_command_that_made_the_rows(copy):
    before = (copy / "environment.json").read_bytes()
    assert main([*SWEEP, "--out", str(copy)]) == 0
    assert (copy / "environment.json").read_bytes() == before
    assert main([*SWEEP, "--out", str(copy), "--force"]) == 0
    assert (copy / "environment.json").read_bytes() != before

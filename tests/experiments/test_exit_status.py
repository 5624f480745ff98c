"""Exit codes, last lines and terminals: a failure is a failure, and every stream takes words."""

import io
import os
import shutil
import signal
import sys

import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.command_line import write_ascii_if_needed
from experiments.data.sources import CorruptDataError, find_data
from experiments.results.store import Store
from experiments.sweeps import exit_status

QUICK = ["sweep", "--dataset", "digits", "--methods", "naive", "--hidden-size", "8"]
QUICK += ["--experiences", "2", "--epochs", "1", "--processes", "1", "--seeds", "0"]


def runs(*statuses, lambdas=None):
    n = len(statuses)
    return pd.DataFrame({
        "run_id": [f"r{i}" for i in range(n)],
        "status": statuses,
        "reason": [f"why {i}" for i in range(n)],
        "benchmark": "split",
        "dataset": "digits",
        "scenario": "task",
        "method": "ewc",
        "ewc_lambda": lambdas or [1.0] * n,
        "learning_rate": 0.1,
    })


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (runs("ok", "ok"), ""),
        (runs("ok", "failed"), "error: 1 of 2 runs did not end well; r1 failed: why 1"),
        (runs("diverged", "ok"), "error: 1 of 2 runs did not end well; r0 diverged: why 0"),
        (runs("ok", "diverged", lambdas=[1.0, 1e9]), ""),
        (
            runs("failed", "diverged", lambdas=[1.0, 1e9]),
            "error: 1 of 2 runs did not end well; r0 failed: why 0",
        ),
    ],
)
def test_the_last_line_counts_what_did_not_end_well(table, expected):
    exit_status.note(table)
    assert exit_status.last_line() == expected
    assert exit_status.last_line() == ""


def test_a_failed_run_ends_the_command_with_1_and_its_reason(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no luck")

    monkeypatch.setattr("experiments.training.run.make_model", fail)
    assert main([*QUICK, "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "1 of 1 runs did not end well;" in shown.err.splitlines()[-1]
    assert "failed: RuntimeError: no luck" in shown.err.splitlines()[-1]
    assert f"1 runs and 0 checks begin, 1 at a time; results go to {tmp_path}." in shown.out


def test_a_result_that_was_taken_away_is_no_success(tmp_path, monkeypatch, capsys):
    add = Store.add

    def add_and_take_away(store, result):
        add(store, result)
        shutil.rmtree(store.folder)

    monkeypatch.setattr(Store, "add", add_and_take_away)
    assert main([*QUICK, "--out", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 1 of 1 runs did not end well; ")
    assert last.endswith("gone: its file was taken from the folder")


def test_a_folder_that_became_a_file_ends_in_one_line_that_claims_nothing(
    tmp_path, monkeypatch, capsys
):
    add, out = Store.add, tmp_path / "out"

    def add_and_replace(store, result):
        add(store, result)
        shutil.rmtree(store.folder)
        store.folder.write_text("")

    monkeypatch.setattr(Store, "add", add_and_replace)
    assert main([*QUICK, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(out) in line
    assert line.endswith("; the same command goes on from what is stored.")


def test_a_file_that_can_not_be_replaced_is_named(tmp_path, capsys):
    (tmp_path / "environment.json").mkdir()
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: Is a directory {tmp_path}/environment.json; ")


def test_a_terminal_without_utf8_gets_ascii(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert "mean +- 95 % interval" in text
    assert "lambda" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1252"])
def test_no_letter_stops_a_stream(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    write_ascii_if_needed(stream)
    stream.write("λ ± ─ │ 漢 \ud800 é")
    stream.flush()


def test_a_stream_that_encodes_nothing_stays_as_it_is():
    stream = io.StringIO()
    write_ascii_if_needed(stream)
    stream.write("λ")
    assert stream.getvalue() == "λ"


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"]], ids=" ".join)
def test_a_reader_that_ended_is_no_error_message(monkeypatch, capsys, arguments):
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(arguments) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_can_not_be_written_is_an_error_in_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line


def test_a_command_without_an_output_stream_works(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--help"]) == 0


def test_a_corrupt_archive_never_becomes_the_digits(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"not this")

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    with pytest.raises(CorruptDataError, match="with a wrong checksum"):
        find_data(None, str(tmp_path))


@pytest.mark.parametrize(
    "line",
    [
        *("demonstration --rounds 0", "demonstration --samples 0", "identities --samples 0"),
        *("demonstration --learning-rate nan", "identities --steps -1", "parity --seeds -1"),
        *("penalty-speed --steps 0", "penalty-speed --threads 0", "penalty-speed --models x"),
        *("lambda-translation --seeds", "normalized-lambda --seeds", "laplace --n 0"),
        *("sweep-speed --rounds 0", "fisher-speed --device x"),
    ],
)
def test_studies_refuse_nonsense_in_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")


def test_a_command_without_streams_ends_with_its_status(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["sweep", "--nonsense"]) == 2


@pytest.mark.parametrize("columns", ["0", "1"])
def test_an_error_is_seen_whatever_the_terminals_width(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["sweep", "--nonsense"]) == 2
    assert "Unrecognized options: --nonsense" in capsys.readouterr().err

"""The command line as a user meets it: the main job end to end, and bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from experiments.__main__ import JOBS, STUDIES, main
from experiments.command_line import parse
from experiments.data.sources import UNPACKED_MD5
from experiments.results import tables
from experiments.settings import grids
from experiments.settings.grids import Sweep
from support.paths import ROOT

CORRUPT = "corrupt"  # a folder with damaged images
TINY = ["--experiences", "2", "--epochs", "1", "--hidden-size", "8", "--methods", "naive"]
QUICK = ["--dataset", "digits", "--experiences", "2", "--epochs", "1", "--processes", "1"]


WHOLE = "must be a whole number"
BAD_INPUT = [
    ("permuted-mnist --ewc-lambda -1", "`ewc_lambda` must be a finite number, >= 0 and <= 1e+30"),
    ("permuted-mnist --ewc-lambda nan", "`ewc_lambda` must be a finite number"),
    ("permuted-mnist --ewc-lambda 1e39", "`ewc_lambda` must be a finite number"),
    ("permuted-mnist --experiences 0", f"`experiences` {WHOLE}, >= 1 and <= 1000, got 0"),
    ("permuted-mnist --experiences 10000000000", f"`experiences` {WHOLE}, >= 1 and <= 1000"),
    ("split-mnist --experiences 3", "`experiences` must be a divisor of 10 classes"),
    ("split-mnist --experiences 20", "`experiences` must be a divisor of 10 classes"),
    ("split-mnist --seeds -1", f"`seeds` {WHOLE}, >= 0 and <= 4294967295, got -1"),
    ("split-mnist --seeds", "`seeds` must be a non-empty list, got ()"),
    ("split-mnist --epochs 0", f"`epochs` {WHOLE}, >= 1 and <= 100000, got 0"),
    ("split-mnist --epochs 100000000000000000000", f"`epochs` {WHOLE}"),
    ("split-mnist --hidden-size 99999999999999999999", f"`hidden_size` {WHOLE}"),
    ("split-mnist --batch-size 99999999999999999999", f"`batch_size` {WHOLE}"),
    ("split-mnist --hidden-layers 3000", f"`hidden_layers` {WHOLE}, >= 1 and <= 100"),
    ("split-mnist --dropout 1", "`dropout` must be a finite number, >= 0 and below 1, got 1.0"),
    ("split-mnist --processes 0", f"`processes` {WHOLE}, >= 1 and <= 1024, got 0"),
    ("split-mnist --processes 100000000000000000000", f"`processes` {WHOLE}"),
    ("split-mnist --processes 2.5", "`--processes` must be a whole number, got '2.5'."),
    ("split-mnist --jobs 2", "`--jobs` is now called `--processes`"),
    ("demonstration --importance 2", "`--importance` is now called `--ewc-lambda`"),
    ("split-mnist --device warp", "`device` must be one that torch can use here"),
    ("split-mnist --device cpu:3", "`device` must be one that torch can use here, got 'cpu:3'"),
    ("split-mnist --device meta", "`device` must be one that torch can use here, got 'meta'"),
    ("split-mnist --device privateuseone", "`device` must be one that torch can use here"),
    ("split-mnist --mode online", "`decay_factor` must be between 0 and 1"),
    ("split-mnist --decay-factor 1", "`decay_factor` must be unset in mode separate"),
    ("split-mnist --learning-rate inf", "`learning_rate` must be a finite number, above 0"),
    ("split-mnist --learning-rate 0", "`learning_rate` must be a finite number, above 0"),
    ("split-mnist --scenario class", "`ewc_lambda` must be given for avalanche-ewc"),
    ("split-mnist --out /proc/nothing", "`out` must be a folder that can be written to"),
    ("split-mnist --methods ewx", "`methods` must be one of naive, avalanche-ewc"),
    ("split-mnist --fisher-type exakt", "invalid choice 'exakt' for argument '--fisher-type'"),
    ("permuted-mnist --scenario class", "invalid choice 'class' for argument '--scenario'"),
    ("sweep --scenario class", "`scenario` must be one that the benchmark has"),
    ("sweep --normalize mean", "`ewc_lambda` must be given with `normalize` mean"),
    ("sweep --epochs 1 --epochs 2", "`--epochs` must be given once, got 2 times"),
    ("sweep --force --force", "`--force` must be given once, got 2 times"),
    ("sweep --no-force", "Unrecognized options: --no-force"),
    ("sweep --seeds 0,x", "`--seeds` must be a whole number or several, got ['0', 'x']."),
    ("sweep --ewc-lambda 1 x", "`--ewc-lambda` must be a number or several, got ['1', 'x']."),
    ("fisher-speed --rounds 2.5", "`--rounds` must be a whole number, got '2.5'."),
    ("penalty-speed --avalanche-limit-mib x", "`--avalanche-limit-mib` must be a number, got 'x'."),
    ("sweep --batch_size 1 --batch-size=2", "`--batch-size` must be given once, got 2 times"),
    ("split-mnist --ewc-lamda 1", "--ewc-lamda, 1; did you mean --ewc-lambda?"),
    ("table --formet csv", "--formet, csv; did you mean --format?"),
    ("slpit-mnist", "`slpit-mnist` is not a command; did you mean split-mnist?"),
    ("sweep --config none.toml", "`config` must be a readable TOML file, got none.toml"),
    (f"sweep --config {'x' * 300}", "`config` must be a readable TOML file, got xxx"),
    ("sweep --config= --quiet", "`config` must be a readable TOML file, got ''"),
    ("sweep --seeds 0 1 0", "`seeds` must hold each value once, got 0 twice"),
    ("identities --steps 3 3", "`steps` must hold each value once, got 3 twice"),
    ("penalty-speed --models cnn cnn", "`models` must hold each value once, got cnn twice"),
    ("identities --samples 2000", "`samples` must be <= 1437, the number of training images"),
    ("laplace --n 9", "`n` must be a whole number, >= 10 and <= 10000, got 9"),
    ("laplace --n 20", "`pictured` must be one of `n` (20,), got 100"),
    ("laplace --factors 2", "`factors` must be odd"),
    ("parity --seeds 0 --tuning-seeds 0", "`seeds` must be others than `tuning_seeds`, got 0"),
    ("drop-in --seeds 0 --tuning-seeds 0", "`seeds` must be others than `tuning_seeds`, got 0"),
    ("factorial --seeds 1 --tuning-seeds 1", "`seeds` must be others than `tuning_seeds`, got 1"),
    ("parity --tables-only", "`tables_only` needs runs, got runs/parity/curves without any"),
    ("reproduce --tables-only", "`tables_only` needs runs, got runs/reproduce/kirkpatrick2017"),
    ("sweep --out=", "`out` must be a string that is not empty or unset, got ''"),
    ("sweep --scheduler=", "`scheduler` must be a string that is not empty or unset, got ''"),
    (
        f"split-mnist --scheduler tcp://127.0.0.1:9 {' '.join(TINY)}",
        "`scheduler` must be the address of a running Dask scheduler, got tcp://127.0.0.1:9",
    ),
    (
        f"split-mnist --data-root {CORRUPT}",
        "holds a corrupt MNIST file (train-images-idx3-ubyte, train-labels-idx1-ubyte",
    ),
]


@pytest.mark.parametrize(("line", "said"), BAD_INPUT)
def test_bad_input_gets_one_clear_line_and_exit_code_2(line, said, capsys, monkeypatch, tmp_path):
    arguments = line.split()
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / CORRUPT / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in UNPACKED_MD5:
        (raw / name).write_bytes(b"not this")
    of_images = [*JOBS, "parity", "drop-in", "factorial", "reproduce"]
    needs_a_dataset = arguments[0] in of_images and CORRUPT not in arguments
    more = ["--dataset", "digits"] if needs_a_dataset else []
    assert main([*arguments, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize("option", ["--device", "--dataset", "--data-path", "--nonsense"])
def test_an_error_is_short_whatever_was_given(option, capsys):
    assert main(["sweep", option, "x" * 50_000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 1000


STUDIES_WITH_OUT = ["demonstration", "laplace", "identities", "importance", "lambda-translation"]
STUDIES_WITH_OUT += ["fisher-speed", "penalty-speed", "sweep-speed"]


@pytest.mark.parametrize("name", STUDIES_WITH_OUT)
@pytest.mark.parametrize("out", ["file", "file/folder"])
def test_a_study_refuses_its_folder_before_it_computes(name, out, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    digits = [] if name in ("laplace", "identities", "fisher-speed", "penalty-speed") else QUICK[:2]
    assert main([name, *digits, "--out", out]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"`out` must be a folder that can be written to, got {out}" in printed.err


def test_a_deleted_current_folder_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["laplace", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: The current folder was deleted; change to one that is there."


def test_a_study_that_diverges_says_so(tmp_path, capsys):
    arguments = ["--samples", "20", "--steps", "0", "3", "--seeds", "0", "--learning-rate", "1e6"]
    assert main(["identities", *arguments, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "The training diverged: `" in line
    assert not list(tmp_path.glob("*.csv"))


def test_lists_take_spaces_or_commas():
    expected = parse("sweep", Sweep, ["--seeds", "1", "2", "--ewc-lambda", "3", "4"], "")
    for line in ("--seeds 1,2 --ewc-lambda 3,4", "--seeds=1,2 --ewc-lambda=3,4 --out=a,b"):
        found = parse("sweep", Sweep, line.split(), "")
        assert (found.seeds, found.ewc_lambda) == (expected.seeds, expected.ewc_lambda)
    assert found.out == "a,b"  # no list


def test_device_auto_is_a_gpu_if_there_is_one(monkeypatch):
    def devices():
        return parse("sweep", Sweep, ["--device", "auto"], "").device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(grids, "check_device", lambda device: None)
    assert devices() == "cuda"


@pytest.mark.parametrize("name", [*JOBS, *STUDIES])
def test_help_has_no_filler_and_groups_every_setting_of_a_run(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for filler in ("{None", "(default: )", ", --no-"):
        assert filler not in shown
    if name == "sweep":
        titles = re.findall(r"^\W+((?:[a-z-]+ )?options) \W+$", shown, re.M)
        assert titles == [
            "options",
            "benchmark options",
            "training options",
            "method options",
            "where-and-how options",
        ]
        assert "--" not in shown.split(titles[1])[0].split("--help")[1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(capsys):
    assert main(["--tyro-print-completion", "bash"]) == 0
    program = (
        capsys.readouterr().out
        + """
complete_words() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    $(complete -p experiments | cut -d' ' -f3)
    echo "${COMPREPLY[@]}"
}
complete_words experiments spl
complete_words experiments sweep --ewc-
"""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["split-mnist", "--ewc-lambda"]


def test_a_table_is_of_ones_own_newest_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    for name in ("table", "compare"):
        assert main([name]) == 0
        assert "results/main: committed results, since there are none" in capsys.readouterr().err
    for seed in ("0", "1"):
        out = ["--out", f"runs/seed-{seed}", "--quiet"]
        assert main(["split-mnist", *TINY, *QUICK[:2], "--seeds", seed, *out]) == 0
    for name in ("table", "compare", "report"):
        assert main([name]) == 0
        printed = capsys.readouterr()
        assert "runs/seed-1: the newest folder below runs/" in printed.err
    assert "runs/seed-1" in printed.out


def command(*arguments, folder):
    return [sys.executable, "-m", "experiments", *arguments, "--out", str(folder)]


def test_a_job_leaves_tables_plots_and_words_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    def run_main(*arguments):
        assert main([*arguments, "--out", str(tmp_path)]) == 0
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["split-mnist", *QUICK, "--scenario", "domain", "--ewc-lambda", "100"]
    printed = run_main(*arguments, "--seeds", "0", "1")
    assert "[8/8" in printed
    assert "Split digits, domain-incremental: EWC, per sample, λ = 100, seed 1: accuracy" in (
        printed.replace("\N{NO-BREAK SPACE}", " ")
    )
    assert "--dry-run lists the runs" in printed
    assert "EWC, per sample" in printed
    assert "3 of 3 checks hold" in printed
    assert "Split digits, domain-incremental: EWC, per sample, predicted, λ" in printed
    found = tables.load(tmp_path)
    assert set(found) == {"accuracy", "runs", "summary", "comparisons", "checks"}
    assert set(found["runs"]["method"]) == {"naive", "avalanche-ewc", "ewc", "joint"}
    assert (found["runs"]["status"] == "ok").all()
    assert list(found["checks"]["verdict"]) == ["equal"] * 3
    assert found["checks"]["largest_relative_error"].iloc[0] == 0.0
    assert set(found["comparisons"]["n"]) == {2}
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["dataset"] == "digits"
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "matrix-split-digits-domain.png",
        "accuracy-split-digits-domain.png",
        "differences.png",
    }
    before = found["accuracy"]
    printed = run_main(*arguments, "--seeds", "0", "1", "2")
    assert "8 of 12 runs are done already" in printed
    after = tables.load(tmp_path)["accuracy"]
    kept = after[after["run_id"].isin(before["run_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
    printed = run_main(*arguments, "--seeds", "0", "--force")
    assert "[4/4" in printed
    pd.testing.assert_frame_equal(tables.load(tmp_path)["accuracy"], after)  # same accuracies


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path, capsys):
    arguments = ["permuted-mnist", *QUICK[:-2], "--seeds", "0", "1"]
    for n in ("1", "2"):
        assert main([*arguments, "--processes", n, "--out", str(tmp_path / n)]) == 0
    one, two = (tables.load(tmp_path / n)["accuracy"] for n in ("1", "2"))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_job_goes_on_where_it_was(tmp_path, stop, capsys):
    arguments = ["permuted-mnist", *QUICK[:2], "--experiences", "3", "--epochs", "6"]
    process = subprocess.Popen(
        command(*arguments, folder=tmp_path),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    parts = tmp_path / "parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    if stop == signal.SIGINT:
        assert b"Interrupted" in errors
        assert b"Traceback" not in errors
    stored = len(list(parts.glob("*.json")))
    assert 2 <= stored < 12
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{stored} of 12 runs are done already" in printed
    assert len(tables.load(tmp_path)["runs"]) == 12
    assert not list(tmp_path.glob("**/*.tmp"))

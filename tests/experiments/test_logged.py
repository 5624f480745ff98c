"""Files of `TidyCSVLogger` are read like the results of the experiments."""

import re
import shutil

import pandas as pd
import pytest
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin

from ewc_plugin import DiagonalEWCPlugin, TidyCSVLogger
from experiments.__main__ import main
from experiments.results.logged import load_results
from experiments.results.metrics import continual_metrics
from experiments.results.statistics import interval, paired_differences
from support import plugin_streams
from support.paths import ROOT

SEEDS = (0, 1, 2)


def log(path, method, seed, *plugins, n_trained=2, run_id=None, method_name=True):
    """Train on two experiences and log each accuracy."""
    logger = TidyCSVLogger(
        path,
        run_id or f"{method}-{seed}",
        seed=seed,
        benchmark="blobs",
        dataset="points",
        scenario="class",
        method=method if method_name else None,
    )
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True), loss_metrics(experience=True), loggers=logger
    )
    stream = plugin_streams.benchmark()
    learner = plugin_streams.strategy(
        plugin_streams.mlp(seed), *plugins, evaluator=evaluator, train_epochs=8
    )
    learner.eval(stream.test_stream)
    for experience in stream.train_stream[:n_trained]:
        learner.train(experience)
        learner.eval(stream.test_stream)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "my accuracies.csv"
    for seed in SEEDS:
        log(path, "naive", seed)
        log(path, "mine, with EWC", seed, DiagonalEWCPlugin(0.5, normalize="mean"))
    return path


def test_metrics_and_paired_differences_are_those_of_the_accuracies(logged):
    found = load_results(logged)
    runs, rows = found["runs"], pd.read_csv(logged)
    by_run = rows.pivot(index=["run_id", "train_exp"], columns="eval_exp", values="accuracy")
    for run in runs.to_dict("records"):
        expected = continual_metrics(by_run.loc[run["run_id"]].to_numpy())
        assert {name: run[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    compared = paired_differences(runs)
    last = rows[rows["train_exp"] == 1].groupby(["method", "seed"])["accuracy"].mean()
    difference = (last["mine, with EWC"] - last["naive"]).to_numpy()
    (row,) = compared[compared["metric"] == "average_accuracy"].to_dict("records")
    assert (row["method"], row["other_method"], row["n"]) == ("mine, with EWC", "naive", 3)
    expected = interval(difference)
    assert row["difference"] == pytest.approx(expected["mean"])
    assert row["ci_low"] == pytest.approx(expected["ci_low"])


@pytest.mark.parametrize("of_folder", [False, True])
def test_the_commands_read_a_file_and_its_folder(logged, of_folder, tmp_path, capsys):
    path = str(logged.parent if of_folder else logged)
    assert main(["table", path]) == 0
    shown = capsys.readouterr()
    assert "blobs points, class-incremental" in shown.out
    assert "mine, with EWC" in shown.out
    assert "has no settings" in shown.err
    assert main(["table", path, "--of", "comparisons", "--format", "latex"]) == 0
    assert main(["compare", path]) == 0
    shown = capsys.readouterr().out
    assert "mine, with EWC, predicted, λ=0.5" in " ".join(shown.split()).replace(" = ", "=")
    assert "has no settings" in " ".join(shown.split())
    page = tmp_path / "page.html"
    assert main(["report", path, "--out", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "mine, with EWC" in html
    assert "has no settings" in html
    assert html.count("<svg") >= 3
    assert not [file for file in logged.parent.iterdir() if file != logged]


def test_the_commands_of_the_page_read_a_file(logged, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "pages" / "how-to" / "own-experiment.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m experiments (.* accuracy\.csv)$", page, re.MULTILINE)
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    shutil.copy(logged, "accuracy.csv")
    for command in commands:
        assert main(command.split()) == 0


def test_several_files_of_a_folder_count_together(tmp_path):
    log(tmp_path / "one.csv", "naive", 0)
    log(tmp_path / "other.csv", "naive", 1)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert load_results(tmp_path)["runs"]["seed"].tolist() == [0, 1]


def test_a_run_that_was_killed_is_not_complete(tmp_path, capsys):
    log(tmp_path / "log.csv", "naive", 0)
    log(tmp_path / "log.csv", "naive", 1, n_trained=1)
    runs = load_results(tmp_path)["runs"].set_index("seed")
    assert runs["status"].tolist() == ["ok", "failed"]
    assert runs["reason"][1] == "trained through 1 experiences, tested on 2"
    assert pd.isna(runs["average_accuracy"][1])
    assert main(["compare", str(tmp_path)]) == 0
    assert "No two methods have the same seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace("naive-1,", "naive-0,"), "twice: not unique"),
        (lambda t: t.replace(",1,-1,", ",7,-1,", 1), "has several values of seed for the run"),
        (lambda t: t.replace(",naive,,,1,", ",naive,,,0,"), "naive-0 and naive-1 of one method"),
        (lambda t: t.replace("accuracy", "acc", 1), "is not a file of `TidyCSVLogger`"),
        (lambda t: t.rstrip("\n"), "its last line is not complete"),
        (lambda t: t.replace(",test,", ",one,", 1).replace(",test,", ",two,"), "on one stream"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_in_one_line(tmp_path, capsys, change, said):
    path = tmp_path / "log.csv"
    for seed in (0, 1):
        log(path, "naive", seed)
    path.write_text(change(path.read_text()))
    for command in ("table", "compare", "report"):
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_runs_that_nothing_tells_apart_are_refused(tmp_path, capsys):
    for run_id in ("wide", "narrow"):
        log(tmp_path / "log.csv", "naive", 0, run_id=run_id)
    assert main(["compare", str(tmp_path)]) == 2
    assert "TidyCSVLogger(method=...)" in capsys.readouterr().err

"""The logger that any Avalanche user can have: what its file holds, also after a kill."""

import csv
import gzip
import io
import pickle
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin

from ewc_plugin import DiagonalEWC, DiagonalEWCPlugin, TidyCSVLogger, ewc_metrics, gaussian_score
from experiments.results import schemas, tables
from experiments.results.store import Store
from support.paths import ROOT
from support.plugin_streams import Blobs, benchmark, mlp, multi_head, strategy, train

NAMES = {"seed": 3, "benchmark": "blobs", "dataset": "points", "scenario": "class"}


def evaluator(*loggers):
    return EvaluationPlugin(
        accuracy_metrics(experience=True), loss_metrics(experience=True), loggers=list(loggers)
    )


def logged(path, *plugins, model=mlp, run_id="a", **options):
    logger = TidyCSVLogger(path, run_id, **NAMES)
    return strategy(model(), *plugins, evaluator=evaluator(logger), **options)


def train_and_test(learner, bench, *streams):
    """Evaluates before and after each experience; what `eval` returned each time."""
    torch.manual_seed(1)
    found = [learner.eval(bench.test_stream)]
    for experience in bench.train_stream:
        learner.train(experience)
        found.append(learner.eval(bench.test_stream))
    return found


def keys(path):
    return [tuple(map(int, (r["train_exp"], r["eval_exp"]))) for r in csv_rows(path)]


def csv_rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_what_was_measured_to_the_last_bit(tmp_path):
    path, bench = tmp_path / "made" / "accuracy.csv", benchmark()
    found = train_and_test(logged(path, DiagonalEWCPlugin(5.5)), bench)
    table = tables.load(path.parent)["accuracy"]
    assert tuple(table.columns) == (*tables.empty(schemas.ACCURACY), *schemas.LOGGER_COLUMNS)
    pairs = zip(table["train_exp"], table["eval_exp"], strict=True)
    assert list(pairs) == [(-1, 0), (-1, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    for row in table.itertuples():
        place = f"/eval_phase/test_stream/Task000/Exp00{row.eval_exp}"
        results = found[row.train_exp + 1]
        assert row.accuracy == results[f"Top1_Acc_Exp{place}"]
        assert row.loss == results[f"Loss_Exp{place}"]
    constant = table.drop(columns=["train_exp", "eval_exp", "accuracy", "loss"]).drop_duplicates()
    assert constant.iloc[0].to_dict() == {
        "run_id": "a",
        **NAMES,
        "method": "Naive+DiagonalEWC",
        "fisher_type": "predicted",
        "ewc_lambda": 5.5,
        "n_samples": 24,
        "stream": "test",
        "task": 0,
    }
    assert len(constant) == 1
    assert table["loss"].map(repr).str.len().max() > 12  # not four decimals


def test_pandas_alone_makes_the_matrix_of_it(tmp_path):
    path, bench = tmp_path / "accuracy.csv", benchmark(task_labels=True)
    train_and_test(logged(path, kind=DiagonalEWC, model=multi_head, ewc_lambda=1), bench)
    table = pd.read_csv(path, float_precision="round_trip")
    R = table.pivot(index="train_exp", columns="eval_exp", values="accuracy")
    assert R.shape == (3, 2)
    assert (table["method"] == "DiagonalEWC").all()
    assert (table["task"] == table["eval_exp"]).all()


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [
        ([], ("Naive", "", "")),
        ([EWCPlugin(2)], ("Naive+EWC", "", "2.0")),
        ([DiagonalEWCPlugin(0, fisher_type="exact")], ("Naive+DiagonalEWC", "exact", "0.0")),
        (
            [ReplayPlugin(9), DiagonalEWCPlugin(1, fisher_type=gaussian_score)],
            ("Naive+Replay+DiagonalEWC", "gaussian_score", "1.0"),
        ),
    ],
    ids=["none", "avalanche's", "ours", "likelihood and replay"],
)
def test_the_method_is_read_off_the_strategy(tmp_path, plugins, expected):
    path = tmp_path / "accuracy.csv"
    logged(path, *plugins).eval(benchmark().test_stream)
    row = csv_rows(path)[0]
    assert (row["method"], row["fisher_type"], row["ewc_lambda"]) == expected
    tables.load(tmp_path)


def test_streams_and_runs_are_kept_apart(tmp_path):
    path, bench = tmp_path / "accuracy.csv", benchmark()
    for run_id in ("a", "b"):
        learner = logged(path, run_id=run_id)
        learner.eval(bench.test_stream)
        learner.eval(bench.train_stream)
    table = tables.load(tmp_path)["accuracy"]
    assert table.groupby(["run_id", "stream"]).size().to_dict() == {
        (run_id, stream): 2 for run_id in "ab" for stream in ("test", "train")
    }


def test_a_sweep_refuses_a_loggers_folder_and_leaves_it_alone(tmp_path):
    logged(tmp_path / "accuracy.csv").eval(benchmark().test_stream)
    before = (tmp_path / "accuracy.csv").read_text()
    with pytest.raises(tables.TableError, match=r"which runs\.csv lacks"):
        Store(tmp_path).finished()
    assert (tmp_path / "accuracy.csv").read_text() == before


def test_task_is_empty_without_task_labels(tmp_path):
    datasets = [AvalancheDataset([Blobs(seed=s)]) for s in range(2)]
    bench = benchmark_from_datasets(train=datasets, test=datasets)
    train_and_test(logged(tmp_path / "accuracy.csv"), bench)
    assert {row["task"] for row in csv_rows(tmp_path / "accuracy.csv")} == {""}
    assert tables.load(tmp_path)["accuracy"]["task"].isna().all()


def test_online_stream_counts_its_parts(tmp_path):
    path, bench = tmp_path / "accuracy.csv", benchmark()
    learner = logged(path, DiagonalEWCPlugin(1))
    for part in split_online_stream(bench.train_stream, experience_size=12):
        learner.train(part)
        learner.eval(bench.test_stream)
    assert keys(path) == [(part, j) for part in range(4) for j in range(2)]


@pytest.mark.parametrize("mode", ["epoch", "iteration"])
def test_evaluation_in_the_middle_of_training_is_no_row(tmp_path, mode):
    path, bench = tmp_path / "accuracy.csv", benchmark()
    learner = logged(path, train_epochs=2, eval_every=1, peval_mode=mode)
    learner.eval(bench.test_stream)
    for experience in bench.train_stream:
        before = csv_rows(path)
        learner.train(experience, eval_streams=[bench.test_stream])
        assert csv_rows(path)[: len(before)] == before
        learner.eval(bench.test_stream)
    assert keys(path) == [(i, j) for i in (-1, 0, 1) for j in range(2)]


def test_a_row_measured_again_takes_the_place_of_the_first(tmp_path):
    path, bench = tmp_path / "accuracy.csv", benchmark()
    logged(path, run_id="other").eval(bench.test_stream)
    learner = logged(path)
    train_and_test(learner, bench)
    before = csv_rows(path)
    learner.eval(bench.test_stream)
    assert csv_rows(path) == before
    learner.train(bench.train_stream[1])
    learner.eval(bench.test_stream)
    after = csv_rows(path)
    assert after[:-2] == before[:-2]
    assert [row["loss"] for row in after[-2:]] != [row["loss"] for row in before[-2:]]
    assert keys(path) == [(-1, 0), (-1, 1), *((i, j) for i in (-1, 0, 1) for j in range(2))]


def test_a_torn_last_line_is_dropped(tmp_path):
    path, bench = tmp_path / "accuracy.csv", benchmark()
    train_and_test(logged(path), bench)
    whole = path.read_text()
    path.write_text(whole[:-9])
    learner = strategy(mlp(), evaluator=evaluator(TidyCSVLogger(path, "a", **NAMES, train_exp=7)))
    learner.eval(bench.test_stream)
    assert keys(path) == [(-1, 0), (-1, 1), (0, 0), (0, 1), (1, 0), (7, 0), (7, 1)]
    assert path.read_text().startswith(whole[: whole[:-1].rindex("\n") + 1])


def test_what_a_kill_left_of_a_new_file_goes_and_other_files_stay(tmp_path):
    for name in (".accuracy.csv.ewc-plugin.tmp", "accuracy.csv.123.tmp"):
        (tmp_path / name).write_text("half")
    logged(tmp_path / "accuracy.csv").eval(benchmark().test_stream)
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.csv", "accuracy.csv.123.tmp"}
    assert len(tables.load(tmp_path)["accuracy"])


def test_a_compressed_file_is_refused(tmp_path):
    path = tmp_path / "accuracy.csv"
    path.write_bytes(gzip.compress(b"run_id"))
    with pytest.raises(ValueError, match="`path` must be a new file or one of"):
        TidyCSVLogger(path, "a", seed=0)


def test_a_checkpoint_may_be_older_than_the_file(tmp_path):
    path, bench = tmp_path / "accuracy.csv", benchmark()
    learner = logged(path)
    learner.eval(bench.test_stream)
    train(learner, bench.train_stream[:1])
    saved = pickle.dumps(learner)
    learner.eval(bench.test_stream)  # and then it was killed
    again = pickle.loads(saved)
    again.eval(bench.test_stream)
    assert keys(path) == [(-1, 0), (-1, 1), (0, 0), (0, 1)]


def test_files_and_names_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "accuracy.csv"
    path.write_text("run_id,accuracy\na,1\n")
    with pytest.raises(ValueError, match=r"`path` must be a new file or .*accuracy.csv, which has"):
        TidyCSVLogger(path, "a", seed=0)
    assert path.read_text() == "run_id,accuracy\na,1\n"


BAD_NAMES = ["", " ", "NA", "nan", "None", "a\rb", "a\nb", "a\tb", "\ud800", None, 7, b"a", True]


@pytest.mark.parametrize("name", ["run_id", "benchmark", "dataset", "scenario", "method"])
@pytest.mark.parametrize("value", BAD_NAMES, ids=repr)
def test_a_name_that_would_not_come_back_is_refused(tmp_path, name, value):
    if name == "method" and value is None:
        return  # the default
    arguments = {"run_id": "a", "seed": 0, name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be a text of one line"):
        TidyCSVLogger(tmp_path / "new.csv", **arguments)


@pytest.mark.parametrize("name", ["seed", "train_exp"])
@pytest.mark.parametrize("value", [None, "x", 1.5, True], ids=repr)
def test_a_number_that_is_no_integer_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer, got "):
        TidyCSVLogger(tmp_path / "new.csv", "a", **{"seed": 0, name: value})


@pytest.mark.parametrize("name", ["a,b", 'a"b', "a'b", "ä λ", "=1+1", "a;b"])
def test_every_name_of_one_line_comes_back(tmp_path, name):
    logger = TidyCSVLogger(tmp_path / "accuracy.csv", name, seed=0, method=name)
    strategy(mlp(), evaluator=evaluator(logger)).eval(benchmark().test_stream)
    table = pd.read_csv(tmp_path / "accuracy.csv")
    assert set(table["run_id"]) == set(table["method"]) == {name}


@pytest.mark.parametrize("change", [lambda row: row + ",more", lambda row: row[: row.rindex(",")]])
def test_a_row_of_other_cells_is_refused_and_left_alone(tmp_path, change):
    path = tmp_path / "accuracy.csv"
    logged(path).eval(benchmark().test_stream)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], change(lines[2])]) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="whose row 2 does not have 15 cells"):
        logged(path)
    assert path.read_bytes() == before


def test_every_arm_of_a_comparison_has_its_own_method(tmp_path):
    path, bench = tmp_path / "accuracy.csv", benchmark()
    for method, plugins in (("naive", []), ("ewc", [DiagonalEWCPlugin(2)])):
        logger = TidyCSVLogger(path, method, seed=0, method=method)
        metrics = EvaluationPlugin(
            accuracy_metrics(experience=True),
            *ewc_metrics(),
            loggers=[logger, TextLogger(io.StringIO())],
        )
        learner = strategy(mlp(), *plugins, evaluator=metrics)
        train(learner, bench.train_stream)
        learner.eval(bench.test_stream)
        ours = [name for name in metrics.get_last_metrics() if name.startswith("EWC_")]
        assert bool(ours) is bool(plugins)
    table = tables.load(tmp_path)["accuracy"]
    arms = table.groupby("method")[["fisher_type", "ewc_lambda"]].first()
    assert arms.loc["ewc"].tolist() == ["predicted", 2.0]
    assert arms.loc["naive"].isna().all()


def test_without_the_accuracy_there_is_nothing_to_write(tmp_path):
    logger = TidyCSVLogger(tmp_path / "accuracy.csv", "a", seed=0)
    learner = strategy(
        mlp(), evaluator=EvaluationPlugin(loss_metrics(experience=True), loggers=[logger])
    )
    with pytest.raises(ValueError, match="`accuracy_metrics.experience=True.` measures; give it"):
        learner.eval(benchmark().test_stream)


def test_without_the_loss_it_is_empty(tmp_path):
    logger = TidyCSVLogger(tmp_path / "accuracy.csv", "a", seed=0)
    learner = strategy(
        mlp(), evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[logger])
    )
    learner.eval(benchmark().test_stream)
    assert tables.load(tmp_path)["accuracy"]["loss"].isna().all()


def start(folder, *places):
    """Exit codes of a run that is killed at each place, and started again until it ends."""
    folder.mkdir()
    script = ROOT / "tests" / "support" / "killed_run.py"
    command = [sys.executable, "-W", "ignore", str(script), str(folder), *places]
    done = subprocess.run(command, cwd=script.parents[1], stdout=subprocess.PIPE, text=True)
    return [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]


@pytest.mark.slow
def test_a_run_killed_twice_ends_as_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole) == [0]
    assert start(killed, "evaluation", "training") == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert keys(killed / "accuracy-0.csv")[-2:] == [(1, 3), (2, 0)]
    ours, expected = (torch.load(f / "weights.pt", weights_only=True) for f in (killed, whole))
    for name, weight in expected.items():
        assert torch.equal(ours[name], weight), name
    assert (killed / "accuracy.csv").read_bytes() == (whole / "accuracy.csv").read_bytes()
    assert len(tables.load(killed)["accuracy"]) == 5 * 4

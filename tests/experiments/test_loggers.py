"""TensorBoard and Weights & Biases beside a run: the tables do not depend on them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.__main__ import main
from experiments.data.sources import find_data
from experiments.results import tables
from experiments.settings.run import RunSettings
from experiments.training.loggers import Logs
from experiments.training.run import run
from support.killed import KilledError
from support.wandb_files import finished_run

SETTINGS = RunSettings(
    "split",
    "digits",
    "task",
    "ewc",
    0,
    fisher_type="predicted",
    ewc_lambda=1000.0,
    mode="separate",
    n_experiences=2,
    epochs=2,
    dropout=0.2,
)
DIGITS = find_data("digits", None)


@pytest.fixture(scope="module")
def unwatched():
    return run(SETTINGS, DIGITS)


def test_tensorboard_gets_the_accuracies_of_the_table(tmp_path, unwatched):
    result = run(SETTINGS, DIGITS, logs=Logs(tmp_path, tensorboard=True))
    assert result.record["status"] == "ok"
    assert result.rows == unwatched.rows  # accuracies and losses, to the last bit
    events = EventAccumulator(str(tmp_path / SETTINGS.run_id)).Reload()
    names = events.Tags()["scalars"]
    for name in ("Loss_Epoch", "EWC_Penalty", "EWC_FisherTrace"):
        assert any(name in scalar for scalar in names), name
    (accuracy,) = (n for n in names if n.startswith("Top1_Acc_Exp") and n.endswith("Exp001"))
    logged = [event.value for event in events.Scalars(accuracy)]
    rows = [row["accuracy"] for row in result.rows if row["eval_exp"] == 1]
    assert logged == pytest.approx(rows, rel=1e-6)  # float32 there


def test_tensorboard_goes_on_where_a_killed_run_was(tmp_path, unwatched):
    def observe(done, accuracy):
        raise KilledError

    checkpoint, folder = tmp_path / "checkpoint", tmp_path / SETTINGS.run_id
    whole = Logs(tmp_path / "whole", tensorboard=True)
    run(SETTINGS, DIGITS, logs=whole)
    with pytest.raises(KilledError):
        run(SETTINGS, DIGITS, observe, checkpoint, logs=Logs(tmp_path, tensorboard=True))
    result = run(SETTINGS, DIGITS, checkpoint=checkpoint, logs=Logs(tmp_path, tensorboard=True))
    assert result.rows == unwatched.rows
    assert scalars(folder) == scalars(whole.folder / SETTINGS.run_id)


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if "Seconds" not in name
    }


@pytest.mark.slow
def test_wandb_writes_a_run_that_can_be_uploaded(tmp_path, unwatched, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = run(SETTINGS, DIGITS, logs=Logs(tmp_path, wandb=True))
    assert result.record["reason"] == ""
    assert result.rows == unwatched.rows
    (file,) = tmp_path.rglob("offline-run-*/*.wandb")
    finished_run(file)
    written = file.read_bytes()
    assert SETTINGS.run_id.encode() in written
    assert b"Top1_Acc_Exp/eval_phase/test_stream/Task001/Exp001" in written
    assert file.is_relative_to(tmp_path / SETTINGS.run_id)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_job_logs_each_run_in_its_folder(tmp_path, processes):
    grid = ["--dataset", "digits", "--experiences", "2", "--epochs", "1", "--seeds", "0"]
    grid = ["split-mnist", *grid, "--methods", "naive", "ewc", "--out", str(tmp_path)]
    assert main([*grid, "--tensorboard", "--processes", processes]) == 0
    runs = tables.load(tmp_path)["runs"]
    assert {p.name for p in (tmp_path / "logs").iterdir()} == set(runs["run_id"])
    assert len(list(tmp_path.glob("logs/*/events.out.tfevents.*"))) == 2

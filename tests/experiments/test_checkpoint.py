"""A run that was killed between two experiences goes on to the last bit."""

import hashlib
import io
import os
from pathlib import Path

import pytest
import torch

from ewc_plugin import DiagonalEWCPlugin
from experiments.data.sources import find_data
from experiments.results.store import Store
from experiments.settings.run import RunSettings
from experiments.training.checkpoint import can_be_stored, read_checkpoint
from experiments.training.methods import MethodPlugins
from experiments.training.run import Run, run
from support.killed import KilledError

DIGITS = find_data("digits", None)
PENALTY = {"ewc_lambda": 1000.0, "mode": "separate"}
ONLINE = {"ewc_lambda": 1000.0, "mode": "online", "decay_factor": 0.5}
METHODS = {
    "naive": ("naive", {}),
    "naive, sgd": ("naive", {"optimizer": "sgd"}),
    "ewc": ("ewc", {**PENALTY, "fisher_type": "predicted"}),
    "ewc, sampled, online": ("ewc", {**ONLINE, "fisher_type": "sampled", "normalize": "mean"}),
    "l2": ("l2", PENALTY),
    "avalanche-ewc": ("avalanche-ewc", PENALTY),
    "avalanche-ewc, online": ("avalanche-ewc", ONLINE),
}

TIMES = ("train_s", "fisher_s", "eval_s", "peak_rss_mb", "measured_at", "digest")


def settings(method="naive", benchmark="permuted", scenario="domain", n_experiences=4, **changes):
    fields = {"epochs": 2, "batch_size": 64, "hidden_size": 16, "dropout": 0.3}
    fields |= {"n_experiences": n_experiences, **changes}
    return RunSettings(benchmark, "digits", scenario, method, 3, **fields)


def killed_after(n, cell, path):
    def observe(done, accuracy):
        if done == n:
            raise KilledError

    current = Run(cell, DIGITS)
    with pytest.raises(KilledError):
        current.run(observe, path)
    return current


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stream", [("permuted", "domain", 4), ("split", "task", 5)])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(tmp_path, method, stream):
    name, changes = METHODS[method]
    cell = settings(name, *stream, **changes)
    whole = Run(cell, DIGITS)
    whole.run(lambda done, accuracy: None)
    path = tmp_path / "checkpoint"
    killed_after(2, cell, path)
    torch.rand(7)  # whatever another process did with its random numbers
    seen = []
    resumed = Run(cell, DIGITS)
    resumed.run(lambda done, accuracy: seen.append(done), path)
    assert seen == list(range(3, cell.n_experiences + 1))
    assert resumed.rows == whole.rows
    for (n, a), (_, b) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), n
    records = [current.record("ok", "") for current in (whole, resumed)]
    assert len({str({k: v for k, v in r.items() if k not in TIMES}) for r in records}) == 1


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("si", {"ewc_lambda": 1.0}),
        ("mas", {"ewc_lambda": 1.0}),
        ("lwf", {"ewc_lambda": 1.0}),
        ("replay", {"memory": 20}),
        ("ewc+replay", {**PENALTY, "fisher_type": "predicted", "memory": 20}),
    ],
)
def test_a_run_whose_method_has_no_checkpoint_says_so_and_starts_anew(tmp_path, method, changes):
    cell, path, said, seen = settings(method, **changes), tmp_path / "checkpoint", [], []
    killed_after(2, cell, path)
    assert not path.exists()
    resumed = Run(cell, DIGITS)
    resumed.run(lambda done, accuracy: seen.append(done), path, said.append)
    assert seen == [1, 2, 3, 4]
    assert resumed.rows == run(cell, DIGITS).rows
    assert said == [f"{cell.run_id}: no checkpoint holds its method; stopped, it starts anew."]


def test_a_plugin_that_may_remember_more_has_no_checkpoint():
    class Own(DiagonalEWCPlugin):
        pass

    assert can_be_stored(MethodPlugins(late=(DiagonalEWCPlugin(1.0),)))
    assert not can_be_stored(MethodPlugins(late=(Own(1.0),)))


def test_a_checkpoint_of_other_settings_data_or_bytes_is_not_used(tmp_path):
    cell, path = settings(), tmp_path / "checkpoint"
    killed_after(2, cell, path)
    assert read_checkpoint(path, cell, DIGITS)["progress"]["rows"]
    assert read_checkpoint(path, settings(epochs=3), DIGITS) is None
    other = type(DIGITS)("digits", None, "other")
    assert read_checkpoint(path, cell, other) is None
    content = path.read_bytes()
    for damaged in (b"", b"no checkpoint", content[: len(content) // 2]):
        path.write_bytes(damaged)
        assert read_checkpoint(path, cell, DIGITS) is None
    assert run(cell, DIGITS, checkpoint=path).rows == run(cell, DIGITS).rows


@pytest.mark.parametrize("content", [None, [1], {"of": {}}, {"progress": {}}, b"not from torch"])
def test_a_checkpoint_that_something_else_sealed_is_said_and_not_used(tmp_path, content):
    path, lines, file = tmp_path / "checkpoint", [], io.BytesIO()
    if isinstance(content, bytes):
        file.write(content)
    else:
        torch.save(content, file)
    path.write_bytes(hashlib.sha256(file.getvalue()).digest() + file.getvalue())
    assert read_checkpoint(path, settings(), DIGITS, lines.append) is None
    assert "its checkpoint is none of ours; the run starts anew" in lines[0]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_no_file_in_a_checkpoints_place_costs_the_checkpoint_alone(make, tmp_path):
    cell, store, lines = settings(), Store(tmp_path), []
    path = store.checkpoint(cell.run_id)
    make(path)
    result = run(cell, DIGITS, checkpoint=path, say=lines.append)
    assert result.rows == run(cell, DIGITS).rows
    assert "its checkpoint can't be read (it is no regular file)" in lines[0]
    assert all("its checkpoint can't be written (" in line for line in lines[1:])
    # A pipe makes way for the next checkpoint, a folder does not.
    assert len(lines) == (cell.n_experiences if make is Path.mkdir else 1)
    store.add(result)
    assert store.finished() == {cell.run_id}


def test_times_of_a_resumed_run_are_those_of_both_parts(tmp_path):
    cell, path = settings(), tmp_path / "checkpoint"
    first = killed_after(3, cell, path).seconds
    resumed = run(cell, DIGITS, checkpoint=path).record
    assert all(resumed[name] > seconds for name, seconds in first.items())

"""Tables hold the value that was used, and are read whether it is written or not."""

from dataclasses import asdict
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from ewc_plugin import FisherType
from experiments.reporting.labels import IMPORTANCES, NORMALIZED, cell_labels, method_of
from experiments.results import schemas, tables
from experiments.results.provenance import content_digest
from experiments.results.record import RunResult, failed
from experiments.results.store import Store, read_results
from experiments.settings.run import Normalize, RunSettings
from experiments.settings.unset import given, used

ALWAYS = {"optimizer_state": "kept", "pixels": "normalized", "loss_classes": "all"}
ALWAYS |= {"head": "linear", "eval_every": 1}
OURS = {"normalize": "none", "penalty_step": "gradient"}
BATCHED = {"importance_batch": 128, "importance_order": "dataset"}
NAMES = ALWAYS | OURS | BATCHED


def settings(method="ewc", **changes):
    """A run of EWC, or of another method."""
    penalty = {} if method == "naive" else {"ewc_lambda": 10.0, "mode": "separate"}
    penalty |= {"fisher_type": "predicted"} if method == "ewc" else {}
    return RunSettings("split", "digits", "task", method, 0, **{**penalty, **changes})


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (settings("naive"), ALWAYS),
        (settings("avalanche-ewc"), ALWAYS | BATCHED),
        (settings("ewc"), ALWAYS | OURS),
        (settings("ewc", fisher_type="batched"), ALWAYS | OURS | BATCHED),
        (settings("ewc", normalize="mean"), ALWAYS | OURS | {"normalize": "mean"}),
        (settings("avalanche-ewc", importance_batch=8), ALWAYS | BATCHED | {"importance_batch": 8}),
        (settings("naive", pixels="unit"), ALWAYS | {"pixels": "unit"}),
    ],
)
def test_a_row_has_the_values_that_were_used(run, expected):
    row = failed(run, "stopped").record
    assert {name: row[name] for name in NAMES if row[name] is not None} == expected


@pytest.mark.parametrize("importance_batch", [None, 8, 128])  # 128 is that of training
@pytest.mark.parametrize("eval_every", [None, 1, 2])
@pytest.mark.parametrize("written", [used, dict], ids=["new", "old"])
def test_both_forms_of_a_row_name_the_same_run(importance_batch, eval_every, written):
    run = settings("avalanche-ewc", importance_batch=importance_batch, eval_every=eval_every)
    row = written({**asdict(run), "config_hash": run.config_hash})
    assert RunSettings(**given(row)) == run


def test_a_folder_from_before_is_read_written_anew_and_has_the_same_digests(tmp_path):
    runs = [settings("naive"), settings("avalanche-ewc", importance_batch=128), settings("ewc")]
    for run in runs:
        record = {**failed(run, "stopped").record, **asdict(run)}  # with empty settings
        result = RunResult({**record, "digest": content_digest(record, [])})
        Store(tmp_path).add(result)
    _, new = Store(tmp_path).write_tables()
    assert not new[list(ALWAYS)].isna().any().any()
    new.assign(**dict.fromkeys(ALWAYS, np.nan)).to_csv(tmp_path / "runs.csv", index=False)
    pd.testing.assert_frame_equal(read_results(tmp_path)[1], new)
    for part in (tmp_path / "parts").glob("*.json"):
        part.unlink()
    pd.testing.assert_frame_equal(read_results(tmp_path)[1], new)
    pd.testing.assert_frame_equal(tables.read(tmp_path, schemas.RUNS), new)


KINDS = {
    "predicted": "EWC, per sample, predicted",
    "class_mean": "EWC, class means",
    "class_mean_empirical": "EWC, class means, data's labels",
    "reversed": "EWC, reversed logits",
    "batched": "EWC, per mini-batch",
}


def test_a_label_names_a_fisher_information_alone_per_sample_and_what_divides_it():
    fisher = {kind.value for kind in FisherType} - IMPORTANCES.keys()
    assert fisher == {"predicted", "empirical", "sampled", "exact"}
    for kind, label in KINDS.items():
        cells = [settings("naive"), settings(fisher_type=kind), settings(fisher_type="exact")]
        rows = tables.frame([failed(cell, "stopped").record for cell in cells], schemas.RUNS)
        exact = "EWC, per sample, exact"
        assert list(cell_labels(rows, with_lambda=False).values()) == ["Naive", label, exact]
    assert NORMALIZED.keys() == set(get_args(Normalize))
    replay = settings("ewc+replay", fisher_type="class_mean", normalize="mean", memory=9)
    (row,) = tables.frame([failed(replay, "stopped").record], schemas.RUNS).to_dict("records")
    assert method_of(row, with_type=True) == "EWC and replay, class means, F by its mean"


def test_labels_name_what_differs_from_the_usual():
    cells = [settings(), settings(normalize="mean"), settings(batch_size=64)]
    rows = tables.frame([failed(cell, "stopped").record for cell in cells], schemas.RUNS)
    assert [label.replace("\N{NO-BREAK SPACE}", " ") for label in cell_labels(rows).values()] == [
        "EWC, per sample, mini-batches of 128, λ = 10",
        "EWC, per sample, F by its mean, mini-batches of 128, λ = 10",
        "EWC, per sample, mini-batches of 64, λ = 10",
    ]

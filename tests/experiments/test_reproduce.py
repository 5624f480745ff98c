"""Protocols of published experiments, the table of what came out, and one run end to end."""

import pandas as pd
import pytest

from experiments.results import tables
from experiments.settings.tuned import TUNING_SEEDS
from experiments.studies.reproduce import study as reproduce
from experiments.studies.reproduce.protocol import (
    PROTOCOLS,
    Arm,
    Protocol,
    Reference,
    load_protocol,
)
from experiments.studies.reproduce.table import arms_table

SETTING = {"benchmark": "split", "scenario": "task", "hidden_size": 16}
NAIVE = Arm("Naive", {"method": "naive"})
EWC = {"method": "ewc", "fisher_type": "predicted", "ewc_lambda": 1.0, "mode": "separate"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_has_a_source_references_and_runs(name):
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.source
    assert any(arm.reference for arm in protocol.arms)
    for arm in protocol.arms:
        if arm.reference:
            assert 0 < arm.reference.value < 1
            assert arm.reference.where
    labels = [arm.label for arm in protocol.arms]
    assert len(set(labels)) == len(labels)
    assert {arm.against for arm in protocol.arms} - {None} <= set(labels)
    for dataset in ("mnist", "digits"):
        cells = list(protocol.cells(dataset))
        runs = sum(len(arm.seeds or protocol.seeds) for arm in protocol.arms)
        assert len({cell.run_id for cell in cells}) == len(cells) == runs


@pytest.mark.parametrize("name", PROTOCOLS)
def test_searches_see_validation_images_and_seeds_that_are_not_reported(name):
    protocol = load_protocol(name)
    reported = {*protocol.seeds, *(seed for arm in protocol.arms for seed in arm.seeds)}
    assert not set(protocol.search_seeds) & reported
    assert set(protocol.search_seeds) <= set(TUNING_SEEDS)
    assert all(cell.validation for cell in protocol.search_cells("mnist"))
    assert not any(cell.validation for cell in protocol.cells("mnist"))


def test_an_arm_may_have_seeds_of_its_own():
    more = Arm("more", EWC, seeds=(0, 1, 2, 3))
    protocol = Protocol("p", "a source", SETTING, (NAIVE, more), (0, 1))

    def run(seeds=()):
        return [(cell.seed, cell.method) for cell in protocol.cells("mnist", seeds)]

    pairs = [(0, "naive"), (0, "ewc"), (1, "naive"), (1, "ewc")]
    assert run() == [*pairs, (2, "ewc"), (3, "ewc")]
    assert run((0, 1)) == pairs


@pytest.mark.parametrize(
    ("reference", "mean", "met"),
    [
        (Reference(0.94, None, "x"), 0.9401, True),
        (Reference(0.94, None, "x"), 0.9399, False),
        (Reference(0.9, 0.01, "x"), 0.9099, True),
        (Reference(0.9, 0.01, "x"), 0.9101, False),
        (Reference(0.9, 0.01, "x"), 0.8899, False),
    ],
)
def test_the_rule_is_the_protocols(reference, mean, met):
    assert reference.is_met(mean) is met


def runs_of(protocol, accuracies):
    rows = []
    for label, values in accuracies.items():
        arm = next(arm for arm in protocol.arms if arm.label == label)
        for seed, value in enumerate(values):
            cell = protocol.run_of(arm, "mnist", seed)
            ok = value is not None
            rows.append({
                "run_id": cell.run_id,
                "config_hash": cell.config_hash,
                "seed": seed,
                "status": "ok" if ok else "diverged",
                "average_accuracy": value,
                **{"train_s": 2.0, "fisher_s": 1.0, "eval_s": 0.5},
            })
    return pd.DataFrame(rows)


def test_the_table_pairs_seeds_and_says_what_did_not_run():
    far = {**EWC, "ewc_lambda": 9.0}
    protocol = Protocol(
        "p",
        "a source",
        SETTING,
        (
            NAIVE,
            Arm("EWC", EWC, Reference(0.95, 0.01, "table 1"), "Naive"),
            Arm("far", far, Reference(0.95, 0.01, "table 1"), "Naive"),
        ),
        (0, 1, 2),
    )
    runs = runs_of(protocol, {"Naive": [0.90, 0.80, 0.70], "EWC": [0.96, 0.95, None]})
    table = arms_table(protocol, runs).set_index("arm")
    assert list(table["reproduced"]) == ["no reference", "yes", "not run"]
    row = table.loc["EWC"]
    assert (row["n"], row["diverged"], row["run_s"]) == (2, 1, 3.5)
    assert row["mean"] == pytest.approx(0.955)
    assert row["difference"] == pytest.approx((0.06 + 0.15) / 2)  # seeds 0 and 1 alone
    assert (row["differs"], row["within_margin"]) == ("no", "no")


def test_a_protocol_runs_once_and_ends_in_a_table_and_pictures(tmp_path, monkeypatch):
    protocol = Protocol(
        "vandeven2022",
        "a source",
        {**SETTING, "epochs": 8, "batch_size": 32, "n_experiences": 2},
        (
            Arm("Naive", {"method": "naive"}, Reference(0.8, 0.2, "table 1")),
            Arm("EWC", EWC, Reference(0.01, 0.001, "table 2"), "Naive"),
        ),
        (0, 1),
    )
    monkeypatch.setattr(reproduce, "load_protocol", lambda name: protocol)
    settings = reproduce.Reproduce(
        protocol="vandeven2022", dataset="digits", out=str(tmp_path), processes=1, quiet=True
    )
    table = reproduce.run(settings).set_index("arm")
    assert list(table["reproduced"]) == ["yes", "no"]
    assert list(table["n"]) == [2, 2]

    loaded = tables.load(tmp_path)
    runs = loaded["runs"]
    for arm, row in loaded["reproduce"].set_index("arm").iterrows():
        own = runs[runs["method"] == row["method"]]
        assert row["mean"] == own["average_accuracy"].mean(), arm
    by_seed = runs.pivot(index="seed", columns="method", values="average_accuracy")
    difference = (by_seed["ewc"] - by_seed["naive"]).mean()
    assert table.loc["EWC", "difference"] == pytest.approx(difference, abs=1e-12)
    assert list((tmp_path / "plots").glob("*.png"))

    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    pd.testing.assert_frame_equal(reproduce.run(settings).set_index("arm"), table)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()} == parts

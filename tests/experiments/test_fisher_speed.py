"""The Fisher benchmark's table: what its columns hold; and that rules serve its networks."""

import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from ewc_plugin import explain
from experiments.results import tables
from experiments.timing import fisher_speed
from experiments.timing.fisher_engines import (
    ENGINES,
    NETWORKS,
    OURS,
    UNIT,
    gradient_pass,
    make_problem,
    relative_error,
)
from experiments.timing.fisher_speed import FISHER_SPEED, FisherSpeedSettings, _with_kept, run

MULTIPLE = "multiple_of_gradient_pass"


def test_table_holds_what_was_measured(tmp_path):
    engines = (OURS, "sample loop", "nngeometry")
    settings = FisherSpeedSettings(
        networks=("mlp-512",),
        engines=engines,
        kinds=("predicted",),
        rounds=2,
        no_memory=True,
        out=str(tmp_path),
    )
    table = run(settings).set_index("engine")
    assert list(table.index) == [UNIT, *engines]
    assert table.loc[UNIT, "multiple_min"] <= table.loc[UNIT, MULTIPLE]
    assert table.loc[OURS, "relative_error"] < 1e-4
    assert table.loc[OURS, "relative_error_float64"] < 1e-12
    assert table.loc["sample loop", "status"] == "ok"
    assert table.loc["sample loop", MULTIPLE] > 2 * table.loc[OURS, MULTIPLE]
    assert table.loc["nngeometry", "status"] in ("absent", "not offered")
    stored = pd.read_csv(tmp_path / "fisher_speed.csv")
    assert stored[MULTIPLE].to_list()[:3] == pytest.approx(table[MULTIPLE].to_list()[:3])
    assert (tmp_path / "fisher_speed.png").stat().st_size > 10_000


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_is_served_by_a_rule(network):
    problem = make_problem(network, "predicted", samples=6)
    assert gradient_pass(problem)().keys() == problem.named().keys()  # all have a gradient
    served = explain(problem.model, (problem.x, problem.y))
    assert served.keys() == problem.named().keys()
    assert {name: how.detail for name, how in served.items() if how.engine != "rules"} == {}


def test_a_gradient_that_is_zero_in_exact_arithmetic_is_no_error():
    expected = {"weight": torch.tensor([1.0, 4.0]).double(), "key bias": torch.tensor([1e-31])}
    noise = {"weight": torch.tensor([1.0, 4.0]), "key bias": torch.tensor([1e-13])}
    assert relative_error(noise, expected) == pytest.approx(1e-13 / 4e-8)
    wrong = {**noise, "key bias": torch.tensor([1e-9])}
    assert relative_error(wrong, expected) > fisher_speed.WRONG
    small = {**expected, "key bias": torch.tensor([1e-12]).double()}
    assert relative_error({**expected, "key bias": torch.tensor([2e-12])}, small) == 1
    assert relative_error(expected, {name: 0 * f for name, f in expected.items()}) == 0


@pytest.mark.parametrize("network", ["bert", "vit"])
def test_the_loop_and_ours_are_right_on_attention(network):
    reference = fisher_speed._reference(network, "predicted", "cpu")
    problem = make_problem(network, "predicted", samples=fisher_speed._ERROR_SAMPLES)
    for engine in (OURS, "sample loop"):
        got = fisher_speed.ENGINES[engine].prepare(problem)()
        assert relative_error(got, reference) < 1e-4


def test_an_engine_that_is_not_installed_is_said_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    absent = replace(ENGINES["Opacus"], package="no-such-package")
    monkeypatch.setitem(ENGINES, "Opacus", absent)
    monkeypatch.setattr(fisher_speed, "_measure", lambda *_: 1 / 0)
    settings = FisherSpeedSettings(engines=("sample loop", "Opacus"), out=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        run(settings)
    assert "no times of them: Opacus." in " ".join(capsys.readouterr().out.split())


def test_network_whose_library_is_missing_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    settings = FisherSpeedSettings(
        networks=("bert",), engines=(OURS,), kinds=("predicted",), no_memory=True, out=str(tmp_path)
    )
    table = run(settings)
    assert list(table["status"]) == ["absent"] * 2
    assert list(table["note"]) == ["pip install transformers"] * 2


def test_a_machine_that_slows_down_changes_no_multiple(monkeypatch):
    calls = iter(range(1000))
    monkeypatch.setattr(
        fisher_speed, "_seconds", lambda call, settings: call() * (1 + next(calls) / 10)
    )
    timed = {UNIT: (lambda: 8.0, 4), OURS: (lambda: 3.0, 1)}  # seconds, samples
    rows = {name: {} for name in timed}
    fisher_speed._time(timed, rows, FisherSpeedSettings(rounds=4))
    for name, multiple in ((UNIT, 1), (OURS, 1.5)):
        for column in (
            MULTIPLE,
            "multiple_q1",
            "multiple_q3",
            "multiple_min",
            "multiple_max",
        ):
            assert rows[name][column] == pytest.approx(multiple)


def test_what_is_not_measured_anew_is_kept_in_its_place(tmp_path):
    blank = dict.fromkeys(FISHER_SPEED.columns) | {"samples": 1, "rounds": 1, "status": "ok"}

    def rows(multiple, *cells):
        return pd.DataFrame([
            {
                **blank,
                "network": n,
                "kind": k,
                "device": d,
                "engine": e,
                MULTIPLE: multiple,
            }
            for n, k, d in cells
            for e in (UNIT, OURS)
        ])

    cells = [(n, k, "cpu") for n in ("mlp-512", "simple-cnn") for k in ("predicted", "exact")]
    tables.write(tables.check(rows(1.5, *cells), FISHER_SPEED), tmp_path, FISHER_SPEED)
    table = _with_kept(
        rows(2.5, ("mlp-512", "predicted", "cpu")), tables.read(tmp_path, FISHER_SPEED)
    )
    assert list(table[MULTIPLE]) == [2.5] * 2 + [1.5] * 6
    table = _with_kept(
        rows(2.5, ("simple-cnn", "predicted", "cpu")), tables.read(tmp_path, FISHER_SPEED)
    )
    assert list(table[MULTIPLE]) == [1.5] * 4 + [2.5] * 2 + [1.5] * 2
    table = _with_kept(rows(2.5, ("mlp-512", "exact", "cuda")), tables.read(tmp_path, FISHER_SPEED))
    assert list(table["device"]) == ["cpu"] * 8 + ["cuda"] * 2
    assert list(table["engine"]) == [UNIT, OURS] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ("vgg",)}, "`networks` must be among mlp-512, .*, got 'vgg'"),
        ({"engines": ("magic",)}, "`engines` must be among gradient pass, .*, got 'magic'"),
        ({"rounds": 0}, "`rounds` must be a whole number, >= 1 and <= 1000000, got 0"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        run(FisherSpeedSettings(**options))

"""`compare --against` compares every arm of a folder with one of them."""

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.reporting import comparison
from experiments.reporting.compare import Compare, run
from experiments.results import schemas, statistics, tables
from experiments.results.record import RunResult
from experiments.results.statistics import interval
from experiments.results.store import Store
from support.run_rows import run_rows

ACCURACIES = {
    "naive": [0.50, 0.62, 0.55],
    "exact": [0.81, 0.90, 0.86],
    "predicted": [0.80, 0.88, 0.87],
    "strong": [0.70, 0.75, 0.79],
    "online": [0.60, 0.66, 0.61],
    "replay": [0.95, 0.96, 0.97],
}
ONLINE = {"mode": "online", "decay_factor": 0.9}
ARMS = {
    "naive": ("naive", {}),
    "exact": ("ewc", {"ewc_lambda": 10, "fisher_type": "exact"}),
    "predicted": ("ewc", {"ewc_lambda": 10}),
    "strong": ("ewc", {"ewc_lambda": 100}),
    "online": ("l2", {"ewc_lambda": 10, **ONLINE}),
    "replay": ("replay", {"memory": 10}),
}


def write(folder, parts):
    records, rows = ([row for part in parts for row in part[i]] for i in (0, 1))
    tables.write(tables.frame(records, schemas.RUNS), folder, schemas.RUNS)
    tables.write(tables.frame(rows, schemas.ACCURACY), folder, schemas.ACCURACY)


@pytest.fixture
def folder(tmp_path):
    parts = [run_rows(m, ACCURACIES[arm], **changes) for arm, (m, changes) in ARMS.items()]
    write(tmp_path, [*parts, run_rows("ewc", [0.0], ewc_lambda=1e9, status="diverged")])
    return tmp_path


def against(folder, name):
    """Accuracies of the first arm of each pair; differences, verdicts and n by them."""
    found = run(Compare(folder, against=name))
    found = found[found["metric"] == "average_accuracy"]
    return {round(row["mean"], 4): row for row in found.to_dict("records")}


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("naive", "naive"),
        ("Naive", "naive"),
        ("exact", "exact"),
        ("ewc,fisher_type=exact", "exact"),
        ("EWC, per sample, predicted, λ = 10", "predicted"),
        ("EWC, per sample, predicted, λ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}10", "predicted"),
        ("ewc,predicted,lambda=100", "strong"),
        ("l2", "online"),
        ("mode=online", "online"),
        ("Replay", "replay"),
    ],
)
def test_every_other_arm_is_compared_with_the_one_that_is_named(folder, name, arm):
    found = against(folder, name)
    others = [other for other in ARMS if other != arm]
    mean = {other: round(0.5 * (np.mean(ACCURACIES[other]) + 0.8), 4) for other in others}
    assert found.keys() == set(mean.values())
    for other in others:  # R[1, 0] as given, R[1, 1] = 0.8
        row = found[mean[other]]
        differences = 0.5 * (np.array(ACCURACIES[other]) - ACCURACIES[arm])
        expected = interval(differences)
        for column in ("n", "ci_low", "ci_high"):
            assert row[column] == pytest.approx(expected[column])
        assert row["difference"] == pytest.approx(expected["mean"])
        assert row["differs"] == statistics.differs(differences)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("avalanche-ewc", "must name an arm, got avalanche-ewc. There are: Naive; "),
        ("ewc,batch_size=7", "must name an arm, got ewc,batch_size=7."),
        ("lambda=1e9", "must name an arm"),  # diverged
        (
            "ewc",
            "must name one arm, got ewc, which several are. There are: EWC, per sample, exact, "
            "λ = 10; EWC, per sample, predicted, λ = 10; EWC, per sample, predicted, λ = 100.",
        ),
    ],
)
def test_a_name_of_no_arm_or_of_several_lists_them(folder, name, said, capsys):
    assert main(["compare", str(folder), "--against", name]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_arms_of_one_folder_may_differ_in_any_setting(tmp_path, capsys):
    sizes = {size: run_rows("ewc", [0.7, 0.8], ewc_lambda=1, batch_size=size) for size in (16, 64)}
    write(tmp_path, sizes.values())
    assert main(["compare", str(tmp_path), "--against", "ewc,batch_size=16"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    pair = "EWC, per sample, predicted, mini-batches of {}, λ = 1"
    assert f"{pair.format(64)} − {pair.format(16)}" in printed
    assert "margin 0.01" in printed


def test_of_several_arms_of_that_name_the_one_with_the_same_settings_counts(tmp_path):
    parts = [
        run_rows(method, [value, value + 0.01], **changes, batch_size=size)
        for size, value in ((16, 0.5), (64, 0.6))
        for method, changes in (("naive", {}), ("ewc", {"ewc_lambda": 1}))
    ]
    write(tmp_path, parts)
    found = run(Compare(tmp_path, against="naive"))
    assert (found["batch_size"] == found["other_batch_size"]).all()
    assert len(found) == 2 * len(schemas.COMPARED)
    only = run(Compare(tmp_path, against="naive,batch_size=16"))
    assert len(only) == 3 * len(schemas.COMPARED)  # Naive at the other size, too


@pytest.mark.parametrize("has_tables", [False, True])
def test_of_a_stopped_sweep_every_command_shows_what_is_done(tmp_path, capsys, has_tables):
    store, ids = Store(tmp_path / "sweep"), []
    for records, rows in (run_rows("naive", [0.5, 0.6]), run_rows("ewc", [0.7], ewc_lambda=1)):
        for record in records:
            mine = [row for row in rows if row["run_id"] == record["run_id"]]
            store.add(RunResult.sealed(record, mine))
            ids.append(record["run_id"])
    if has_tables:  # of an earlier command
        store.write_tables()
    store.plan([*ids, "to-come"])
    page = tmp_path / "page.html"
    for command in (["table"], ["compare"], ["report", "--out", str(page)]):
        assert main([*command, str(store.folder)]) == 0
        printed = " ".join("".join(capsys.readouterr()).split())
        said = page.read_text(encoding="utf-8") if page.exists() else printed
        assert "3 of 4 runs of the last sweep are done" in said
        assert "Naive" in said
    store.plan(ids)
    assert main(["table", str(store.folder)]) == 0
    assert "of the last sweep" not in capsys.readouterr().err


def test_a_stopped_sweep_can_be_the_newest_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records, rows = run_rows("naive", [0.5])
    for name in ("empty", "stopped"):
        Store(tmp_path / "runs" / name).plan(["to-come"])
    Store(tmp_path / "runs" / "stopped").add(RunResult.sealed(records[0], rows))
    assert main(["table"]) == 0
    assert "stopped: the newest folder below runs/" in " ".join(capsys.readouterr().err.split())


def test_many_kinds_beside_the_built_in_have_one_sentence_with_both_ends(tmp_path, capsys):
    kinds = {"predicted": 0.5, "empirical": 0.6, "sampled": 0.7, "exact": 0.8}
    parts = [run_rows("avalanche-ewc", [0.5, 0.52], ewc_lambda=9, epochs=3)]
    for i, (kind, value) in enumerate(kinds.items()):
        changes = {"fisher_type": kind, "ewc_lambda": 10**i, "epochs": 3}
        parts.append(run_rows("ewc", [value, value + 0.021], **changes))
    write(tmp_path, parts)
    run(Compare(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "of 4 kinds of EWC beside Avalanche's EWC, λ = 9, 3 better, 1 " in said
    assert "(EWC, per sample, predicted, λ = 1) to " in said
    assert "(EWC, per sample, exact, λ = 1000) in average accuracy, n = 2 (" in said


def test_what_both_methods_share_is_named_once_but_lambda_with_each():
    labels = {"a": "EWC, online, epochs 2, λ = 3", "b": "Avalanche's EWC, epochs 2, λ = 3"}
    row = {"config_hash": "a", "other_config_hash": "b"}
    first, second, shared = comparison.pair_of(row, labels)
    assert (first, second) == ("EWC, online, λ = 3", "Avalanche's EWC, λ = 3")
    assert comparison.pair_text(first, second, shared).endswith("λ = 3 (epochs 2)")

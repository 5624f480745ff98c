"""Schemas, files and statistics of the result tables."""

import os
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.results import schemas, statistics, tables
from experiments.results.metrics import METRICS
from experiments.results.record import run_record
from experiments.results.tables import TableError
from experiments.settings.run import RunSettings
from support.run_rows import run_rows

ROW = {
    "run_id": "a",
    "benchmark": "split",
    "dataset": "digits",
    "scenario": "task",
    "method": "naive",
    "fisher_type": None,
    "ewc_lambda": None,
    "seed": 0,
    "train_exp": -1,
    "eval_exp": 0,
    "accuracy": 0.1 + 0.2,
    "loss": 1 / 3,
    "n_samples": 70,
}


def test_a_table_comes_back_from_the_disk_to_the_last_bit(tmp_path):
    table = tables.frame([ROW, {**ROW, "eval_exp": 1, "accuracy": 2 / 3}], schemas.ACCURACY)
    tables.write(table, tmp_path, schemas.ACCURACY)
    pd.testing.assert_frame_equal(tables.read(tmp_path, schemas.ACCURACY), table, check_exact=True)


@pytest.mark.parametrize(
    ("change", "value", "rule"),
    [
        ({"accuracy": 1.5}, "1.5", "in_range"),
        ({"accuracy": None}, "nan", "nullable"),
        ({"n_samples": 0}, "0", "greater_than_or_equal_to"),
        ({"seed": "x"}, "x", "int64"),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused(change, value, rule):
    (column,) = change
    where = f"`{column}` of {ROW['run_id']} in accuracy.csv can't be {value} "
    with pytest.raises(TableError, match=rf"{re.escape(where)}.*{rule}"):
        tables.frame([{**ROW, **change}], schemas.ACCURACY)


def test_a_row_that_is_there_twice_is_refused():
    with pytest.raises(TableError, match="not unique"):
        tables.frame([ROW, ROW], schemas.ACCURACY)


@pytest.mark.parametrize("text", ["783629259701", "1e10", "007", "True", "NA", "inf", "0x1"])
def test_a_text_that_looks_like_another_type_comes_back(tmp_path, text):
    table = tables.frame([{**ROW, "run_id": text, "method": text}], schemas.ACCURACY)
    tables.write(table, tmp_path, schemas.ACCURACY)
    pd.testing.assert_frame_equal(tables.read(tmp_path, schemas.ACCURACY), table)


EXTRA_CELL = "run_id,accuracy\na,0.5\na,0.5,1\n"


@pytest.mark.parametrize(
    "text",
    ["", "run_id,accuracy\na,0.5\n", "run_id\n\x00\n", EXTRA_CELL, "x" * 1000 + "\n"],
    ids=["empty", "columns", "zero byte", "extra cell", "long name"],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, text):
    path = tmp_path / "accuracy.csv"
    path.write_text(text)
    with pytest.raises(TableError, match=r"accuracy\.csv` can't be read .*restore it") as error:
        tables.read(tmp_path, schemas.ACCURACY)
    assert str(error.value).isprintable()
    assert len(str(error.value).replace(str(tmp_path), "")) < 400
    assert path.read_text() == text


def test_a_write_that_fails_leaves_the_old_table_and_no_other_file(tmp_path, monkeypatch):
    table = tables.frame([ROW], schemas.ACCURACY)
    path = tables.write(table, tmp_path, schemas.ACCURACY)
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tables.write(table.assign(accuracy=0.5), tmp_path, schemas.ACCURACY)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["accuracy.csv"]


def test_load_gives_the_tables_of_a_folder(tmp_path):
    tables.write(tables.frame([ROW], schemas.ACCURACY), tmp_path, schemas.ACCURACY)
    assert list(tables.load(tmp_path)) == ["accuracy"]
    with pytest.raises(TableError, match=r"holds none of accuracy\.csv"):
        tables.load(tmp_path / "elsewhere")


def test_the_interval_is_students():
    values = np.array([0.91, 0.94, 0.93, 0.95])
    expected = stats.t.interval(0.95, df=3, loc=values.mean(), scale=stats.sem(values))
    found = statistics.interval(values)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(expected, rel=1e-12)
    assert found["n"] == 4
    assert found["std"] == pytest.approx(values.std(ddof=1), rel=1e-12)


def test_one_seed_has_a_mean_and_no_interval():
    found = statistics.interval(np.array([0.5]))
    assert found["mean"] == 0.5
    assert np.isnan([found["std"], found["ci_low"], found["ci_high"]]).all()


@pytest.mark.parametrize(
    ("differences", "differs", "within", "verdict"),
    [
        ([0.001, -0.001, 0.002, 0.000], "no", "yes", "equivalent"),
        ([0.020, 0.022, 0.021, 0.023], "yes", "no", "better"),
        ([-0.020, -0.022, -0.021, -0.023], "yes", "no", "worse"),
        ([0.05, -0.05, 0.04, -0.04], "no", "no", "undecided"),
        # A difference too small to matter.
        ([0.004, 0.005, 0.006, 0.005], "yes", "yes", "better, within the margin"),
        ([0.02], "unknown", "unknown", "one seed"),
    ],
)
def test_a_difference_may_differ_and_lie_within_the_margin(differences, differs, within, verdict):
    assert statistics.differs(np.array(differences)) == differs
    assert statistics.within_margin(np.array(differences)) == within
    mine, theirs = 0.5 + np.array(differences), np.full(len(differences), 0.5)
    assert statistics._difference("average_accuracy", mine, theirs)["verdict"] == verdict
    assert statistics._difference("forgetting", theirs, mine)["verdict"] == verdict


def test_a_comparison_from_before_the_verdict_is_still_read(tmp_path):
    runs = [run_of(method, seed, 0.5) for method in ("naive", "ewc") for seed in (0, 1)]
    found = statistics.paired_differences(tables.frame(runs, schemas.RUNS))
    found.drop(columns="verdict").to_csv(tmp_path / "comparisons.csv", index=False)
    again = tables.read(tmp_path, schemas.COMPARISONS)
    assert len(again) == len(found) and again["verdict"].isna().all()


def test_within_the_margin_is_the_two_one_sided_tests():
    rng = np.random.default_rng(0)
    for _ in range(200):
        d = rng.normal(0.004, 0.006, size=5)
        low = stats.ttest_1samp(d, -statistics.MARGIN, alternative="greater").pvalue
        high = stats.ttest_1samp(d, statistics.MARGIN, alternative="less").pvalue
        assert (statistics.within_margin(d) == "yes") == (max(low, high) < 0.05)
        two_sided = stats.ttest_1samp(d, 0).pvalue
        assert (statistics.differs(d) == "yes") == (two_sided < 0.05)


def run_of(method, seed, accuracy, **changes):
    """A row of `runs.csv`."""
    penalty = {"ewc_lambda": 1.0, "mode": "separate"} if "ewc" in method else {}
    kind = {"fisher_type": "predicted"} if method == "ewc" else {}
    cell = RunSettings("split", "digits", "task", method, seed, **{**penalty, **kind, **changes})
    metrics = {**dict.fromkeys(METRICS, 0.1), "average_accuracy": accuracy}
    return run_record(cell, "ok", "", metrics=metrics)


def test_pairs_are_those_of_one_seed_and_one_setting():
    runs = tables.frame(
        [
            *(run_of("ewc", seed, 0.90 + 0.01 * seed) for seed in (0, 1, 2)),
            *(run_of("avalanche-ewc", seed, 0.89 + 0.01 * seed) for seed in (1, 2, 3)),
            run_of("avalanche-ewc", 0, 0.1, batch_size=7),  # another setting: no pair
            run_of("avalanche-ewc", 0, 0.1, mode="online", decay_factor=1.0),  # another form
            run_of("naive", 0, 0.5),
            run_of("joint", 0, 0.99),  # the upper bound does not compete
        ],
        schemas.RUNS,
    )
    found = statistics.paired_differences(runs)
    accuracy = found[found["metric"] == "average_accuracy"]
    pairs = accuracy.set_index(["method", "mode", "other_method"])
    assert set(pairs.index) == {
        ("ewc", "separate", "avalanche-ewc"),
        ("ewc", "separate", "naive"),
        ("avalanche-ewc", "online", "naive"),
    }
    row = pairs.loc[("ewc", "separate", "avalanche-ewc")]
    assert (row["n"], row["unit"], row["batch_size"]) == (2, "fraction", 128)
    assert row["difference"] == pytest.approx(0.01)
    assert (row["other_ewc_lambda"], row["other_mode"]) == (1.0, "separate")
    assert pairs.loc[("ewc", "separate", "naive"), "differs"] == "unknown"


def test_a_summary_says_every_setting_and_unit():
    runs = tables.frame([run_of("naive", seed, 0.5, batch_size=7) for seed in (0, 1)], schemas.RUNS)
    summary = statistics.summarise(runs).set_index("metric")
    assert set(schemas.SETTING_NAMES) - {"seed"} <= set(summary.columns)
    assert set(summary["batch_size"]) == {7}
    assert set(summary["validation"]) == {False}
    units = summary["unit"]
    assert (units["average_accuracy"], units["train_s"], units["penalty_state_mb"]) == (
        *("fraction", "s"),
        "MiB",
    )


def test_a_folder_in_the_place_of_a_table_is_named(tmp_path):
    (tmp_path / "runs.csv").mkdir()
    with pytest.raises(TableError, match=r"runs.csv` can't be read \(it is no regular file"):
        tables.read(tmp_path, schemas.RUNS)


def test_a_page_may_name_a_path_of_bytes_that_are_no_text(tmp_path):
    tables.replace_file(tmp_path / "page", "results in \udcff")
    assert (tmp_path / "page").read_text() == "results in \\udcff"


def test_a_metric_that_was_not_measured_is_not_compared():
    """Forgetting has no value where `eval_every` leaves out what it needs."""
    left_out = {"ewc": [0], "avalanche-ewc": [0, 1], "naive": [0, 1, 2]}
    records = []
    for method, seeds in left_out.items():
        ewc_lambda = None if method == "naive" else 1.0
        for record in run_rows(method, [0.5, 0.6, 0.8], ewc_lambda=ewc_lambda)[0]:
            unknown = {"forgetting": None} if record["seed"] in seeds else {}
            records.append({**record, **unknown})
    found = statistics.paired_differences(tables.frame(records, schemas.RUNS))
    n = found.set_index(["method", "other_method", "metric"])["n"]
    assert n["ewc", "avalanche-ewc", "average_accuracy"] == 3
    assert n["ewc", "avalanche-ewc", "forgetting"] == 1
    assert ("ewc", "naive", "forgetting") not in n

"""The search for lambda: what it tries, when it ends, what it hands over and to whom."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from typing import get_args

import pandas as pd
import pytest

from ewc_plugin import FisherType
from experiments.__main__ import main
from experiments.results import tables
from experiments.settings.grids import Main
from experiments.settings.run import WITH_FISHER, WITH_LAMBDA, WITH_MEMORY, Normalize, RunSettings
from experiments.settings.tuned import arm_of, read_tuned, start_lambda, tuned_content
from experiments.studies.tune import Tune
from experiments.sweeps.lambda_search import MOST_VALUES, Arm, best_step, next_steps, search

RUN = RunSettings(
    *("split", "digits", "task", "ewc", 0),
    **{"ewc_lambda": 10.0, "mode": "separate", "fisher_type": "predicted"},
)
ARM = Arm(RUN, (100, 101))


def tried(accuracy):
    """All that the search tries of a function of the step, a round at a time."""
    found = {}
    while steps := next_steps(found):
        assert not found.keys() & set(steps)
        found |= {step: accuracy(step) for step in steps}
    return found


def peak_at(top):
    return lambda step: 1 - abs(step - top) / 100


@pytest.mark.parametrize("fisher_type", FisherType)
@pytest.mark.parametrize("normalize", [None, *get_args(Normalize)])
def test_every_arm_has_a_start(fisher_type, normalize):
    for method in WITH_LAMBDA:
        has_fisher = method in WITH_FISHER
        changes = {
            "fisher_type": fisher_type.value if has_fisher else None,
            "normalize": normalize if has_fisher else None,
            "memory": 10 if method in WITH_MEMORY else None,
        }
        assert start_lambda(replace(RUN, method=method, **changes)) > 0


@pytest.mark.parametrize("top", range(-7, 8))
def test_a_peak_is_found_between_two_worse_neighbours(top):
    found = tried(peak_at(top))
    assert len(found) <= MOST_VALUES
    best = best_step(found)
    assert best == top
    assert {best - 1, best + 1} <= found.keys()


@pytest.mark.parametrize(("top", "best"), [(40, 12), (-40, -12)])
def test_a_peak_out_of_reach_leaves_the_best_at_the_edge(top, best):
    found = tried(peak_at(top))
    assert len(found) == MOST_VALUES
    assert best_step(found) == best
    assert best in (min(found), max(found))


def test_of_equally_good_values_the_smallest_is_best():
    assert best_step(tried(lambda step: 0.9 if step >= 1 else 0.5)) == 1


def test_a_diverged_value_is_worse_than_all_others():
    found = tried(lambda step: -math.inf if step > 0 else 0.1)
    assert best_step(found) <= 0
    assert len(tried(lambda step: -math.inf)) == MOST_VALUES


def of_runs(accuracy, arm=ARM, status="ok"):
    """Every outcome that the arm can ask for, as a function of lambda and seed."""
    cells = [cell for step in range(-20, 21) for cell in arm.cells(step)]
    return {c.run_id: (status, accuracy(c.ewc_lambda, c.seed)) for c in cells}


def test_values_are_a_factor_of_ten_apart_and_of_its_root_around_the_best():
    ended = search(ARM, of_runs(lambda x, seed: 1 - abs(math.log10(x) - 2) / 10))
    values = sorted(ARM.lambda_at(step) for step in ended.found)
    assert values == [1.0, 10.0, 31.62, 100.0, 316.2, 1000.0]
    assert (ARM.lambda_at(ended.best), ended.place, ended.pending) == (100.0, "inside", [])


def test_every_value_gets_the_same_seeds_and_their_mean_decides():
    pending = search(ARM, {}).pending
    assert [(c.ewc_lambda, c.seed) for c in pending] == [
        (x, seed) for x in (1.0, 10.0, 100.0) for seed in (100, 101)
    ]
    # Seed 100 alone prefers 1, seed 101 alone 100.
    prefers = {(1.0, 100): 0.9, (10.0, 100): 0.8, (100.0, 101): 0.8, (10.0, 101): 0.7}
    ended = search(ARM, of_runs(lambda x, seed: prefers.get((x, seed), 0.5)))
    assert ended.found[0] == pytest.approx(0.75)
    assert ended.best == 0


def test_one_diverged_seed_makes_a_value_the_worst():
    outcomes = of_runs(lambda x, seed: x / 1e20)
    outcomes[ARM.cells(2)[1].run_id] = ("diverged", math.nan)
    ended = search(ARM, outcomes)
    assert ended.found[2] == -math.inf
    assert ended.best < 2


def test_what_is_as_good_has_no_gap():
    by_step = {-2: 0.893, -1: 0.85, 0: 0.895, 1: 0.9, 2: 0.889}
    cells = {c.run_id: s for s in range(-20, 21) for c in ARM.cells(s)}
    outcomes = {run_id: ("ok", by_step.get(step, 0.1)) for run_id, step in cells.items()}
    ended = search(ARM, outcomes)
    assert ended.best == 1
    assert ended.as_good == [0, 1]


SMALL = ["--dataset", "digits", "--experiences", "2", "--epochs", "2", "--hidden-size", "8"]
SMALL += ["--processes", "1", "--quiet"]
ARMS = ["--methods", "naive", "ewc", "l2", "--normalize", "none", "mean"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    options = ["--benchmark", "split", "--seeds", "100", "101", "--out", str(folder)]
    assert main(["tune", *SMALL, *ARMS, *options]) == 0
    return folder


def test_every_arm_gets_a_lambda_from_validation_images(folder):
    found = tables.load(folder)
    runs, chosen = found["runs"], found["tuned"]
    assert set(runs["method"]) == {"ewc", "l2"}
    assert runs["validation"].all()
    assert chosen["validation"].all()
    assert set(runs["seed"]) == {100, 101}
    assert len(chosen) == 3
    assert (chosen["n_values"] <= MOST_VALUES).all()
    for row in chosen.itertuples():
        normalize = "" if pd.isna(row.normalize) else row.normalize
        same = (runs["method"] == row.method) & (runs["normalize"].fillna("") == normalize)
        own = runs[same]
        means = own.groupby("ewc_lambda")["average_accuracy"].mean()
        assert [means.max(), means[row.ewc_lambda]] == pytest.approx([row.mean] * 2)
        assert len(means) == row.n_values
        assert (row.smallest_tried, row.largest_tried) == (means.index.min(), means.index.max())
    assert (folder / "plots" / "lambda-split-digits-task.png").exists()


def test_a_search_that_has_ended_runs_nothing(folder, monkeypatch):
    before = (folder / "runs.csv").read_bytes(), (folder / "tuned.json").read_bytes()
    monkeypatch.setattr("experiments.sweeps.worker.run_cell", None)
    options = ["--benchmark", "split", "--seeds", "100", "101", "--out", str(folder)]
    assert main(["tune", *SMALL, *ARMS, *options]) == 0
    assert before == ((folder / "runs.csv").read_bytes(), (folder / "tuned.json").read_bytes())


@pytest.mark.slow
def test_a_folder_keeps_the_arms_of_earlier_commands(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    options = ["--benchmark", "split", "--methods", "si", "l2", "--seeds", "100", "101"]
    assert main(["tune", *SMALL, *options, "--out", str(copy)]) == 0
    before, after = (read_tuned([str(one)]).lambdas for one in (folder, copy))
    assert {arm.method for arm in after} == {"ewc", "l2", "si"}
    assert before.items() <= after.items()
    assert len(after) == len(tables.load(copy)["tuned"]) == len(before) + 1


@pytest.mark.slow
def test_force_repeats_the_search(folder):
    before = tables.load(folder)["runs"].set_index("run_id")["measured_at"]
    options = ["--benchmark", "split", "--seeds", "100", "101", "--out", str(folder), "--force"]
    assert main(["tune", *SMALL, *ARMS, *options]) == 0
    after = tables.load(folder)["runs"].set_index("run_id")["measured_at"]
    assert before.index.equals(after.index)
    assert (before <= after).all()
    assert (before != after).any()


def test_the_reporting_command_takes_what_was_chosen(folder, tmp_path):
    arguments = ["split-mnist", *SMALL, *ARMS, "--seeds", "0", "--tuned", str(folder)]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    runs, chosen = tables.load(tmp_path)["runs"], tables.load(folder)["tuned"]
    with_lambda = runs[runs["method"] != "naive"]
    names = ["method", "normalize", "ewc_lambda"]
    assert sorted(map(str, with_lambda[names].values.tolist())) == sorted(
        map(str, chosen[names].values.tolist())
    )
    assert not runs["validation"].any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["--epochs", "3"],
            "`tuned` must hold a lambda for every arm, got {} without split-digits",
        ),
        (["--epochs", "3"], "(epochs is 3 here and 2 there)"),
        (["--seeds", "0", "101"], "`seeds` must be others than those that lambda was chosen with"),
        (["--ewc-lambda", "1"], "`ewc_lambda` must be empty with `tuned`"),
        (["--fisher-type", "exact"], "(fisher_type is exact here and predicted there"),
        (
            ["--tuned", "/nowhere"],
            "`tuned` must be a folder or file that `tune` wrote, got /nowhere",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_run(folder, tmp_path, capsys, changes, said):
    arguments = {"--epochs": ["2"], "--seeds": ["0"], "--tuned": [str(folder)]}
    arguments |= {changes[0]: changes[1:]}
    given = [word for name, values in arguments.items() for word in (name, *values)]
    small = ["split-mnist", "--dataset", "digits", "--experiences", "2", "--hidden-size", "8"]
    assert main([*small, *ARMS, *given, "--out", str(tmp_path / "out")]) == 2
    assert said.format(folder) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_options_the_arms_are_those_of_the_main_job():
    cells = [cell for cell in Main().cells("mnist") if cell.method in WITH_LAMBDA]
    assert {arm_of(arm.run) for arm in Tune().arms("mnist")} == {arm_of(cell) for cell in cells}


def test_two_files_must_agree(folder, tmp_path):
    arm, *_ = read_tuned([str(folder)]).lambdas
    (tmp_path / "other.json").write_text(tuned_content([replace(arm, ewc_lambda=7.0)], [100]))
    with pytest.raises(ValueError, match="`tuned` must give an arm one lambda"):
        read_tuned([str(folder), str(tmp_path / "other.json")])
    assert len(read_tuned([str(folder), str(folder / "tuned.json")]).lambdas) == 3


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["arms"][0].update(ewc_lambda=7.0),
        lambda content: content["arms"][0].update(fisher_type="exact"),
        lambda content: content["arms"].pop(),
        lambda content: content["seeds"].append(0),
        lambda content: content.pop("digest"),
    ],
)
def test_an_edited_choice_is_refused(folder, tmp_path, edit):
    content = json.loads((folder / "tuned.json").read_text())
    edit(content)
    (tmp_path / "tuned.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`tuned` .*edited; give a lambda of your own by"):
        read_tuned([str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "naive"], "`methods` must be among avalanche-ewc"),
        (["--ewc-lambda", "0"], "`ewc_lambda` must be above 0"),
        (["--ewc-lambda", "1", "2"], "`ewc_lambda` must be one value, or empty"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(capsys, arguments, said):
    assert main(["tune", "--dataset", "digits", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_an_arm_where_all_diverges_has_no_lambda(tmp_path, capsys):
    options = ["--methods", "l2", "ewc", "--ewc-lambda", "1e28", "--optimizer", "sgd"]
    options += ["--learning-rate", "1", "--seeds", "100", "--benchmark", "split"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["tune", *SMALL, *options, "--out", str(tmp_path)]) == 2
    assert "2 of 2 arms have no lambda" in capsys.readouterr().err
    assert set(tables.load(tmp_path)["runs"]["status"]) == {"diverged"}


@pytest.mark.slow
def test_an_edge_is_said_loudly(tmp_path, capsys):
    """With so small lambdas none is better than another, and the smallest is best."""
    options = ["--benchmark", "split", "--methods", "l2", "--ewc-lambda", "1e-12", "--seeds", "100"]
    assert main(["tune", *SMALL[:-1], *options, "--out", str(tmp_path)]) == 0
    assert "AT THE EDGE: L2" in capsys.readouterr().out
    assert set(tables.load(tmp_path)["tuned"]["place"]) == {"smallest"}
    assert read_tuned([str(tmp_path)]).at_edge

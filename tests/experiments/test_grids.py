"""Grids from the command line and from a file, and what runs when."""

import json
from dataclasses import fields, replace

import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.command_line import parse
from experiments.settings.grids import Main, PermutedMnist, SplitMnist, Sweep
from experiments.settings.run import RunSettings
from experiments.sweeps.dry_run import estimated_seconds
from experiments.sweeps.queue import Task, next_task, work

NO_LAMBDA = {"methods": ("naive",), "seeds": (0,)}


def no_rows(cell, source):
    return []


def grid(**values):
    return list(Sweep(**{"seeds": (0,), "methods": ("naive",), **values}).cells("digits"))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("n_experiences", {"experiences": (2, 5)}, {2, 5}),
        ("epochs", {"epochs": (1, 2, 3)}, {1, 2, 3}),
        ("batch_size", {"batch_size": (8, 16)}, {8, 16}),
        ("optimizer", {"optimizer": ("adam", "sgd")}, {"adam", "sgd"}),
        ("learning_rate", {"learning_rate": (0.1, 0.2)}, {0.1, 0.2}),
        ("model", {"model": ("mlp", "cnn")}, {"mlp", "cnn"}),
        ("hidden_size", {"hidden_size": (8, 9)}, {8, 9}),
        ("hidden_layers", {"hidden_layers": (1, 2)}, {1, 2}),
        ("dropout", {"dropout": (0.0, 0.5)}, {0.0, 0.5}),
        ("scenario", {"scenario": ("task", "domain")}, {"task", "domain"}),
        ("benchmark", {"benchmark": ("split", "permuted")}, {"split", "permuted"}),
        ("seed", {"seeds": (3, 4)}, {3, 4}),
        ("method", {"methods": ("naive", "joint")}, {"naive", "joint"}),
    ],
)
def test_any_setting_spans_a_grid(name, values, expected):
    cells = grid(**values)
    assert {getattr(cell, name) for cell in cells} == expected
    assert len(cells) == len({cell.run_id for cell in cells}) == len(expected)


def test_penalties_span_a_grid_of_what_each_method_has():
    cells = grid(
        methods=("naive", "avalanche-ewc", "ewc"),
        fisher_type=("predicted", "exact"),
        ewc_lambda=(1.0, 10.0),
        mode=("separate", "online"),
        decay_factor=(0.5, 1.0),
        normalize=("none", "mean"),
        penalty_step=("gradient", "implicit"),
    )
    count = pd.Series([cell.method for cell in cells]).value_counts()
    modes = 3  # separate, and online with two decays
    assert count.to_dict() == {"naive": 1, "avalanche-ewc": 2 * modes, "ewc": 2 * 2 * modes * 2 * 2}
    assert {cell.decay_factor for cell in cells if cell.mode == "separate"} == {None}


def test_the_builtins_importances_span_a_grid():
    cells = grid(
        methods=("naive", "avalanche-ewc", "ewc"),
        ewc_lambda=(1.0,),
        importance_batch=(32, 64),
        importance_order=("dataset", "shuffled"),
    )
    ways = {(c.importance_batch, c.importance_order) for c in cells if c.method == "avalanche-ewc"}
    assert ways == {(32, None), (64, None), (32, "shuffled"), (64, "shuffled")}
    assert len(cells) == 4 + 1 + 1


def test_what_has_no_meaning_collapses():
    assert len(grid(model=("cnn",), hidden_size=(8, 16), hidden_layers=(1, 2))) == 1
    assert len(grid(fisher_type=("predicted", "exact"), ewc_lambda=(1.0, 2.0))) == 1
    both = Sweep(benchmark=("split", "permuted"), scenario=("class", "domain"), **NO_LAMBDA)
    assert both.streams == [("split", "class"), ("split", "domain"), ("permuted", "domain")]
    assert "class-incremental" in both.left_out


def test_ids_stay_as_they_are():
    cell = RunSettings("split", "digits", "task", "naive", 0)
    assert cell.run_id == "split-digits-task-naive-58f511aa89-s0"


def from_toml(tmp_path, text, *arguments, kind=Sweep):
    (tmp_path / "grid.toml").write_text(text)
    given = ["--config", str(tmp_path / "grid.toml"), *arguments]
    return parse(kind.name, kind, given, None)


def test_a_file_has_the_same_names_and_the_command_line_counts_more(tmp_path):
    text = 'benchmark = ["split", "permuted"]\newc-lambda = [1, 10.5]\nepochs = 3\nforce = true\n'
    job = from_toml(tmp_path, text + 'fisher_type = ["exact"]', "--epochs", "4", "5", "--no-force")
    assert job.benchmark == ("split", "permuted")
    assert job.ewc_lambda == (1.0, 10.5)
    assert [t.value for t in job.fisher_type] == ["exact"]
    assert job.epochs == (4, 5)
    assert job.force is False
    assert from_toml(tmp_path, text).force is True


def test_options_complete_what_a_file_leaves_out(tmp_path):
    text = 'methods = ["ewc"]\nnormalize = "mean"'  # for which no lambda was chosen
    with pytest.raises(ValueError, match="`ewc_lambda` must be given with `normalize` mean"):
        from_toml(tmp_path, text)
    assert from_toml(tmp_path, text, "--ewc-lambda", "0.1").ewc_lambda == (0.1,)


def toml(value):
    plain = [getattr(v, "value", v) for v in value] if isinstance(value, tuple) else value
    return json.dumps(plain)


def test_every_setting_can_stand_in_a_file(tmp_path):
    for kind in (Sweep, SplitMnist, PermutedMnist, Main):
        default = kind()
        values = {field.name: getattr(default, field.name) for field in fields(kind)}
        lines = [f"{name} = {toml(v)}" for name, v in values.items() if v not in (None, ())]
        file = from_toml(tmp_path, "\n".join(lines), kind=kind)
        assert replace(file, config=None) == default


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "ewc_lamda = [1]",
            "`ewc_lamda` is not a setting of sweep (in {}); did you mean ewc_lambda?",
        ),
        ('mehtod = "ewc"', "`mehtod` is not a setting of sweep (in {}); did you mean methods?"),
        ('methods = ["ewx"]', "`methods` in {} must be one of naive, avalanche-ewc, ewc, joint"),
        ('methods = ["naive", "--force"]', "`methods` in {} must be one of naive"),
        ("epochs = true", "`epochs` in {} must be a whole number, >= 1 and <= 100000, got True"),
        ("epochs = 2.0", "`epochs` in {} must be a whole number, >= 1 and <= 100000, got 2.0"),
        ("force = 1", "`force` in {} must be true or false, got 1"),
        ("seeds = [0, [1]]", "`seeds` in {} must be a whole number, >= 0 and <= 4294967295"),
        ("ewc-lambda = 1\newc_lambda = 2", "`ewc_lambda` must be given once in {}"),
        ("epochs = " + "[" * 20_000, "`config` must be a readable TOML file, got {}"),
        ("[split]\nepochs = 3", "`split` is not a setting of sweep (in {})"),
        ("epochs = 1979-05-27", "`epochs` in {} must be a whole number"),
        ("epochs = ", "`config` must be a readable TOML file, got {} (Invalid value"),
        ("epochs = 0", "`epochs` in {} must be a whole number, >= 1 and <= 100000, got 0"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, capsys, text, said):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    assert main(["sweep", "--config", str(path), "--dataset", "digits"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(path) in line


RUN = [
    "sweep",
    "--dataset",
    "digits",
    "--methods",
    "naive",
    "--hidden-size",
    "8",
    "--processes",
    "1",
]
RUN += ["--experiences", "2", "--seeds", "0"]


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = [*RUN, "--out", str(folder)]
    assert main([*arguments, "--epochs", "1", "2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("would run\n") == 2
    assert "2 of 2 runs would run, 0 exist. Time: unknown" in printed
    assert not folder.exists()
    assert main([*arguments, "--epochs", "1", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main([*arguments, "--epochs", "1", "2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "exists (ok)" in printed
    assert "1 of 2 runs would run, 1 exist. Time: about " in printed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_time_is_estimated_from_runs_that_are_alike():
    common = {"n_experiences": 2, "hidden_size": 8}
    cell = RunSettings("split", "digits", "task", "naive", 0, **common)
    times = {"train_s": 6.0, "fisher_s": 1.0, "eval_s": 3.0, "status": "ok"}
    runs = pd.DataFrame([{**vars(cell), "config_hash": cell.config_hash, **times}])
    assert estimated_seconds(replace(cell, seed=1), runs) == 10.0
    assert estimated_seconds(replace(cell, epochs=3), runs) == pytest.approx(30.0)
    joint = replace(cell, method="joint")
    assert estimated_seconds(joint, runs) == pytest.approx(10.0 * work(joint) / work(cell))
    assert estimated_seconds(replace(cell, dataset="mnist"), runs) is None
    short, long = (replace(cell, iterations=count) for count in (100, 2000))
    assert estimated_seconds(long, runs) == pytest.approx(20 * estimated_seconds(short, runs))


def test_processes_keep_their_streams_and_none_waits():
    """Simulated: two processes, the main job; a process builds a stream when it changes to it."""
    waiting = [Task(cell) for cell in Main().cells("mnist")]
    n_streams = len({task.cell.stream for task in waiting})
    free_at, held, built = [0.0, 0.0], [None, None], 0
    while waiting:
        i = free_at.index(min(free_at))
        task = next_task(waiting, held[i], [held[1 - i]])
        waiting.remove(task)
        built += task.cell.stream != held[i]
        held[i] = task.cell.stream
        free_at[i] += task.work
    assert n_streams == 6
    assert built <= n_streams + 1
    longest = max(work(cell) for cell in Main().cells("mnist"))
    assert abs(free_at[0] - free_at[1]) <= longest


def test_the_largest_run_of_a_stream_comes_first():
    cells = [RunSettings("split", "digits", "task", "naive", 0, epochs=e) for e in (1, 5, 3)]
    tasks = [Task(cell) for cell in cells] + [Task(cells[1], no_rows)]
    assert next_task(tasks, None, []).cell.epochs == 5
    other = Task(RunSettings("permuted", "digits", "domain", "naive", 0, epochs=1))
    assert next_task([*tasks, other], other.cell.stream, []) == other
    assert next_task([*tasks, other], None, [cells[0].stream]) == other


def test_a_single_value_in_a_file_is_a_list_of_one(tmp_path):
    text = 'epochs = 2\nseeds = 0\nmethods = "naive"\newc-lambda = 3'
    job = from_toml(tmp_path, text)
    assert replace(job, config=None) == Sweep(
        epochs=(2,), seeds=(0,), methods=("naive",), ewc_lambda=(3.0,)
    )


def test_a_byte_order_mark_in_a_file_is_no_setting(tmp_path):
    assert from_toml(tmp_path, "\ufeffepochs = 2").epochs == (2,)

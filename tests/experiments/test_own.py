"""Benchmarks, models and methods that are functions in files of the user's own."""

import re
import shlex
from dataclasses import replace

import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.command_line import parse
from experiments.data.sources import find_data, own_data
from experiments.results import tables
from experiments.settings.grids import Sweep
from experiments.settings.own import changed_file, find_function
from experiments.settings.run import RunSettings
from experiments.training.own_check import check_own
from experiments.training.run import run
from support.paths import ROOT

PAGE = (ROOT / "docs" / "pages" / "how-to" / "own-experiment.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```python title="(.*?)"\n(.*?)```', PAGE, re.DOTALL))
COMMANDS = [
    shlex.split(line)
    for line in "\n"
    .join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
    .replace("\\\n", " ")
    .splitlines()
]
OWN = """
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, task_incremental_benchmark
from avalanche.benchmarks.scenarios.generic_scenario import CLScenario
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP
from avalanche.benchmarks.utils import make_avalanche_dataset
from avalanche.training.plugins import EWCPlugin, ReplayPlugin, SupervisedPlugin
from torch.utils.data import TensorDataset
from ewc_plugin import DiagonalEWCPlugin

def points(seed, n_classes=4, n=80):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    x = torch.eye(n_classes, 6)[y] * 3 + torch.randn(n, 6, generator=generator)
    dataset = TensorDataset(x, y)
    dataset.targets = y.tolist()
    return dataset

def by_class(seed):
    return nc_benchmark(points(seed), points(seed + 1), 2, task_labels=False, shuffle=False)

def by_task(seed):
    order = {"fixed_class_order": [0, 1, 2, 3, 4], "per_exp_classes": {0: 3}}
    return nc_benchmark(
        points(seed, 5), points(seed + 1, 5), 2, task_labels=True,
        class_ids_from_zero_in_each_exp=True, **order,
    )

def online(seed):
    benchmark = by_class(seed)
    parts = split_online_stream(
        benchmark.train_stream, experience_size=10, access_task_boundaries=True
    )
    return CLScenario([parts, benchmark.test_stream])

def global_random(seed):
    return nc_benchmark(
        points(int(torch.randint(1000, ()))), points(1), 2, task_labels=False, shuffle=False
    )

def images(seed):
    x, y = torch.rand(40, 3, 8, 8), torch.arange(40) % 2
    dataset = TensorDataset(x, y)
    dataset.targets = y.tolist()
    return nc_benchmark(dataset, dataset, 2, task_labels=False, shuffle=False)

def of_length(seed, n_experiences, validation):
    return nc_benchmark(
        points(seed, n_experiences * 2), points(seed + 1 + validation, n_experiences * 2),
        n_experiences, task_labels=False, shuffle=False,
    )

def changing(seed):
    return nc_benchmark(points(seed), points(1), 2 if seed == 0 else 4, task_labels=False)

def many_heads(n_classes):
    return MTSimpleMLP(input_size=6, hidden_size=8)

class Growing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = torch.nn.Linear(6, 8), IncrementalClassifier(8)

    def forward(self, x):
        return self.last(self.body(x).relu())

def growing():
    return Growing()

def plain(n_classes, hidden_size, dropout):
    return SimpleMLP(n_classes, input_size=6, hidden_size=hidden_size, drop_rate=dropout)

def pixels(n_classes):
    return SimpleMLP(n_classes, input_size=64, hidden_size=16)

def builtin(ewc_lambda, mode, decay_factor):
    return [EWCPlugin(ewc_lambda, mode, decay_factor)]

def ours(ewc_lambda, fisher_type):
    return [DiagonalEWCPlugin(ewc_lambda, fisher_type=fisher_type)]

def with_memory(memory):
    return [ReplayPlugin(memory)]

class Smooth(SupervisedPlugin):
    def __call__(self, logits, y):
        return torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.5)

def with_a_loss():
    return [Smooth()]

def nothing():
    return []
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the files of the page, and one of many functions."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(**values):
    fields = {"seeds": (0,), "methods": ("naive",), "epochs": (1,), "hidden_size": (8,)}
    return list(Sweep(**{**fields, "ewc_lambda": (1.0,), **values}).cells("digits"))


def result(cell, dataset="own"):
    files = tuple({find_function("model", f"{name}:x").file for name in ("own.py",)})
    source = own_data(files) if dataset == "own" else replace(find_data(dataset, None), files=files)
    return run(cell, source)


def ended_well(cell, dataset="own"):
    found = result(cell, dataset)
    assert found.record["status"] == "ok", found.record["reason"]
    return pd.DataFrame(found.rows)


def test_the_page_does_what_it_shows(folder, capsys):
    assert all(len(code.splitlines()) <= 30 for code in FILES.values())
    assert len(FILES) == 3
    sweep, table, compare, report, tune, *_ = filter(None, COMMANDS)
    assert main(sweep[3:] + ["--processes", "1"]) == 0
    runs = tables.load("runs/mine")["runs"]
    assert runs["status"].eq("ok").all()
    assert len(runs) == 4 * 3
    assert set(runs["dataset"]) == {"own"}
    assert set(runs["benchmark"]) == {"my_stream.py:stream"}
    assert not runs["run_id"].str.contains(r"[/:\\ ]").any()
    hashes = {find_function("model", f"{name}:x").file.sha256 for name in FILES}
    own = [f"{name}_sha256" for name in ("benchmark", "model", "method")]
    assert set(runs[own].stack().dropna()) == hashes
    capsys.readouterr()
    for command in (table, compare, report):
        assert main(command[3:]) == 0, command
    shown = capsys.readouterr().out
    assert "my_method.py:plugins" in shown
    assert "my_stream.py:stream, domain-incremental" in shown
    assert main(sweep[3:] + ["--processes", "1"]) == 0
    assert "12 of 12 runs are done already" in capsys.readouterr().out
    assert main(sweep[3:] + ["--dry-run"]) == 0
    assert "0 of 12 runs would run" in capsys.readouterr().out
    assert main(tune[3:] + ["--dry-run"]) == 0
    assert "27 of 27 runs would run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("benchmark", "model", "scenario"),
    [
        *(("by_class", "plain", "class"), ("by_class", "growing", "class")),
        *(("by_task", "many_heads", "task"), ("by_task", "mlp", "task")),
        *(("online", "plain", "class"), ("online", "mlp", "class")),
        ("images", "cnn", "class"),
    ],
)
def test_streams_of_every_kind_are_trained_on_by_every_method(folder, benchmark, model, scenario):
    model = model if model in ("mlp", "cnn") else f"own.py:{model}"
    names = ("naive", "avalanche-ewc", "ewc", "joint", "own.py:builtin")
    runs = cells(benchmark=(f"own.py:{benchmark}",), model=(model,), methods=names)
    assert len(runs) == len(names)
    accuracy = {}
    for cell in runs:
        assert (cell.scenario, cell.n_experiences) == (scenario, 2)
        accuracy[cell.method] = ended_well(cell)["accuracy"].tolist()
    assert accuracy["own.py:builtin"] == accuracy["avalanche-ewc"]


def test_own_methods_on_a_stream_by_name_take_the_fast_data_path(folder):
    names = ("avalanche-ewc", "own.py:builtin", "ewc", "own.py:ours", "own.py:with_memory")
    found = {}
    for cell in cells(methods=names, experiences=(2,), epochs=(2,), ewc_lambda=(100.0,)):
        assert cell.data_path == "fast"
        found[cell.method] = ended_well(cell, "digits")["accuracy"].to_numpy()
        settings = {"ewc_lambda": cell.ewc_lambda, "memory": cell.memory, "mode": cell.mode}
        expected = {
            "own.py:ours": {"ewc_lambda": 100.0, "memory": None, "mode": None},
            "own.py:with_memory": {"ewc_lambda": None, "memory": 200, "mode": None},
        }
        assert settings == expected.get(cell.method, settings)
    assert (found["own.py:builtin"] == found["avalanche-ewc"]).all()
    assert abs(found["own.py:ours"] - found["ewc"]).max() < 0.02  # other mini-batches of F


@pytest.mark.parametrize("benchmark", ["split", "permuted", "rotated"])
def test_own_methods_are_tried_on_every_stream_by_name(folder, benchmark):
    options = {"methods": ("own.py:nothing",), "benchmark": (benchmark,), "experiences": (2,)}
    files = (find_function("method", "own.py:nothing").file,)
    check_own(cells(**options), replace(find_data("digits", None), files=files))


def test_a_method_that_is_a_loss_is_what_the_strategy_trains_on(folder):
    names = ("naive", "own.py:with_a_loss", "own.py:nothing")
    stream = {"benchmark": ("own.py:by_class",), "model": ("own.py:plain",)}
    loss = {c.method: ended_well(c)["loss"].tolist() for c in cells(methods=names, **stream)}
    assert loss["own.py:nothing"] == loss["naive"] != loss["own.py:with_a_loss"]


def test_options_reach_the_functions_that_have_arguments_for_them(folder):
    runs = cells(
        benchmark=("own.py:of_length",),
        experiences=(2, 3),
        model=("own.py:plain", "own.py:growing"),
        hidden_size=(4, 8),
        dropout=(0.5,),
        validation=True,
    )
    kinds = {(cell.n_experiences, cell.model, cell.hidden_size, cell.dropout) for cell in runs}
    assert len(kinds) == len(runs) == 2 * (2 + 1)
    assert {k[2:] for k in kinds if k[1] == "own.py:growing"} == {(256, 0.0)}
    assert len(ended_well(runs[0])) == 3 * 2


def test_random_numbers_of_a_benchmark_start_from_the_seed(folder):
    (cell,) = cells(benchmark=("own.py:global_random",), model=("own.py:growing",))
    first = ended_well(cell)
    ended_well(cells(benchmark=("own.py:by_class",), model=("own.py:growing",))[0])
    pd.testing.assert_frame_equal(first, ended_well(cell))


def test_a_seed_whose_benchmark_is_another_fails_alone(folder):
    stream = {"benchmark": ("own.py:changing",), "model": ("own.py:growing",)}
    first, second = cells(seeds=(0, 1), **stream)
    ended_well(first)
    assert "same experiences and scenario with each seed" in result(second).record["reason"]


def test_the_same_file_elsewhere_is_the_same_run_and_a_changed_one_is_not(folder, monkeypatch):
    here = cells(benchmark=("own.py:by_class",))[0]
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert cells(benchmark=("../own.py:by_class",))[0].run_id == here.run_id
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert cells(benchmark=("~/own.py:by_class",))[0].run_id == here.run_id
    assert cells(benchmark=(f"{folder}/own.py:by_class",))[0].run_id == here.run_id
    (folder / "own.py").write_text(OWN + "\n")
    assert cells(benchmark=("../own.py:by_class",))[0].run_id != here.run_id


def test_ids_of_runs_by_name_are_as_they_were():
    cell = RunSettings("split", "digits", "task", "naive", 0)
    assert cell.run_id == "split-digits-task-naive-58f511aa89-s0"


QUICK = ["--seeds", "0", "--epochs", "1", "--processes", "1", "--hidden-size", "8", "--out", "out"]
SWEEP = ["sweep", "--benchmark", "own.py:by_class", "--methods", "naive", *QUICK]


def test_a_changed_file_is_not_mixed_with_runs_of_the_old_one(folder, capsys):
    assert main(SWEEP) == 0
    (folder / "own.py").write_text(OWN + "\nx = 1\n")
    assert main(SWEEP) == 2
    said = capsys.readouterr().err
    assert "`out` must hold runs of own.py:by_class as it is" in said
    assert "--mix-code" in said
    assert main([*SWEEP, "--mix-code"]) == 0
    capsys.readouterr()
    assert main(["table", "out"]) == 0
    assert "benchmark sha256" in capsys.readouterr().out


def test_a_file_that_changes_meanwhile_fails_the_runs_that_begin_later(folder):
    cell = cells(benchmark=("own.py:by_class",))[0]
    source = own_data((find_function("benchmark", "own.py:by_class").file,))
    (folder / "own.py").write_text(OWN + "\ny = 2\n")
    (file,) = source.files
    assert "is not the file that the command began with" in changed_file(source.files)
    (folder / "own.py").unlink()
    assert "can't be read here (No such file" in changed_file(source.files)
    (folder / "own.py").write_text(OWN)
    assert changed_file((file,)) == ""
    assert run(cell, source).record["status"] == "ok"


MISTAKES = {
    "nowhere.py:f": "must be a function in a file that can be read, got nowhere.py:f (No such",
    "own.txt:f": "must be one of",
    "own.py": "must be one of",
    "own.py:": "must be one of",
    "own.py:1f": "must be one of",
    "folder.py:f": "must be a function in a file that can be read, got folder.py:f (Is a directory",
    "own.py:plian": "be a function in that file, as plain is.",
    "own.py:torch": "be a function in that file",
    "syntax.py:f": "must be in a file of Python code (line 1:",
    "raises.py:f": "must be in a file that can be imported: ZeroDivisionError",
    "exits.py:f": "must be in a file that can be imported: SystemExit: 3",
    "bad.py:raises": "must run on ",
    "bad.py:exits": "SystemExit",
    "bad.py:none": "must return",
    "bad.py:argument": "not `learning_rate`",
    "bad.py:positional": "not `seed`",
    "a b/own file.py:none": "own file.py:none must return",
    "a:b/own.py:none": "own.py:none must return",
    "null.py:f": "must be in a file",
}


@pytest.mark.parametrize("setting", ["benchmark", "model", "method"])
@pytest.mark.parametrize("value", MISTAKES)
def test_a_wrong_file_or_function_is_refused_in_one_line(folder, capsys, setting, value):
    (folder / "folder.py").mkdir()
    for name in ("a b", "a:b"):
        (folder / name).mkdir()
    bad = (
        "def raises():\n    return 1 / 0\n"
        "def exits():\n    raise SystemExit\n"
        "def none():\n    return None\n"
        "def argument(learning_rate):\n    pass\n"
        "def positional(seed, n_classes, /):\n    pass\n"
    )
    for name, code in {
        "syntax.py": "def f(:\n",
        "raises.py": "1 / 0",
        "exits.py": "import sys; sys.exit(3)",
        "null.py": "\0",
        "own.txt": "",
        "bad.py": bad,
        "a b/own file.py": bad,
        "a:b/own.py": bad,
    }.items():
        (folder / name).write_text(code)
    given = {"--benchmark": "own.py:by_class", "--model": "mlp", "--method": "naive"}
    given[f"--{setting}"] = value
    options = [part for pair in given.items() for part in pair]
    assert main(["sweep", *options, *QUICK]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert MISTAKES[value] in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--model": "own.py:pixels"}, "`model` own.py:pixels must take a batch of the stream: "),
        (
            {"--model": "two.py:few"},
            "must return logits [N, 4 or more] for a batch of N, got",
        ),
        ({"--model": "two.py:whole_numbers"}, "for a batch of N, got (2, 4) torch.int64 for N = 2"),
        ({"--model": "two.py:frozen"}, "must have a parameter with requires_grad=True"),
        ({"--model": "cnn"}, "`model` must be mlp for samples of the shape (6,), got cnn"),
        (
            {"--method": "two.py:not_plugins"},
            "a list of Avalanche plugins, got one of int",
        ),
        (
            {"--method": "two.py:same_plugin"},
            "must make new plugins or parameters in each call, since each run begins anew, got a "
            "DiagonalEWCPlugin twice",
        ),
        ({"--model": "two.py:same_body"}, "since each run begins anew, got a Parameter twice"),
        ({"--method": "two.py:losses"}, "must return one loss at most"),
        ({"--method": "two.py:default"}, "must have no default for `ewc_lambda`"),
        (
            {"--method": "own.py:builtin"},
            "`ewc_lambda` must be given for own.py:builtin on own.py:by_class",
        ),
        ({"--method": "ewc"}, "`ewc_lambda` must be given for ewc on own.py:by_class"),
        ({"--benchmark": "two.py:unequal"}, "as many experiences to train on as to test on"),
        ({"--benchmark": "two.py:regression"}, "whose `dataset` has classes as its `targets`"),
        ({"--benchmark": "two.py:broken"}, "has classes as its `targets`: KeyError: 'lost'."),
        ({"--benchmark": "two.py:unread"}, "whose `dataset` gives samples: OSError: disk gone."),
        ({"--experiences": "3"}, "must have an argument `n_experiences`"),
        ({"--validation": None}, "must have an argument `validation`"),
        ({"--pixels": "unit"}, "`pixels` must be normalized on an own benchmark"),
        ({"--model": "own.py:plain", "--scenario": "class", "--head": "cosine"}, "`head` must be"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(folder, capsys, options, said):
    (folder / "two.py").write_text(
        OWN
        + """
def few():
    return torch.nn.Linear(6, 3)
PLUGIN, BODY = DiagonalEWCPlugin(1.0), torch.nn.Linear(6, 4)
def same_plugin():
    return [PLUGIN]
def same_body(n_classes):
    return torch.nn.Sequential(BODY, torch.nn.Linear(4, n_classes))
class whole_numbers(torch.nn.Linear):
    def __init__(self, n_classes):
        super().__init__(6, n_classes)
    def forward(self, x):
        return super().forward(x).long()
def frozen(n_classes):
    return torch.nn.Linear(6, n_classes).requires_grad_(False)
def not_plugins():
    return [1]
def losses():
    return [Smooth(), Smooth()]
def default(ewc_lambda=1.0):
    return []
def unequal(seed):
    benchmark = by_class(seed)
    return CLScenario([benchmark.train_stream, benchmark.test_stream[:1]])
class Unread(torch.utils.data.Dataset):
    targets = [0, 1]
    def __len__(self):
        return 2
    def __getitem__(self, i):
        raise OSError("disk gone")
def unread(seed):
    return nc_benchmark(Unread(), Unread(), 1, task_labels=False)
class Broken:
    task_labels = [0]
    @property
    def dataset(self):
        raise KeyError("lost")
class broken:
    def __init__(self, seed):
        self.train_stream = self.test_stream = [Broken()]
def regression(seed):
    dataset = make_avalanche_dataset(TensorDataset(torch.zeros(9, 6), torch.zeros(9)))
    return benchmark_from_datasets(train=[dataset], test=[dataset])
"""
    )
    given = {"--benchmark": "own.py:by_class", "--method": "naive"} | options
    command = [part for pair in given.items() for part in pair if part is not None]
    assert main(["sweep", *command, *QUICK]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_lambda_of_an_own_method_is_tuned_for_that_file_alone(folder, capsys):
    arm = ["--benchmark", "own.py:of_length", "--experiences", "2", "--model", "own.py:plain"]
    arm += ["--hidden-size", "4", "--epochs", "1", "--processes", "1", "--method"]
    arm += ["own.py:builtin"]
    assert main(["tune", *arm, "--seeds", "100", "--out", "tuned"]) == 0
    reported = ["sweep", *arm, "--seeds", "0", "--tuned", "tuned", "--out", "out"]
    assert main(reported) == 0
    chosen = pd.read_csv("tuned/tuned.csv")["ewc_lambda"].item()
    assert tables.load("out")["runs"]["ewc_lambda"].item() == chosen
    (folder / "own.py").write_text(OWN + "\nz = 3\n")
    assert main(reported) == 2
    assert "_sha256 is " in capsys.readouterr().err


def test_one_method_has_two_names_on_the_command_line_and_in_files(tmp_path):
    job = parse("sweep", Sweep, ["--method", "naive", "joint"], None)
    assert job.methods == ("naive", "joint")
    (tmp_path / "grid.toml").write_text('method = "naive"')
    assert parse("sweep", Sweep, ["--config", str(tmp_path / "grid.toml")], None).methods == (
        "naive",
    )
    with pytest.raises(ValueError, match="`--methods` must be given once"):
        parse("sweep", Sweep, ["--method", "naive", "--methods", "joint"], None)

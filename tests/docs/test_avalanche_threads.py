"""The answers to Avalanche's threads say what their code finds."""

import pytest
import torch
from avalanche.benchmarks import tensors_benchmark

from support.pages import run_page
from support.paths import ROOT


@pytest.fixture(scope="module")
def names():
    return run_page(ROOT / "docs" / "pages" / "how-to" / "avalanche-threads.md")


def test_a_head_per_task_keeps_what_a_single_head_forgets(names):
    assert names["single_head"] < 0.5 < 0.9 < names["heads"]


def test_per_sample_importances_do_not_depend_on_the_batch_size(names):
    exact, batched = names["exact"], names["batched"]
    assert exact == pytest.approx([exact[0]] * 3, rel=1e-5)
    assert batched[0] == pytest.approx(exact[0], rel=1e-5)
    assert batched[2] < 0.7 * batched[1] < 0.5 * batched[0]


def test_online_mode_protects_the_heads_of_all_tasks(names):
    heads = {name.split("classifiers.")[1][0] for name in names["pulled"] if "classifiers" in name}
    assert heads == {"0", "1"}


@pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")
def test_the_baseline_trains_and_evaluates(names, capsys):
    torch.manual_seed(0)
    tasks = [(torch.rand(60, 1, 4, 4), torch.arange(60) % 10) for _ in range(2)]
    benchmark = tensors_benchmark(train_tensors=tasks, test_tensors=tasks, task_labels=[0, 0])
    results = names["baseline"](benchmark, hidden_size=8, epochs=1)
    assert any("Acc" in key for key in results)

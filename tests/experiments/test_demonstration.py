"""The plain loop's demonstration: its Fisher, its tasks, and what its committed tables say."""

import pandas as pd
import pytest
import torch

from ewc_plugin.plain import EWC
from experiments.data.sources import find_data, load_images
from experiments.results import tables
from experiments.studies.demonstration.fisher import FISHER, loop_fisher, time_fisher
from experiments.studies.demonstration.study import (
    CURVES,
    Demonstration,
    make_network,
    make_tasks,
    train_all,
)
from support.paths import RESULTS
from support.reference import loop_fisher as reference_fisher
from support.reference import relative_error

RESULTS = RESULTS / "demonstration"
SMALL = Demonstration(epochs=2, learning_rate=1e-3, samples=20, hidden_size=8, tasks=3)


@pytest.fixture(scope="module")
def digits():
    return find_data("digits", None)


def test_three_ways_to_the_fisher_agree(digits):
    torch.manual_seed(0)
    model = make_network(64, 9).double()
    samples = list(make_tasks(digits, 1, 0)[0].x[:11].double())
    reference = reference_fisher(model, torch.stack(samples), None, "predicted")
    assert relative_error(loop_fisher(model, samples), reference) < 1e-12
    assert relative_error(EWC(model, samples).fisher, reference) < 1e-12


def test_tasks_permute_the_same_pixels(digits):
    train, _ = load_images(digits)
    first, second = make_tasks(digits, 2, seed=0)
    torch.testing.assert_close(first.x, train.images().flatten(1), rtol=0, atol=0)
    assert not torch.equal(first.x, second.x)
    for a, b in ((first.x, second.x), (first.test_x, second.test_x)):
        torch.testing.assert_close(a.sort(dim=1).values, b.sort(dim=1).values, rtol=0, atol=0)
    order = [int((first.x == column[:, None]).all(0).nonzero()[0, 0]) for column in second.x.T[:9]]
    torch.testing.assert_close(second.test_x[:, :9], first.test_x[:, order], rtol=0, atol=0)


def test_rows_are_complete_and_the_first_task_is_shared(digits):
    table = tables.frame(train_all(SMALL, digits, seed=0), CURVES)
    assert len(table) == 3 * (2 * 1 + 2 * 2 + 2 * 3)
    first = [rows.drop(columns="method") for _, rows in table[table["task"] == 0].groupby("method")]
    pd.testing.assert_frame_equal(first[0].reset_index(drop=True), first[1].reset_index(drop=True))
    later = table[table["epoch"] == 6].pivot(index="method", columns="eval_task", values="loss")
    assert later.nunique().tolist() == [3, 3, 3]


def test_lambda_zero_is_plain_sgd(digits):
    table = tables.frame(
        train_all(Demonstration(**{**vars(SMALL), "ewc_lambda": 0.0}), digits, 0), CURVES
    )
    by_method = [rows[["loss", "accuracy"]].to_numpy() for _, rows in table.groupby("method")]
    assert (by_method[0] == by_method[1]).all()
    assert (by_method[0] == by_method[2]).all()


def test_timed_fishers_agree(digits):
    model, x = make_network(64, 9), make_tasks(digits, 1, 0)[0].x
    rows = tables.frame(time_fisher(model, x, samples=5, rounds=2), FISHER)
    assert rows["n_samples"].tolist() == [5, 5, 50, 50]
    assert (rows["largest_difference"] < 1e-5).all()

"""The plain loop's demonstration: plain SGD against EWC on three tasks of permuted MNIST.

It follows the small implementation that `ewc_plugin.plain` takes its names from: the same network
but for a ReLU on the logits, step size, lambda and number of Fisher samples. Two EWCs are
shown: theta* and F kept from the end of the earlier tasks, as in the paper, and both renewed at the
start of every epoch, as that demonstration does, which lets the anchor drift with the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from ewc_plugin.plain import EWC, ewc_train, normal_train
from experiments.data.sources import DataSource, load_images
from experiments.reporting.study_output import OnImages, columns, study_on_images
from experiments.results.schemas import PROVENANCE
from experiments.settings.run import N_CLASSES
from experiments.settings.values import Count, Lambda, Positive, Seed
from experiments.studies.demonstration.figure import METHODS, draw_curves
from experiments.studies.demonstration.fisher import FISHER, time_fisher

EPOCHS: dict[str, int] = {"mnist": 50, "digits": 400, "fashion-mnist": 50}
LEARNING_RATE: dict[str, float] = {"mnist": 1e-3, "digits": 3e-3, "fashion-mnist": 1e-3}

CURVES = pa.DataFrameSchema(
    {
        **columns(str, "dataset"),
        **columns(str, "method", check=pa.Check.isin(list(METHODS))),
        **columns(int, "seed"),
        **columns(int, "task", "eval_task", check=pa.Check.ge(0)),
        **columns(int, "epoch", check=pa.Check.ge(1)),
        **columns(float, "train_loss", "loss"),
        **columns(float, "accuracy", check=pa.Check.in_range(0, 1)),
        **PROVENANCE,
    },
    unique=["method", "seed", "epoch", "eval_task"],
    strict=True,
    name="curves.csv",
)


@dataclass(frozen=True)
class Demonstration(OnImages):
    """Three tasks, plain SGD against EWC, and the Fisher beside a loop over samples."""

    ewc_lambda: Lambda = 1000.0
    """Weight of the penalty: cross_entropy + ewc_lambda * penalty."""
    samples: Count = 200
    """Fisher samples per old task."""
    tasks: Count = 3
    """The first has the pixels as they are, each other one permutes them anew."""
    epochs: Count | None = None
    """Passes over each task's data. Unset: 50 on MNIST, 400 on the digits."""
    learning_rate: Positive | None = None
    """Step size of SGD. Unset: 0.001 on MNIST, 0.003 on the digits."""
    batch_size: Count = 128
    """Samples per training mini-batch."""
    hidden_size: Count = 200
    """Units in each of the three hidden layers."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Each seeds the permutations, the initial weights, the order and the Fisher samples."""
    rounds: Count = 21
    """How often both ways to the Fisher are timed, in turns."""
    out: str = "runs/demonstration"
    """Folder of the tables and the plot."""


@dataclass(frozen=True)
class TaskData:
    """Pixels [N, P] in 0-1 and classes [N], for training and testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def run(settings: Demonstration) -> pd.DataFrame:
    """Train with every method; then times the Fisher. Writes two tables and a plot."""
    torch.set_num_threads(1)
    source, output = study_on_images(settings)
    settings = replace(
        settings,
        epochs=settings.epochs or EPOCHS[source.name],
        learning_rate=settings.learning_rate or LEARNING_RATE[source.name],
    )
    rows: list[dict[str, Any]] = []
    for seed in settings.seeds:
        output.console.print(f"Seed {seed} ...")
        rows += output.cell(f"curves {seed}", partial(train_all, settings, source, seed))
    fisher_rows = output.cell("Fisher", partial(_fisher_rows, settings, source))
    curves, fisher = output.table(rows, CURVES), output.table(fisher_rows, FISHER)
    output.figure(draw_curves(curves), "curves")
    last = curves[curves["epoch"] == curves["epoch"].max()]
    shown = last.pivot_table(index="method", columns="eval_task", values="accuracy", sort=False)
    output.console.print("Mean test accuracy on each task at the end:")
    output.show(shown, "%.3f")
    output.show(fisher.drop(columns="rounds"), index=False)
    return curves


def make_tasks(source: DataSource, n: int, seed: int) -> list[TaskData]:
    """The images as they are, then n - 1 permutations of their pixels."""
    train, test = load_images(source)
    x, test_x = train.images().flatten(1), test.images().flatten(1)
    random = np.random.RandomState(seed)
    orders = [np.arange(x.size(1)), *(random.permutation(x.size(1)) for _ in range(n - 1))]
    return [TaskData(x[:, o], train.targets, test_x[:, o], test.targets) for o in orders]


def make_network(n_pixels: int, hidden_size: int) -> nn.Sequential:
    """Three hidden layers with ReLU, initialised from the global RNG."""
    layers: list[nn.Module] = []
    for n_inputs in (n_pixels, hidden_size, hidden_size):
        layers += [nn.Linear(n_inputs, hidden_size), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden_size, N_CLASSES))


def train_all(settings: Demonstration, source: DataSource, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of every method; the first task, which knows no penalty, is trained once."""
    tasks = make_tasks(source, settings.tasks, seed)
    torch.manual_seed(seed)
    model = make_network(tasks[0].x.size(1), settings.hidden_size)
    base = {"dataset": source.name, "seed": seed}
    first = list(_train_task(model, tasks, 0, settings, seed, "sgd"))
    for method in METHODS:
        learner = copy.deepcopy(model)
        later = (
            _train_task(learner, tasks, t, settings, seed, method) for t in range(1, len(tasks))
        )
        for row in chain(first, *later):
            yield {**base, "method": method, **row}


def _train_task(
    model: nn.Module,
    tasks: list[TaskData],
    task: int,
    settings: Demonstration,
    seed: int,
    method: str,
) -> Iterator[dict[str, Any]]:
    """One task's epochs, a row per epoch and task seen so far."""
    epochs, learning_rate = settings.epochs, settings.learning_rate
    assert epochs is not None and learning_rate is not None
    generator = torch.Generator().manual_seed(1000 * seed + task)
    old = [sample for t in tasks[:task] for sample in _draw(t.x, settings.samples, generator)]
    data = TensorDataset(tasks[task].x, tasks[task].y)
    order = RandomSampler(data, generator=generator)
    # A list of indices fetches a whole batch at once.
    loader = DataLoader(
        data, sampler=BatchSampler(order, settings.batch_size, drop_last=False), batch_size=None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    ewc = EWC(model, old) if old and method != "sgd" else None
    for epoch in range(1, epochs + 1):
        if ewc is None:
            train_loss = normal_train(model, optimizer, loader)
        else:
            if method == "ewc-renewed" and epoch > 1:
                ewc = EWC(model, old)
            train_loss = ewc_train(model, optimizer, loader, ewc, settings.ewc_lambda)
        for seen, other in enumerate(tasks[: task + 1]):
            yield {
                "task": task,
                "epoch": task * epochs + epoch,
                "eval_task": seen,
                "train_loss": train_loss,
                **_evaluate(model, other),
            }


def _draw(x: Tensor, n: int, generator: torch.Generator) -> list[Tensor]:
    """Samples without replacement, as a list."""
    return list(x[torch.randperm(len(x), generator=generator)[:n]])


@torch.no_grad()
def _evaluate(model: nn.Module, task: TaskData) -> dict[str, float]:
    logits = model.eval()(task.test_x)
    return {
        "loss": float(F.cross_entropy(logits, task.test_y)),
        "accuracy": float((logits.argmax(1) == task.test_y).double().mean()),
    }


def _fisher_rows(settings: Demonstration, source: DataSource) -> Iterator[dict[str, Any]]:
    """Times the Fisher of the network after an epoch of the first task."""
    seed = settings.seeds[0]
    (task,) = tasks = make_tasks(source, 1, seed)
    torch.manual_seed(seed)
    model = make_network(task.x.size(1), settings.hidden_size)
    list(_train_task(model, tasks, 0, replace(settings, epochs=1), seed, "sgd"))
    return time_fisher(model, task.x, settings.samples, settings.rounds)

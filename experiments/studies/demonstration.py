"""The plain loop's demonstration: plain SGD against EWC on three tasks of permuted MNIST.

It follows the small implementation that `ewc_plugin.plain` takes its names from: the same network
but for a ReLU on the logits, step size, importance and number of Fisher samples. Two EWCs are
shown: theta* and F kept from the end of the earlier tasks, as in the paper, and both renewed at the
start of every epoch, as that demonstration does, which lets the anchor drift with the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from ewc_plugin.plain import EWC, ewc_train, normal_train
from experiments.data.sources import DataSource, find_data, load_images
from experiments.reporting.figures.style import DPI
from experiments.results import tables
from experiments.results.environment import write_environment
from experiments.settings.run import N_CLASSES, Dataset
from experiments.studies.demonstration_fisher import FISHER, time_fisher

METHODS = {
    "sgd": ("plain SGD", "#D55E00"),
    "ewc": ("EWC", "#009E73"),
    "ewc-renewed": ("EWC, anchor renewed every epoch", "#CC79A7"),
}
EPOCHS: dict[str, int] = {"mnist": 50, "digits": 400}
LEARNING_RATE: dict[str, float] = {"mnist": 1e-3, "digits": 3e-3}

CURVES = pa.DataFrameSchema(
    {
        "dataset": pa.Column(str),
        "method": pa.Column(str, pa.Check.isin(list(METHODS))),
        "seed": pa.Column(int),
        "task": pa.Column(int, pa.Check.ge(0)),
        "epoch": pa.Column(int, pa.Check.ge(1)),
        "eval_task": pa.Column(int, pa.Check.ge(0)),
        "train_loss": pa.Column(float, coerce=True),
        "loss": pa.Column(float, coerce=True),
        "accuracy": pa.Column(float, pa.Check.in_range(0, 1), coerce=True),
    },
    unique=["method", "seed", "epoch", "eval_task"],
    strict=True,
    name="curves.csv",
)


@dataclass(frozen=True)
class Demonstration:
    """Three tasks, plain SGD against EWC, and the Fisher beside a loop over samples."""

    importance: float = 1000.0
    """Weight of the penalty: cross_entropy + importance * penalty."""
    samples: int = 200
    """Fisher samples per old task."""
    tasks: int = 3
    """The first has the pixels as they are, each other one permutes them anew."""
    epochs: int | None = None
    """Passes over each task's data. Unset: 50 on MNIST, 400 on the digits."""
    learning_rate: float | None = None
    """Step size of SGD. Unset: 0.001 on MNIST, 0.003 on the digits."""
    batch_size: int = 128
    """Samples per training mini-batch."""
    hidden_size: int = 200
    """Units in each of the three hidden layers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds the permutations, the initial weights, the order and the Fisher samples."""
    rounds: int = 21
    """How often both ways to the Fisher are timed, in turns."""
    dataset: Dataset | None = None
    """Images to use. Unset: MNIST, or scikit-learn's digits where it can't be had."""
    data_root: str | None = None
    """Folder that holds, or gets, MNIST/raw."""
    out: str = "runs/demonstration"
    """Folder of the tables and the plot."""


@dataclass(frozen=True)
class Task:
    """Pixels [N, P] in 0-1 and classes [N], for training and testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def run(settings: Demonstration) -> pd.DataFrame:
    """Trains with every method; then times the Fisher. Writes two tables and a plot.

    Args:
        settings: Of the demonstration.

    Returns:
        A row per method, seed, epoch and task seen so far; also in `curves.csv`.
    """
    console = Console()
    torch.set_num_threads(1)
    source = find_data(settings.dataset, settings.data_root)
    if source.note:
        console.print(f"NOTE: {source.note}", style="bold yellow", markup=False, soft_wrap=True)
    settings = replace(
        settings,
        epochs=settings.epochs or EPOCHS[source.name],
        learning_rate=settings.learning_rate or LEARNING_RATE[source.name],
    )
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in settings.seeds:
        console.print(f"Seed {seed} ...")
        rows += train_all(settings, source, seed)
        curves = tables.frame(rows, CURVES)
        tables.write(curves, folder, CURVES)
    fisher = tables.frame(_fisher_rows(settings, source), FISHER)
    tables.write(fisher, folder, FISHER)
    plot(curves).savefig(folder / "curves.png", dpi=DPI, metadata={"Software": None})
    write_environment(folder, source)
    last = curves[curves["epoch"] == curves["epoch"].max()]
    shown = last.pivot_table(index="method", columns="eval_task", values="accuracy", sort=False)
    console.print("Mean test accuracy on each task at the end:")
    console.print(shown.to_string(float_format="%.3f"), highlight=False)
    shown = fisher.drop(columns="rounds")
    console.print(shown.to_string(index=False, float_format="%.3g"), soft_wrap=True)
    return curves


def make_tasks(source: DataSource, n: int, seed: int) -> list[Task]:
    """The images as they are, then n - 1 permutations of their pixels."""
    train, test = load_images(source)
    x, test_x = train.images().flatten(1), test.images().flatten(1)
    random = np.random.RandomState(seed)
    orders = [np.arange(x.size(1)), *(random.permutation(x.size(1)) for _ in range(n - 1))]
    return [Task(x[:, o], train.targets, test_x[:, o], test.targets) for o in orders]


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
    tasks: list[Task],
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
            train_loss = ewc_train(model, optimizer, loader, ewc, settings.importance)
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
def _evaluate(model: nn.Module, task: Task) -> dict[str, float]:
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


def plot(curves: pd.DataFrame) -> plt.Figure:
    """Test accuracy and loss over epochs, a column per task, a colour per method."""
    n = int(curves["eval_task"].max()) + 1
    figure, axes = plt.subplots(
        2, n, figsize=(3.6 * n, 6), sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    length = curves["epoch"].max() // n
    for (eval_task, method), rows in curves.groupby(["eval_task", "method"], sort=False):
        label, colour = METHODS[method]
        for axis, quantity in zip(axes[:, eval_task], ("accuracy", "loss"), strict=True):
            by_epoch = rows.groupby("epoch")[quantity]
            mean, low, high = by_epoch.mean(), by_epoch.min(), by_epoch.max()
            axis.plot(mean.index, mean, color=colour, label=label, linewidth=1.3)
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.2, linewidth=0)
    for task in range(n):
        axes[0, task].set_title(f"tested on task {task + 1}", fontsize=10)
        axes[1, task].set_xlabel("epoch")
        for axis in axes[:, task]:
            axis.grid(alpha=0.3)
            for boundary in range(1, n):
                axis.axvline(boundary * length, color="0.4", linewidth=0.8, linestyle=":")
    axes[0, 0].set(ylabel="test accuracy", ylim=(0, 1))
    axes[1, 0].set(ylabel="test loss (nats)", ylim=(0, None))
    axes[0, -1].legend(fontsize=8, loc="lower left")  # where the last task has no curve yet
    seeds = curves["seed"].nunique()
    figure.suptitle(
        f"Permuted {curves['dataset'].iloc[0]}, seeds: {seeds}; line: mean, band: range; "
        "dotted: the next task begins",
        fontsize=10,
    )
    return figure

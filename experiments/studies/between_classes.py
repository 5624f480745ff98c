"""The Fisher's parts between the classes and within them, task by task.

The per-sample Fisher is the sum of a part between the classes, the class means, and one within them
(the law of total variance). A network is trained with the per-sample Fisher on predicted labels;
after each task the traces of all parts are taken, and those of Avalanche's F, whose mini-batches
are of one class where the data come sorted by class, as Avalanche's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pandera.pandas as pa
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ewc_plugin import diagonal_fisher
from ewc_plugin.avalanche.metrics import fisher_trace
from experiments.data.sources import DataSource
from experiments.data.streams import shared_stream
from experiments.data.tensor_path import TensorRows, experience_rows
from experiments.reporting.figures import style
from experiments.reporting.labels import stream_title
from experiments.reporting.study_output import OnImages, columns, study_on_images
from experiments.results.schemas import PROVENANCE
from experiments.results.statistics import interval
from experiments.settings.run import STREAM, Benchmark, RunSettings, Scenario
from experiments.settings.tuned import CHOSEN_LAMBDA
from experiments.settings.values import Count, Seed
from experiments.training.run import Run
from experiments.training.trained import task_logits

STREAMS: tuple[tuple[Benchmark, Scenario, int], ...] = (
    ("permuted", "domain", 10),
    ("split", "task", 5),
    ("split", "domain", 5),
    ("split", "class", 5),
)
LAMBDAS = {  # those of the main job on MNIST
    "permuted": CHOSEN_LAMBDA["permuted", "mnist", "domain", "ewc"],
    "split": CHOSEN_LAMBDA["split", "mnist", "task", "ewc"],
}
TYPES = {  # by the labels: per sample, and between the classes
    "predicted": ("predicted", "class_mean"),
    "data's": ("empirical", "class_mean_empirical"),
}
# Parts of F, each a Fisher type or the difference of two, and its colour.
PER_SAMPLE, BETWEEN, WITHIN = "per sample", "between classes", "within classes"
BY_CLASS, SHUFFLED = "mini-batches, sorted by class", "mini-batches, shuffled"
COLOURS = {
    PER_SAMPLE: style.FISHER_COLOURS["predicted"],
    BETWEEN: style.FISHER_COLOURS["class_mean"],
    WITHIN: style.PALETTE["grey"][0],
    BY_CLASS: style.METHOD_COLOURS["avalanche-ewc"],
    SHUFFLED: style.PALETTE["sky"][0],
}
BETWEEN_CLASSES = pa.DataFrameSchema(
    {
        **columns(str, *STREAM),
        **columns(int, "seed", "experience", check=pa.Check.ge(0)),
        **columns(str, "labels", check=pa.Check.isin(TYPES)),
        **columns(str, "part", check=pa.Check.isin(COLOURS)),
        **columns(float, "trace", check=pa.Check.ge(0)),
        **columns(float, "ewc_lambda", check=pa.Check.ge(0)),
        **columns(float, "accuracy", "last_accuracy", check=pa.Check.in_range(0, 1)),
        **PROVENANCE,
    },
    unique=[*STREAM, "seed", "experience", "labels", "part"],
    strict=True,
    name="between_classes.csv",
)


@dataclass(frozen=True)
class BetweenClasses(OnImages):
    """Traces of the Fisher's parts between and within the classes, task by task."""

    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Each trains a network of its own."""
    batch_size: Count = 128
    """Mini-batch of Avalanche's F, which depends on it."""
    hidden_size: Count = 256
    """Units in the hidden layer."""
    out: str = "runs/between-classes"
    """Folder of the table and the plot."""


def run(settings: BetweenClasses) -> pd.DataFrame:
    """Train on every stream; write the parts of F after each task to `between_classes.csv`."""
    source, output = study_on_images(settings)
    rows: list[dict[str, Any]] = []
    for benchmark, scenario, n_experiences in STREAMS:
        for seed in settings.seeds:
            cell = RunSettings(
                *(benchmark, source.name, scenario, "ewc", seed),
                fisher_type="predicted",
                ewc_lambda=LAMBDAS[benchmark],
                mode="online",
                decay_factor=1.0,
                n_experiences=n_experiences,
                epochs=1,
                hidden_size=settings.hidden_size,
                hidden_layers=1,
            )
            measure = partial(_rows, cell, source, settings.batch_size)
            rows += output.cell(cell.run_id, measure)
    table = output.table(rows, BETWEEN_CLASSES)
    output.figure(draw_parts(table), "between_classes")
    shown = table.groupby([*STREAM, "labels", "part", "experience"], sort=False)["trace"].mean()
    output.show(shown.unstack().round(3))
    return table


def _rows(cell: RunSettings, source: DataSource, batch_size: int) -> Iterator[dict[str, Any]]:
    current = Run(cell, source)
    stream = shared_stream(cell, source)
    found: list[dict[tuple[str, str], float]] = []

    def after_an_experience(done: int, accuracy: float) -> None:
        rows = experience_rows(stream, stream.benchmark.train_stream[done - 1])
        found.append(dict(parts_of(current.model, rows, batch_size)))

    current.run(after_an_experience)
    accuracy = {(row["train_exp"], row["eval_exp"]): row["accuracy"] for row in current.rows}
    for experience, traces in enumerate(found):
        for (labels, part), trace in traces.items():
            yield {
                **{name: getattr(cell, name) for name in STREAM},
                "seed": cell.seed,
                "experience": experience,
                "labels": labels,
                "part": part,
                "trace": trace,
                "ewc_lambda": cell.ewc_lambda,
                "accuracy": accuracy[experience, experience],
                "last_accuracy": accuracy[cell.n_experiences - 1, experience],
            }


def parts_of(
    model: torch.nn.Module, rows: TensorRows, batch_size: int
) -> Iterator[tuple[tuple[str, str], float]]:
    """Traces of the Fisher's parts at the network's weights.

    Args:
        model: The network.
        rows: The samples of an experience, in Avalanche's order.
        batch_size: Of Avalanche's F.

    Yields:
        (labels, part), and the trace. Unit: nats / theta^2.
    """
    for labels, types in TYPES.items():
        per_sample, between = (_trace(model, rows.batches(1024), name) for name in types)
        yield (labels, PER_SAMPLE), per_sample
        yield (labels, BETWEEN), between
        yield (labels, WITHIN), per_sample - between
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for part, index in ((BY_CLASS, rows.y.argsort(stable=True)), (SHUFFLED, order)):
        batches = (rows[some] for some in index.split(batch_size))
        yield ("data's", part), _trace(model, batches, "batched")


def _trace(model: torch.nn.Module, batches: Any, fisher_type: str) -> float:
    fisher = diagonal_fisher(model, batches, fisher_type, forward=task_logits)
    return fisher_trace(fisher)


def draw_parts(table: pd.DataFrame) -> Figure:
    """A column per stream: the parts' traces by task, and the accuracy on it, then and at last."""
    streams = list(table.groupby(list(STREAM), sort=False))
    figure, axes = plt.subplots(
        *(2, len(streams)),
        figsize=(2.9 * len(streams), 5.4),
        height_ratios=[3, 2],
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for (traces, accuracies), (stream, rows) in zip(axes.T, streams, strict=True):
        _draw_traces(traces, rows)
        traces.set_title(stream_title(*stream).replace(", ", ",\n"), fontsize=9)
        _draw_accuracies(accuracies, rows)
    axes[0, 0].set_ylabel("trace of F (nats / θ²)")
    axes[1, 0].set_ylabel("accuracy on the task")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    more = axes[1, 0].get_legend_handles_labels()
    figure.legend(
        *(handles + more[0], labels + more[1]), fontsize=8, ncols=4, loc="outside lower center"
    )
    n = table["seed"].nunique()
    style.title(
        figure,
        "Per-sample Fisher = between the classes + within them, after each task",
        f"predicted labels (mini-batches: the data's); mean of n = {n} networks, 95 % interval",
    )
    return figure


def _draw_traces(axis: Axes, rows: pd.DataFrame) -> None:
    for (part, labels), line in rows.groupby(["part", "labels"], sort=False):
        if labels == "predicted" or part in (BY_CLASS, SHUFFLED):
            means = line.groupby("experience")["trace"].mean()
            axis.plot(means.index + 1, means, "-o", color=COLOURS[part], ms=3, label=part)
    style.log_axis(axis, "y")


def _draw_accuracies(axis: Axes, rows: pd.DataFrame) -> None:
    one = rows[(rows["part"] == PER_SAMPLE) & (rows["labels"] == "predicted")]
    for column, look, words in (
        ("accuracy", "--", "accuracy right after the task"),
        ("last_accuracy", "-", "accuracy after the last task"),
    ):
        by_task = one.groupby("experience")[column]
        means = by_task.mean()
        axis.plot(means.index + 1, means, look, color=style.INK, lw=1.2, label=words)
        bands = pd.DataFrame([interval(values.to_numpy()) for _, values in by_task])
        low, high = bands["ci_low"], bands["ci_high"]
        axis.fill_between(means.index + 1, low, high, color=style.INK, alpha=0.1, lw=0)
    axis.set_ylim(*style.limits(pd.concat([one["accuracy"], one["last_accuracy"]])))
    n = one["experience"].max() + 1
    axis.set(xlabel="task", xticks=range(1, n + 1, 1 + n // 6))

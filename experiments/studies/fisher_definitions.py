"""The three definitions of Fisher information, measured while networks train.

The score is d log p(y | x) / d theta. Under the model's own labels its mean is zero, its variance
is its mean square, and both are minus the expected second derivative of log p. Under predicted,
sampled or true labels they differ; how much, and when, is what the table says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pandera.pandas as pa
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.utils import parameters_to_vector

from ewc_plugin.fisher.diagonal import diagonal_fisher
from experiments.data.sources import find_data, load_images
from experiments.reporting.figures import style
from experiments.reporting.figures.style import FISHER_COLOURS
from experiments.reporting.labels import number
from experiments.reporting.study_output import columns, study_output
from experiments.results.schemas import PROVENANCE
from experiments.settings.run import require
from experiments.settings.values import Count, CountOrNone, Positive, Seed

LABELS = {
    "own": ("the model's own (exact)", FISHER_COLOURS["exact"]),
    "sampled": ("one drawn per sample (sampled)", FISHER_COLOURS["sampled"]),
    "predicted": ("predicted", FISHER_COLOURS["predicted"]),
    "empirical": ("true (empirical)", FISHER_COLOURS["empirical"]),
}
FISHER_TYPE = {"own": "exact", "predicted": "predicted", "empirical": "empirical"}

_SHARE = pa.Check.in_range(0, 1 + 1e-9)
_POSITIVE = pa.Check.ge(0)
IDENTITIES = pa.DataFrameSchema(
    {
        **columns(str, "problem"),
        **columns(int, "seed"),
        **columns(int, "step", check=_POSITIVE),
        **columns(str, "labels", check=pa.Check.isin(list(LABELS))),
        **columns(float, "accuracy", check=pa.Check.in_range(0, 1)),
        **columns(float, "loss", "variance", "curvature", "curvature_of_own"),
        **columns(float, "mean_square", "mean_square_of_own", check=_POSITIVE),
        **columns(float, "squared_mean_share", "cosine_with_own", check=_SHARE),
        **columns(float, "variance_difference", "curvature_difference", check=_POSITIVE),
        **columns(float, "package_difference", check=_POSITIVE, nullable=True),
        **PROVENANCE,
    },
    unique=["problem", "seed", "step", "labels"],
    strict=True,
    name="identities.csv",
)


@dataclass(frozen=True)
class Identities:
    """Mean, variance, mean square and curvature of the score, label by label, while training."""

    steps: tuple[CountOrNone, ...] = (0, 3, 10, 30, 100, 300, 1000, 3000)
    """Training steps after which everything is measured."""
    samples: Count = 500
    """Training images, scikit-learn's digits."""
    hidden_size: Count = 8
    """Units of the network's only hidden layer."""
    batch_size: Count = 64
    """Samples per training mini-batch."""
    learning_rate: Positive = 1e-2
    """Step size of Adam."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Each seeds the initial weights, the order of the samples and the drawn labels."""
    out: str = "runs/identities"
    """Folder of the table and the plot."""


class Logistic(nn.Module):
    """Logistic regression with the logits [0, w x + b]."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n_inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 2]."""
        logit = self.layer(x)
        return torch.cat([torch.zeros_like(logit), logit], dim=-1)


@dataclass(frozen=True)
class Moments:
    """Moments of the score per parameter, averaged over the samples and their labels; each [P].

    Attributes:
        mean: E[s]. Unit: nats / theta.
        mean_square: E[s^2]. Unit: nats / theta^2, as the next.
        curvature: -E[d^2 log p / d theta^2].
    """

    mean: Tensor
    mean_square: Tensor
    curvature: Tensor

    @property
    def variance(self) -> Tensor:
        """E[s^2] - E[s]^2, [P]."""
        return self.mean_square - self.mean.square()


def run(settings: Identities) -> pd.DataFrame:
    """Train three models, and measure on the way; write `identities.csv` and a figure."""
    torch.set_num_threads(1)
    source = find_data("digits", None)
    train, _ = load_images(source)
    rule = f"<= {len(train.targets)}, the number of training images"
    require(settings.samples <= len(train.targets), "samples", rule, settings.samples)
    output = study_output(settings, source)
    x, y = train.images().flatten(1)[: settings.samples].double(), train.targets[: settings.samples]
    rows: list[dict[str, Any]] = []
    for name, (make, labels) in problems(settings).items():
        for seed in settings.seeds:
            output.console.print(f"{name}, seed {seed} ...")
            torch.manual_seed(seed)
            measure = partial(measure_while_training, make().double(), x, labels(y), settings, seed)
            found = output.cell(f"{name} {seed}", measure)
            rows += ({"problem": name, "seed": seed, **row} for row in found)
    table = output.table(rows, IDENTITIES)
    output.figure(draw_definitions(table), "identities")
    shown = ["accuracy", "squared_mean_share", "mean_square_of_own", "curvature_of_own"]
    by = table.groupby(["problem", "step", "labels"], sort=False)[shown].mean()
    output.show(by)
    return table


def problems(
    settings: Identities,
) -> dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]]:
    """Name -> how to make the model, and its labels from the digits' classes."""
    hidden = settings.hidden_size
    return {
        "logistic regression": (lambda: Logistic(64), lambda y: y % 2),
        "softmax regression": (lambda: nn.Linear(64, 10), lambda y: y),
        "tanh network": (
            lambda: nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)),
            lambda y: y,
        ),
    }


def measure_while_training(
    model: nn.Module, x: Tensor, y: Tensor, settings: Identities, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of every step asked for, training in between.

    Args:
        model: Maps x to logits [N, C], float64.
        x: Inputs [N, I].
        y: Classes [N].
        settings: Steps, batch size, learning rate.
        seed: Of the order of the samples and of the drawn labels.

    Yields:
        A row per step and kind of labels.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    for step in range(max(settings.steps) + 1):
        if step in settings.steps:
            yield from ({"step": step, **row} for row in measure(model, x, y, generator))
        batch = torch.randint(len(x), (settings.batch_size,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def measure(
    model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """A row per kind of labels, for the model as it is."""
    with torch.no_grad():
        logits = model(x)
    base = {
        "accuracy": float((logits.argmax(1) == y).double().mean()),
        "loss": float(F.cross_entropy(logits, y)),
    }
    weights = label_weights(logits, y, generator)
    found = {labels: moments(model, x, W) for labels, W in weights.items()}
    own = found["own"].mean_square
    for labels, m in found.items():
        yield {
            **base,
            "labels": labels,
            "mean_square": float(m.mean_square.sum()),
            "variance": float(m.variance.sum()),
            "curvature": float(m.curvature.sum()),
            "squared_mean_share": float(m.mean.square().sum() / m.mean_square.sum()),
            "variance_difference": largest_difference(m.variance, m.mean_square),
            "curvature_difference": largest_difference(m.curvature, m.mean_square),
            "mean_square_of_own": float(m.mean_square.sum() / own.sum()),
            "curvature_of_own": float(m.curvature.sum() / own.sum()),
            "cosine_with_own": float(F.cosine_similarity(m.mean_square, own, dim=0)),
            "package_difference": _package_difference(model, x, y, labels, m.mean_square),
        }


def label_weights(logits: Tensor, y: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """How much each label counts for each sample, [N, C], rows summing to 1."""
    p = logits.softmax(1)
    eye = torch.eye(p.size(1), dtype=p.dtype)
    drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)
    return {"own": p, "sampled": eye[drawn], "predicted": eye[p.argmax(1)], "empirical": eye[y]}


def moments(model: nn.Module, x: Tensor, W: Tensor) -> Moments:
    """The score's moments under labels that are weighted by W [N, C], held fixed."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    theta = parameters_to_vector(model.parameters()).detach()  # [P]

    def log_p(theta: Tensor, x: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        named = {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return functional_call(model, named, (x[None],))[0].log_softmax(-1)  # [C]

    def expected(theta: Tensor) -> Tensor:
        return (W * vmap(log_p, (None, 0))(theta, x)).sum() / len(x)

    scores = vmap(jacrev(log_p), (None, 0))(theta, x)  # [N, C, P]
    return Moments(
        mean=torch.einsum("nc,ncp->p", W, scores) / len(x),
        mean_square=torch.einsum("nc,ncp->p", W, scores.square()) / len(x),
        curvature=-_hessian(expected, theta).diagonal(),
    )


def _hessian(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    with warnings.catch_warnings():  # of torch itself, on the first forward-mode derivative
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        second: Tensor = hessian(function)(theta)
    return second


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest entry of |a - b|, relative to the largest of |b|."""
    return float((a - b).abs().max() / b.abs().max())


def _package_difference(
    model: nn.Module, x: Tensor, y: Tensor, labels: str, mean_square: Tensor
) -> float:
    """`largest_difference` of `diagonal_fisher`; NaN for labels that it would draw itself."""
    if labels not in FISHER_TYPE:
        return float("nan")
    fisher = diagonal_fisher(model, [(x, y)], FISHER_TYPE[labels])
    return largest_difference(torch.cat([f.flatten() for f in fisher.values()]), mean_square)


PANELS = {
    "mean_square_of_own": "mean square of the score,\nrelative to the Fisher information",
    "curvature_of_own": "minus second derivative,\nrelative to the Fisher information",
    "squared_mean_share": "part of the mean square\nthat is the squared mean",
}


def draw_definitions(table: pd.DataFrame) -> Figure:
    """A column per problem, a row per quantity, over the steps of training."""
    names = list(dict.fromkeys(table["problem"]))
    figure, axes = plt.subplots(
        *(len(PANELS), len(names)),
        figsize=(3.7 * len(names), 8.4),
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for (problem, labels), rows in table.groupby(["problem", "labels"], sort=False):
        label, colour = LABELS[labels]
        for axis, quantity in zip(axes[:, names.index(problem)], PANELS, strict=True):
            by_step = rows.groupby("step")[quantity]
            mean, low, high = by_step.mean(), by_step.min(), by_step.max()
            axis.plot(mean.index, mean, color=colour, label=label, marker=".")
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)
    for row, (quantity, label) in zip(axes, PANELS.items(), strict=True):
        row[0].set_ylabel(label)
        row[0].set_xscale("symlog", linthresh=3)
        row[0].set_xlim(0, max(1, table["step"].max()))
        ticks = [0, *(10**k for k in range(1, 9) if 10**k <= table["step"].max())]
        row[0].set_xticks(ticks, [number(tick) for tick in ticks])
        if quantity == "mean_square_of_own":
            style.log_axis(row[0], "y")
    ends = table[table["step"] == table["step"].max()].groupby("problem")["accuracy"].mean()
    for axis, problem in zip(axes[0], names, strict=True):
        axis.set_title(f"{problem}\n(accuracy at the end: {ends[problem]:.3f})")
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    handles, words = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, words, fontsize=9, ncols=4, loc="outside lower center", title="labels")
    n = table["seed"].nunique()
    note = f"digits; mean of n = {n} seeds, band: their range"
    style.title(figure, "The definitions of Fisher information, under four kinds of labels", note)
    return figure

"""The three definitions of Fisher information, measured while networks train.

The score is d log p(y | x) / d theta. Under the model's own labels its mean is zero, its variance
is its mean square, and both are minus the expected second derivative of log p. Under predicted,
sampled or true labels they differ; how much, and when, is what the table says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pandera.pandas as pa
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.utils import parameters_to_vector

from ewc_plugin.fisher.diagonal import diagonal_fisher
from experiments.data.sources import find_data, load_images
from experiments.reporting.figures.style import DPI
from experiments.results import tables
from experiments.results.environment import write_environment

LABELS = {
    "own": ("the model's own (exact)", "#000000"),
    "sampled": ("one drawn per sample", "#0072B2"),
    "predicted": ("predicted", "#009E73"),
    "empirical": ("true (empirical)", "#D55E00"),
}
FISHER_TYPE = {"own": "exact", "predicted": "predicted", "empirical": "empirical"}

_SHARE = pa.Check.in_range(0, 1 + 1e-9)
IDENTITIES = pa.DataFrameSchema(
    {
        "problem": pa.Column(str),
        "seed": pa.Column(int),
        "step": pa.Column(int, pa.Check.ge(0)),
        "labels": pa.Column(str, pa.Check.isin(list(LABELS))),
        "accuracy": pa.Column(float, pa.Check.in_range(0, 1), coerce=True),
        "loss": pa.Column(float, coerce=True),
        "mean_square": pa.Column(float, pa.Check.ge(0), coerce=True),
        "variance": pa.Column(float, coerce=True),
        "curvature": pa.Column(float, coerce=True),
        "squared_mean_share": pa.Column(float, _SHARE, coerce=True),
        "variance_difference": pa.Column(float, pa.Check.ge(0), coerce=True),
        "curvature_difference": pa.Column(float, pa.Check.ge(0), coerce=True),
        "mean_square_of_own": pa.Column(float, pa.Check.ge(0), coerce=True),
        "curvature_of_own": pa.Column(float, coerce=True),
        "cosine_with_own": pa.Column(float, _SHARE, coerce=True),
        "package_difference": pa.Column(float, pa.Check.ge(0), nullable=True, coerce=True),
    },
    unique=["problem", "seed", "step", "labels"],
    strict=True,
    name="identities.csv",
)


@dataclass(frozen=True)
class Identities:
    """Mean, variance, mean square and curvature of the score, label by label, while training."""

    steps: tuple[int, ...] = (0, 3, 10, 30, 100, 300, 1000, 3000)
    """Training steps after which everything is measured."""
    samples: int = 500
    """Training images, scikit-learn's digits."""
    hidden_size: int = 8
    """Units of the network's only hidden layer."""
    batch_size: int = 64
    """Samples per training mini-batch."""
    learning_rate: float = 1e-2
    """Step size of Adam."""
    seeds: tuple[int, ...] = (0, 1, 2)
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
    """Of the score, per parameter, averaged over the samples and their labels; each [P].

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
    """Trains logistic regression, softmax regression and a small network; measures on the way.

    Args:
        settings: Of the study.

    Returns:
        A row per problem, seed, step and labels; also in `identities.csv`.
    """
    console = Console()
    torch.set_num_threads(1)
    source = find_data("digits", None)
    train, _ = load_images(source)
    x, y = train.images().flatten(1)[: settings.samples].double(), train.targets[: settings.samples]
    rows: list[dict[str, Any]] = []
    for name, (make, labels) in problems(settings).items():
        for seed in settings.seeds:
            console.print(f"{name}, seed {seed} ...")
            torch.manual_seed(seed)
            model = make().double()
            found = measure_while_training(model, x, labels(y), settings, seed)
            rows += ({"problem": name, "seed": seed, **row} for row in found)
    table = tables.frame(rows, IDENTITIES)
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(table, folder, IDENTITIES)
    plot(table).savefig(folder / "identities.png", dpi=DPI, metadata={"Software": None})
    write_environment(folder, source)
    shown = ["accuracy", "squared_mean_share", "mean_square_of_own", "curvature_of_own"]
    by = table.groupby(["problem", "step", "labels"], sort=False)[shown].mean()
    console.print(by.to_string(float_format="%.3g"), highlight=False, soft_wrap=True)
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
    """Of what `diagonal_fisher` gives; NaN for labels that it would draw itself."""
    if labels not in FISHER_TYPE:
        return float("nan")
    fisher = diagonal_fisher(model, [(x, y)], FISHER_TYPE[labels])
    return largest_difference(torch.cat([f.flatten() for f in fisher.values()]), mean_square)


PANELS = {
    "mean_square_of_own": ("mean square of the score,\nof the Fisher information", "log"),
    "curvature_of_own": ("minus second derivative,\nof the Fisher information", "linear"),
    "squared_mean_share": ("part of the mean square\nthat is the squared mean", "linear"),
}


def plot(table: pd.DataFrame) -> plt.Figure:
    """A column per problem, a row per quantity, over the steps of training."""
    names = list(dict.fromkeys(table["problem"]))
    figure, axes = plt.subplots(
        len(PANELS),
        len(names),
        figsize=(3.6 * len(names), 8),
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for (problem, labels), rows in table.groupby(["problem", "labels"], sort=False):
        label, colour = LABELS[labels]
        for axis, (quantity, (name, scale)) in zip(
            axes[:, names.index(problem)], PANELS.items(), strict=True
        ):
            by_step = rows.groupby("step")[quantity]
            mean, low, high = by_step.mean(), by_step.min(), by_step.max()
            axis.plot(mean.index, mean, color=colour, label=label, marker=".", linewidth=1.3)
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.set_xscale("symlog", linthresh=3)
            axis.set_yscale(scale)
            axis.set_ylabel(name if problem == names[0] else "")
            axis.grid(alpha=0.3)
    ends = table[table["step"] == table["step"].max()].groupby("problem")["accuracy"].mean()
    for axis, problem in zip(axes[0], names, strict=True):
        axis.set_title(f"{problem}\n(accuracy at the end: {ends[problem]:.3f})", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    axes[0, 0].legend(fontsize=8, title="labels", title_fontsize=8, loc="lower left")
    seeds = table["seed"].nunique()
    figure.suptitle(f"Digits, seeds: {seeds}; line: mean, band: range", fontsize=10)
    return figure

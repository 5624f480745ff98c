"""What makes an importance good: its labels, what is squared, or its scale? A factorial experiment.

Every combination of the gradients of the cross entropy or of that of the reversed logits, squares
of samples, of class means or of mini-batches, F as it is or divided by its mean, and, where tasks
bring new classes, the loss over all classes or the current ones. All gradients are at the data's
labels. Each arm has a lambda of its own, chosen on validation images with other seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pandera.pandas as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from experiments.reporting.figures import style
from experiments.reporting.labels import stream_title
from experiments.reporting.study_output import columns
from experiments.results.provenance import provenance_of
from experiments.results.schemas import PROVENANCE
from experiments.results.statistics import differs, interval
from experiments.settings.run import STREAM
from experiments.settings.values import Seed
from experiments.studies.completed import completed_study
from experiments.studies.tuned_first import TunedFirst, search_lambdas

IMPORTANCE_BATCH = 128
# Fisher type -> whether its logits are reversed, and what is squared.
TYPES = {
    "empirical": ("no", "samples"),
    "class_mean_empirical": ("no", "class means"),
    "batched": ("no", "mini-batches"),
    "reversed": ("yes", "samples"),
    "class_mean_reversed": ("yes", "class means"),
    "batched_reversed": ("yes", "mini-batches"),
}
FACTORS = {  # the first level of each is what the others are compared with
    "reversed": ("no", "yes"),
    "squared": ("samples", "class means", "mini-batches"),
    "normalize": ("none", "mean"),
}
LOSS = ("all", "current")
WORDS = {
    ("reversed", "yes"): "reversed logits less logits",
    ("squared", "class means"): "class means less samples",
    ("squared", "mini-batches"): f"mini-batches of {IMPORTANCE_BATCH} less samples",
    ("normalize", "mean"): "F by its mean less F as it is",
    ("loss_classes", "current"): "current classes in the loss less all",
}
ALL = "all"  # a stratum, or a condition, that is averaged over
_KEY = [*STREAM, "loss_classes", "factor", "level", "given_factor", "given_level"]
EFFECTS = pa.DataFrameSchema(
    {
        **columns(str, *_KEY[:6], "reference", *_KEY[6:], "metric", "unit"),
        "validation": pa.Column(bool),
        "n": pa.Column(int, pa.Check.ge(1)),
        **columns(float, "mean", "reference_mean", "difference"),
        **{name: pa.Column(float, nullable=True) for name in ("ci_low", "ci_high")},
        **columns(str, "differs"),
        **PROVENANCE,
    },
    unique=_KEY,
    strict=True,
    name="effects.csv",
)


@dataclass(frozen=True)
class Factorial(TunedFirst):
    """Compare importances by what they are made of, with a lambda searched for each."""

    tuning_seeds: tuple[Seed, ...] = (100, 101)
    """Lambda is chosen with them, on validation images; none of them is reported."""

    name = "factorial"

    @property
    def grids(self) -> list[dict[str, Any]]:
        """Class- and domain-incremental split MNIST, and permuted MNIST."""
        every: dict[str, Any] = {
            "methods": ("ewc",),
            "fisher_type": tuple(TYPES),
            "normalize": FACTORS["normalize"],
            "mode": ("online",),
            "decay_factor": (1.0,),
            "importance_batch": (IMPORTANCE_BATCH,),
            "importance_order": ("shuffled",),
        }
        split = {
            "benchmark": ("split",),
            "epochs": (1,),
            "batch_size": (128,),
            "optimizer_state": ("reset",),
        }
        by_class = {"scenario": ("class",), "head": ("cosine",), "hidden_size": (1000,)}
        two_layers = {"hidden_size": (400,), "hidden_layers": (2,)}
        return [
            {**every, **split, **by_class, "learning_rate": (3e-4,), "loss": LOSS},
            {**every, **split, **two_layers, "scenario": ("domain",), "learning_rate": (1e-3,)},
            {**every, "benchmark": ("permuted",)},
        ]


def run(settings: Factorial) -> pd.DataFrame:
    """Make what is missing; write the run tables, `effects.csv` and `effects.png`."""
    search_lambdas(settings, Console(quiet=settings.quiet))
    runs, output = completed_study(settings)
    table = output.table(effects(runs), EFFECTS)
    output.figure(draw_effects(table), "effects")
    shown = table[table["given_factor"] == ALL]
    output.show(shown[[*_KEY[2:6], "difference", "ci_low", "ci_high"]], "%+.4f", index=False)
    return table


def effects(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Main effects on average accuracy, and those at each level of another factor.

    An effect is, seed by seed, the mean accuracy of the cells at a level less that of the cells at
    the reference, which are equal in all other factors. A seed without a run of one of these cells
    does not count.

    Args:
        runs: Rows of `runs.csv`, of whole factorials.

    Yields:
        Rows of `effects.csv`: each with Student's 95 % interval over the seeds.
    """
    done = runs[(runs["status"] == "ok") & runs["fisher_type"].isin(TYPES)]
    parts = pd.DataFrame(
        [TYPES[kind] for kind in done["fisher_type"]], done.index, ["reversed", "squared"]
    )
    done = done.assign(**parts)
    for stream, of_stream in done.groupby(list(STREAM), sort=False):
        about = dict(zip(STREAM, stream, strict=True))
        losses = [loss for loss in LOSS if loss in set(of_stream["loss_classes"])]
        for loss in losses:
            rows = of_stream[of_stream["loss_classes"] == loss]
            for row in _contrasts(rows, FACTORS):
                yield {**about, "loss_classes": loss, **row}
        if len(losses) == 2:
            both = {"loss_classes": LOSS, **FACTORS}
            for row in _contrasts(of_stream, both, only="loss_classes"):
                yield {**about, "loss_classes": ALL + " and current", **row}


def _contrasts(
    runs: pd.DataFrame, factors: dict[str, Sequence[str]], only: str | None = None
) -> Iterator[dict[str, Any]]:
    """The effects of every factor, or of one, overall and at each level of every other."""
    for factor in [only] if only else list(factors):
        others = [(name, level) for name in factors if name != factor for level in factors[name]]
        reference = factors[factor][0]
        for given, level in itertools.product([None, *others], factors[factor][1:]):
            part = runs if given is None else runs[runs[given[0]] == given[1]]
            wide = part.pivot_table("average_accuracy", "seed", list(factors), sort=False)
            wide = wide.dropna().T
            at = wide.index.get_level_values(factor)
            if wide.empty or level not in at or reference not in at:
                continue  # no seed has all cells, or the factor was not varied
            mine, theirs = (wide[at == one].mean() for one in (level, reference))
            found = interval((mine - theirs).to_numpy(float))
            yield {
                "factor": factor,
                "level": level,
                "reference": reference,
                "given_factor": given[0] if given else ALL,
                "given_level": given[1] if given else ALL,
                "metric": "average_accuracy",
                "unit": "fraction",
                "validation": bool(part["validation"].any()),
                "n": found["n"],
                "mean": mine.mean(),
                "reference_mean": theirs.mean(),
                "difference": found["mean"],
                "ci_low": found["ci_low"],
                "ci_high": found["ci_high"],
                "differs": differs((mine - theirs).to_numpy(float)),
                **provenance_of(part),
            }


def draw_effects(table: pd.DataFrame) -> Figure:
    """Main effects with their intervals, a panel per stream and loss."""
    main = table[table["given_factor"] == ALL]
    strata = [part for _, part in main.groupby([*STREAM, "loss_classes"], sort=False)]
    strata = [part for part in strata if part["factor"].iloc[0] != "loss_classes"]
    figure, axes = plt.subplots(
        len(strata), 1, figsize=(7.6, 1.2 + 1.15 * len(strata)), squeeze=False, layout="constrained"
    )
    for axis, part in zip(axes[:, 0], strata, strict=True):
        _draw_stratum(axis, part)
    axes[-1, 0].set_xlabel("difference of average accuracy, percentage points")
    n = int(main["n"].min())
    note = f"mean and 95 % interval over n = {n} paired seeds; each panel has its own scale"
    style.title(figure, "What an importance is made of, and what each part is worth", note)
    return figure


def _draw_stratum(axis: Axes, part: pd.DataFrame) -> None:
    """A point and an interval per main effect."""
    rows = part.reset_index(drop=True)
    for y, row in rows.iterrows():
        colour = style.INK if row["differs"] == "yes" else style.PALETTE["grey"][0]
        axis.plot([100 * row["ci_low"], 100 * row["ci_high"]], [y, y], color=colour, lw=2)
        axis.plot(100 * row["difference"], y, "o", color=colour, markersize=5)
        number = f"{100 * row['difference']:+.2f}".replace("-", "−")
        axis.annotate(number, (1.01, y), xycoords=axis.get_yaxis_transform(), va="center", size=8)
    axis.axvline(0, color=style.INK, lw=0.8)
    axis.set_yticks(
        range(len(rows)), [WORDS[row.factor, row.level] for row in rows.itertuples()], fontsize=8
    )
    axis.set_ylim(len(rows) - 0.5, -0.5)
    first = rows.iloc[0]
    title = stream_title(first["benchmark"], first["dataset"], first["scenario"])
    if first["scenario"] == "class":
        title += f", loss over {first['loss_classes']} classes"
    axis.set_title(title, fontsize=9, loc="left")

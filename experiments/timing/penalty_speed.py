"""Cost of a penalty: the time of a training step, and memory, beside Avalanche's.

Every method trains the same network on the same batch inside Avalanche's own loop, in short turns,
so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from avalanche.logging import BaseLogger
from avalanche.models import SimpleCNN, SimpleMLP
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from avalanche.training.utils import ParamData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ewc_plugin import DiagonalEWCPlugin, QuadraticPenalty
from ewc_plugin.avalanche.placement import InLoss
from ewc_plugin.penalty.pairs import Blocks
from experiments.reporting.figures import style
from experiments.reporting.study_output import columns, study_output
from experiments.results import tables
from experiments.results.schemas import PROVENANCE
from experiments.settings.run import Optimizer
from experiments.settings.values import Count, Positive, Processes
from experiments.training.methods import state_bytes
from experiments.training.run import OPTIMIZERS

MIB = 2**20
KEY = ["model", "optimizer", "batch_size", "past_experiences"]
LAMBDA = 1e-3
ONE_KERNEL = "one compiled kernel"
KERNEL_WITH_VALUE = "one compiled kernel, with the value"
CALLS_ALONE = "the plugin's calls alone"
COMPILERS = ("c++", "g++", "clang++")  # torch.compile needs one of them on the CPU
_POSITIVE = pa.Check.gt(0)
PENALTY_SPEED = pa.DataFrameSchema(
    {
        **columns(str, "model"),
        **columns(int, "parameters", check=_POSITIVE),
        **columns(str, "optimizer"),
        **columns(int, "batch_size", "threads", check=_POSITIVE),
        **columns(str, "method"),
        **columns(int, "past_experiences", check=_POSITIVE),
        **columns(float, "step_ms", "ratio", "ratio_q25", "ratio_q75", check=_POSITIVE),
        # Empty without a compiler; older tables have none.
        **columns(
            *(float, "of_kernel", "of_kernel_q25", "of_kernel_q75"), nullable=True, required=False
        ),
        **columns(float, "state_mib", check=pa.Check.ge(0)),
        **columns(int, "rounds", check=_POSITIVE),
        **PROVENANCE,
    },
    unique=[*KEY, "method", "threads"],
    strict=True,
    name="penalty_speed.csv",
)


@dataclass(frozen=True)
class PenaltySpeed:
    """Step time and memory of the penalty over the number of past experiences."""

    past_experiences: tuple[Count, ...] = (1, 10, 100)
    """Numbers of experiences that the penalty remembers."""
    models: tuple[Literal["mlp-512", "mlp-2x256", "mlp-2x2000", "cnn"], ...] = (
        "mlp-512",
        "mlp-2x256",
        "mlp-2x2000",
        "cnn",
    )
    """Networks: 784-512-10, 784-256-256-10, 784-2000-2000-10, Avalanche's SimpleCNN."""
    optimizers: tuple[Optimizer, ...] = ("sgd", "adam")
    """The plain step is cheapest with sgd, so that the penalty's share is largest there."""
    batch_sizes: tuple[Count, ...] = (64, 128)
    """Samples per step: the penalty costs the same whatever they are, the plain step does not."""
    rounds: Count = 20
    """Rounds, in each of which every method has its turn."""
    steps: Count = 5
    """Steps in a turn, after one that is not counted."""
    threads: Processes = 1
    """Threads of torch; the CPU time of all of them is what is measured."""
    avalanche_limit_mib: Positive = 1024
    """Leave Avalanche's plugin out where it would keep more than this."""
    out: str = "runs/penalty-speed"
    """Folder of the table and the plot."""


class _InTheLoss(DiagonalEWCPlugin):
    """Our plugin with the penalty in the loss, as where other plugins see gradients first."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._placement = InLoss(self.penalty)


class _OneKernel(SupervisedPlugin):
    """The arithmetic as a compiler fuses it: the least that can be done.

    Tensors are prepared once, so that a step pays for one compiled call and nothing else.

    Args:
        with_value: Whether to compute the penalty too and add it to the loss, as our plugin does.
    """

    def __init__(self, *, with_value: bool = False) -> None:
        super().__init__()
        self.penalty = QuadraticPenalty()
        self._with_value = with_value
        self._kernel = torch.compile(_add_gradients, dynamic=False)
        self._prepared: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add 2 lambda (S (theta - a) + B) to each gradient."""
        if not self._prepared:
            self._prepared = [
                (p, q.fisher, None if q.offset is None else q.fisher * q.offset, q.anchor)
                for p, q in self.penalty.pairs(strategy.model)
            ]
        thetas, fishers, offsets, anchors = zip(*self._prepared, strict=True)
        tensors = (thetas, [p.grad for p in thetas], fishers, offsets, anchors)
        with torch.no_grad():
            penalty = self._kernel(*tensors, LAMBDA, with_value=self._with_value)
        if penalty is not None:
            strategy.loss = strategy.loss.detach() + penalty


class _CallsAlone(SupervisedPlugin):
    """What our plugin asks of PyTorch, with views made beforehand: the least without a compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.penalty = QuadraticPenalty()
        self._prepared: list[tuple[Blocks, list[Any]]] = []

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add 2 lambda S e to each gradient, and the penalty to the loss."""
        if not self._prepared:
            scratch: dict[torch.dtype, Tensor] = {}
            for theta, q in self.penalty.pairs(strategy.model):
                blocks = Blocks(theta, q, scratch)
                made = list(zip(blocks.split(theta), blocks.kept, strict=True))
                self._prepared.append((blocks, made))
        values = []
        with torch.no_grad():
            for blocks, views in self._prepared:
                grads = blocks.split(blocks.theta.grad)
                for (x, (anchor, S, offset, e)), grad in zip(views, grads, strict=True):
                    torch.sub(x, anchor, out=e)
                    if offset is not None:
                        e.add_(offset)
                    grad.addcmul_(S, e, value=2 * LAMBDA)
                    values.append(e.square_().mul_(S).sum())
            strategy.loss = strategy.loss.detach() + LAMBDA * torch.stack(values).sum()


def _add_gradients(
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor],
    fishers: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    anchors: Sequence[Tensor],
    scale: float,
    *,
    with_value: bool,
) -> Tensor | None:
    """Change the gradients; return scale * d (S d + 2 B), d = theta - a, if it is wanted."""
    values = []
    for theta, grad, S, B, anchor in zip(thetas, grads, fishers, offsets, anchors, strict=True):
        d = theta - anchor
        half = S * d if B is None else S * d + B
        grad.add_(half, alpha=2 * scale)
        if with_value:
            values.append((d * (half if B is None else half + B)).sum())
    return scale * torch.stack(values).sum() if with_value else None


METHODS: dict[str, Callable[[], Any]] = {
    "in the gradient": lambda: DiagonalEWCPlugin(LAMBDA),
    "in the loss": lambda: _InTheLoss(LAMBDA),
    "implicit step": lambda: DiagonalEWCPlugin(LAMBDA, implicit=True),
    ONE_KERNEL: _OneKernel,
    KERNEL_WITH_VALUE: lambda: _OneKernel(with_value=True),
    CALLS_ALONE: _CallsAlone,
    "Avalanche": lambda: EWCPlugin(LAMBDA),
}


def run(settings: PenaltySpeed) -> pd.DataFrame:
    """Measure what `penalty_speed.csv` does not hold yet; draw `penalty_speed.png`."""
    torch.set_num_threads(settings.threads)
    output = study_output(settings)
    table = tables.read(output.folder, PENALTY_SPEED)
    held = set(table[KEY].itertuples(index=False, name=None))
    for cell in product(
        settings.models, settings.optimizers, settings.batch_sizes, settings.past_experiences
    ):
        if cell in held:
            continue
        new = pd.DataFrame(measure(settings, *cell))
        output.show(new, "%.4g", index=False)
        table = pd.concat([table, new], ignore_index=True) if len(table) else new
        table = table.sort_values(KEY, kind="stable", ignore_index=True)
        table = output.table(table, PENALTY_SPEED)
    output.figure(draw_steps(table), "penalty_speed")
    return table


def measure(
    settings: PenaltySpeed, name: str, optimizer: str, batch_size: int, T: int
) -> list[dict[str, Any]]:
    """Measure steps of every method in turn.

    Args:
        settings: Rounds, steps and limits.
        name: Of the network.
        optimizer: "sgd" or "adam".
        batch_size: Samples per step.
        T: Number of past experiences.

    Returns:
        A row per method. `ratio` is its step beside a plain step, `of_kernel` beside a step whose
        gradients one compiled kernel changes, both of neighbours in time.
    """
    model, x = model_and_batch(name, batch_size)
    batch = [x, torch.randint(0, 10, (len(x),))]
    parameters = sum(p.numel() for p in model.parameters())
    make = OPTIMIZERS[optimizer]
    plain = make_strategy(deepcopy(model), make, None, T)
    past = remember(DiagonalEWCPlugin(LAMBDA), model, T).penalty.state_dict()
    strategies = {
        method: make_strategy(deepcopy(model), make, with_past(plugin(), past, model, T), T)
        for method, plugin in METHODS.items()
        if (method != "Avalanche" or parameters * 8 * T / MIB <= settings.avalanche_limit_mib)
        and ("kernel" not in method or any(map(shutil.which, COMPILERS)))
    }
    kernel = strategies.get(ONE_KERNEL)
    times: dict[str, list[float]] = {method: [] for method in strategies}
    plain_times, kernel_times = deepcopy(times), deepcopy(times)
    for turn in range(settings.rounds + 1):
        for method, strategy in strategies.items():
            plain_before = step_seconds(plain, batch, settings.steps)
            kernel_before = step_seconds(kernel, batch, settings.steps) if kernel else np.nan
            seconds = step_seconds(strategy, batch, settings.steps)
            kernel_after = step_seconds(kernel, batch, settings.steps) if kernel else np.nan
            plain_after = step_seconds(plain, batch, settings.steps)
            if turn:  # the first warms up
                times[method].append(seconds)
                plain_times[method].append((plain_before + plain_after) / 2)
                kernel_times[method].append((kernel_before + kernel_after) / 2)
    return [
        {
            "model": name,
            "parameters": parameters,
            "optimizer": optimizer,
            "batch_size": batch_size,
            "threads": settings.threads,
            "method": method,
            "past_experiences": T,
            "step_ms": 1e3 * float(np.median(times[method])),
            **_quartiles("ratio", times[method], plain_times[method]),
            **_quartiles("of_kernel", times[method], kernel_times[method]),
            "state_mib": _state_bytes(strategy.plugins[0]) / MIB,
            "rounds": settings.rounds,
        }
        for method, strategy in strategies.items()
    ]


def _quartiles(column: str, times: list[float], others: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratio of neighbours in time."""
    low, middle, high = np.quantile(np.divide(times, others), (0.25, 0.5, 0.75))
    return {column: middle, f"{column}_q25": low, f"{column}_q75": high}


def _state_bytes(plugin: Any) -> int:
    return plugin.penalty.nbytes if hasattr(plugin, "penalty") else state_bytes(plugin)


def model_and_batch(name: str, batch_size: int) -> tuple[nn.Module, Tensor]:
    """A network and a batch for it."""
    if name == "cnn":
        return SimpleCNN(), torch.randn(batch_size, 3, 32, 32)
    layers, hidden = {"mlp-512": (1, 512), "mlp-2x256": (2, 256), "mlp-2x2000": (2, 2000)}[name]
    model: Any = SimpleMLP(hidden_size=hidden, hidden_layers=layers)
    return model, torch.randn(batch_size, 1, 28, 28)


def make_strategy(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer], plugin: Any, T: int
) -> Any:
    """Avalanche's Naive, ready for steps in the middle of an experience."""
    strategy = Naive(
        model=model,
        optimizer=make(model.parameters(), lr=1e-5),
        criterion=nn.CrossEntropyLoss(),
        plugins=[] if plugin is None else [plugin],
        evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
    )
    strategy.experience = SimpleNamespace(logging=lambda: None, dataset=[])  # without task labels
    if plugin is not None:
        plugin.before_training_exp(strategy)
    strategy.clock.train_exp_counter = T
    return strategy


def remember(plugin: Any, model: nn.Module, T: int) -> Any:
    """Give a plugin T past experiences with a random Fisher, at parameters that lie apart."""
    generator = torch.Generator().manual_seed(0)
    moved = deepcopy(model)
    for t in range(T):
        fisher = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(1e-3 * torch.randn(p.shape, generator=generator))
        if hasattr(plugin, "penalty"):
            plugin.penalty.consolidate(moved, fisher)
            continue
        plugin.importances[t] = {n: _data(n, f) for n, f in fisher.items()}
        plugin.saved_params[t] = {n: _data(n, p.detach()) for n, p in moved.named_parameters()}
    return plugin


def with_past(plugin: Any, past: dict[str, Any], model: nn.Module, T: int) -> Any:
    """Like `remember`, but loads our plugin's penalty from the saved state `past`."""
    if not hasattr(plugin, "penalty"):
        return remember(plugin, model, T)
    plugin.penalty.load_state_dict(past)
    return plugin


def _data(name: str, tensor: Tensor) -> ParamData:
    return ParamData(name, tensor.shape, init_tensor=tensor.clone())


def step_seconds(strategy: Any, batch: list[Tensor], steps: int) -> float:
    """CPU time of a training iteration in Avalanche's loop, all hooks included.

    Not wall time: what another process takes from this one does not count. The first step is not
    counted either: it brings what the others left to their turn back into the cache.
    """
    strategy.dataloader = [list(batch)]
    strategy.training_epoch()
    strategy.dataloader = [list(batch) for _ in range(steps)]
    start = time.process_time()
    strategy.training_epoch()
    return (time.process_time() - start) / steps


def draw_steps(table: pd.DataFrame) -> Figure:
    """The multiple of a plain step over the number of past experiences, a panel per setting."""
    cells = list(table.groupby(["model", "optimizer", "batch_size"], sort=False))
    columns = min(3, len(cells))
    n_rows = -(-len(cells) // columns)
    figure, axes = plt.subplots(
        *(n_rows, columns),
        figsize=(4.4 * columns, 3.0 * n_rows + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(cells) :]:
        axis.remove()
    for i, (axis, ((model, optimizer, size), rows)) in enumerate(
        zip(axes.flat, cells, strict=False)
    ):
        _draw_setting(axis, rows)
        axis.set_title(f"{model}, {optimizer}, mini-batch {size}")
        axis.set_xlabel("past experiences")
        if i % columns == 0:
            axis.set_ylabel("multiple of a step without penalty")
    counts = " or ".join(str(n) for n in sorted(table["rounds"].unique()))
    note = f"median of {counts} rounds, bar: quartiles; dotted: a tenth more than without"
    style.title(figure, "Time of a training step with a penalty", note)
    return figure


def _draw_setting(axis: Axes, rows: pd.DataFrame) -> None:
    methods = list(dict.fromkeys(rows["method"]))
    ends = []
    for i, method in enumerate(methods):
        line = rows[rows["method"] == method].sort_values("past_experiences")
        x = line["past_experiences"] * 1.06 ** (i - (len(methods) - 1) / 2)
        colour = style.PENALTY_COLOURS[method]
        axis.plot(x, line["ratio"], "-o", color=colour, markersize=4)
        axis.vlines(x, line["ratio_q25"], line["ratio_q75"], color=colour, lw=2.5, alpha=0.4)
        ends.append(style.EndLabel(method, float(line["ratio"].iloc[-1]), colour))
    axis.axhline(1.1, color=style.INK, lw=0.8, ls=":")
    style.log_axis(axis, "x", rows["past_experiences"])
    axis.set_xlim(0.75 * rows["past_experiences"].min(), 1.35 * rows["past_experiences"].max())
    axis.set_ylim(0.95 * min(rows["ratio"].min(), 1.0), 1.1 * max(rows["ratio"].max(), 1.1))
    style.plain_log_y(axis)
    style.label_ends(axis, ends)

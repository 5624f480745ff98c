"""One run: settings in, rows out. Nothing else is read or written, except for checkpoints."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import JointTraining, Naive
from torch import nn

from ewc_plugin import DivergedError
from ewc_plugin.avalanche.metrics import ewc_metrics
from experiments.data.sources import DataSource
from experiments.data.streams import Stream, shared_stream
from experiments.data.tensor_path import FastData
from experiments.results.metrics import Matrix, accuracy_matrix, continual_metrics
from experiments.results.record import NO_SECONDS, RunResult, run_record
from experiments.settings.run import WITH_FISHER, RunSettings
from experiments.training.checkpoint import (
    can_be_stored,
    read_checkpoint,
    restore,
    write_checkpoint,
)
from experiments.training.loggers import Logs
from experiments.training.methods import (
    MethodPlugins,
    criterion_of,
    method_plugins,
    own_method,
    state_bytes,
)
from experiments.training.networks import make_model

EVAL_BATCH = 1000
UNTRAINED = -1  # `train_exp` of the model before any training
EVAL_METRIC = re.compile(r"(Top1_Acc|Loss)_Exp/eval_phase/test_stream/.*Exp(\d+)$")
MIB = 2**20

Observer = Callable[[int, float], None]  # (experiences done, mean accuracy on those)


def run(
    settings: RunSettings,
    source: DataSource,
    observe: Observer = lambda done, accuracy: None,
    checkpoint: Path | None = None,
    *,
    logs: Logs | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Train and evaluate through Avalanche; whatever goes wrong becomes the record's reason.

    Args:
        settings: What to run.
        source: Where the images are.
        observe: Called after each experience, for a progress display.
        checkpoint: File for the state after each experience but the last; a run that finds its own
            goes on from there, to the same bits.
        logs: Further loggers.
        say: Called with a line about a checkpoint that can't be used.

    Returns:
        The rows; those that were complete if the run diverged or failed.
    """
    current = Run(settings, source)
    status, reason = "ok", ""
    try:
        with logs.open(settings) if logs else nullcontext([]) as current.loggers:  # type: ignore[attr-defined]
            current.run(observe, checkpoint, say)
    except DivergedError as error:
        status, reason = "diverged", str(error)
    except Exception as error:  # a failed run is a row, so that a sweep goes on
        status, reason = "failed", f"{type(error).__name__}: {error}"
    return RunResult.sealed(current.record(status, reason), current.rows)


class Run:
    """The state of one run in progress; `model` is the network being trained."""

    def __init__(self, settings: RunSettings, source: DataSource) -> None:
        self.settings = settings
        self.source = source
        self.rows: list[dict[str, Any]] = []
        self.seconds = dict(NO_SECONDS)
        self.peak_rss = 0
        self.method = MethodPlugins()
        self.loggers: list[Any] = []
        self.model: nn.Module = nn.Identity()

    def run(
        self,
        observe: Observer,
        checkpoint: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Train on each experience in turn, and evaluate before and after each."""
        settings = self.settings
        stream = shared_stream(settings, self.source)
        RNGManager.set_random_seeds(settings.seed)
        strategy, watch = self._strategy(stream)
        experiences = stream.train_stream  # which may make them on access
        joint = settings.method == "joint"
        if checkpoint and not can_be_stored(self.method):
            say(f"{settings.run_id}: no checkpoint holds its method; stopped, it starts anew.")
            checkpoint = None
        state = checkpoint and read_checkpoint(checkpoint, settings, self.source, say)
        if state:
            self._go_on(restore(state, strategy, experiences))
        else:
            if joint:  # `JointTraining` gets its heads when it trains; we evaluate before that
                for experience in experiences:
                    avalanche_model_adaptation(self.model, experience)
            self._evaluate(strategy, stream, UNTRAINED)
        last = settings.n_experiences - 1
        for i in range(self._trained_through() + 1, 1 if joint else last + 1):
            for part in [experiences] if joint else stream.parts(i):
                self._train(strategy, watch, part)
            trained = last if joint else i
            accuracy = self._evaluate(strategy, stream, trained)
            if checkpoint and trained < last:
                write_checkpoint(checkpoint, settings, self.source, strategy, self._progress(), say)
            observe(trained + 1, float(np.mean([a for j, a in accuracy.items() if j <= trained])))

    def _progress(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds, "peak_rss": self.peak_rss}

    def _go_on(self, progress: dict[str, Any]) -> None:
        self.rows, self.seconds, self.peak_rss = (
            progress[name] for name in ("rows", "seconds", "peak_rss")
        )

    def _trained_through(self) -> int:
        """The last experience that was trained and evaluated on."""
        return max(int(row["train_exp"]) for row in self.rows)

    def record(self, status: str, reason: str) -> dict[str, Any]:
        """The row of `runs.csv`; metrics are NaN unless the run is complete."""
        return run_record(
            self.settings,
            status,
            reason,
            metrics=continual_metrics(self._matrix()) if status == "ok" else None,
            seconds=self.seconds,
            peak_rss_mb=self.peak_rss / MIB,
            penalty_state_mb=sum(map(state_bytes, self.method.every)) / MIB,
        )

    def _strategy(self, stream: Stream) -> tuple[Any, _Watch]:
        settings = self.settings
        self.model = model = make_model(settings, stream, self.source.files)
        optimizer = OPTIMIZERS[settings.optimizer](model.parameters(), lr=settings.learning_rate)
        fast = FastData(stream) if settings.data_path == "fast" else None
        self.method = (
            own_method(settings, stream, self.source.files)
            if settings.method_sha256
            else method_plugins(settings)
        )
        watch = _Watch(settings.iterations)
        template = JointTraining if settings.method == "joint" else Naive
        strategy = template(
            model=model,
            optimizer=optimizer,
            criterion=self.method.criterion or criterion_of(settings),
            train_mb_size=settings.batch_size,
            # With a number of iterations, more epochs than they can fill: the last one is stopped.
            train_epochs=settings.epochs
            if settings.iterations is None
            else settings.iterations + 1,
            eval_mb_size=EVAL_BATCH,
            device=settings.device,
            plugins=[*self.method.early, *([fast] if fast else []), *self.method.late, watch],
            evaluator=self._evaluator(),
        )
        return strategy, watch

    def _evaluator(self) -> EvaluationPlugin:
        """Return the metrics that the result rows need, and more if there are loggers."""
        watched = bool(self.loggers)
        metrics = [m(epoch=watched, experience=True) for m in (accuracy_metrics, loss_metrics)]
        if watched and self.settings.method in WITH_FISHER:
            metrics.append(ewc_metrics())
        return EvaluationPlugin(*metrics, loggers=self.loggers)

    def _train(self, strategy: Any, watch: _Watch, experience: Any) -> None:
        start = time.perf_counter()
        reset = self.settings.optimizer_state == "reset"
        strategy.train(experience, eval_streams=[], reset_optimizer_state=reset)
        end = time.perf_counter()
        self.seconds["train_s"] += watch.epochs_end - start
        self.seconds["fisher_s"] += end - watch.epochs_end
        if not all(torch.isfinite(p).all() for p in strategy.model.parameters()):
            raise DivergedError("a weight is not finite after training on an experience")
        self.peak_rss = max(self.peak_rss, psutil.Process().memory_info().rss)

    def _evaluate(self, strategy: Any, stream: Stream, train_exp: int) -> dict[int, float]:
        """Add the rows of an evaluation; return the accuracies by experience."""
        start = time.perf_counter()
        wanted = self.settings.evaluated_after(train_exp)
        tested = stream.test_stream
        if n_left_out := self.settings.n_experiences - len(wanted):
            tested = tested[wanted.start : wanted.stop]
        results = strategy.eval(tested)
        for _ in range(n_left_out):  # as the loaders do, so that training draws what it always does
            torch.empty((), dtype=torch.int64).random_()
        self.seconds["eval_s"] += time.perf_counter() - start
        found: dict[str, dict[int, float]] = {"Top1_Acc": {}, "Loss": {}}
        for key, value in results.items():
            if match := EVAL_METRIC.match(key):
                found[match[1]][int(match[2])] = float(value)
        settings = self.settings
        for experience in tested:
            j = experience.current_experience
            self.rows.append({
                "run_id": settings.run_id,
                "benchmark": settings.benchmark,
                "dataset": settings.dataset,
                "scenario": settings.scenario,
                "method": settings.method,
                "fisher_type": settings.fisher_type,
                "ewc_lambda": settings.ewc_lambda,
                "seed": settings.seed,
                "train_exp": train_exp,
                "eval_exp": j,
                "accuracy": found["Top1_Acc"][j],
                "loss": found["Loss"][j],
                "n_samples": len(experience.dataset),
            })
        return {j: found["Top1_Acc"][j] for j in wanted}

    def _matrix(self) -> Matrix:
        columns = ("train_exp", "eval_exp", "accuracy")
        return accuracy_matrix(*([row[name] for row in self.rows] for name in columns))


class _Watch(SupervisedPlugin):
    """Notes when the last epoch ended; stops a run that diverged or has all its iterations."""

    def __init__(self, iterations: int | None) -> None:
        super().__init__()
        self.iterations = iterations
        self.epochs_end = 0.0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        clock = strategy.clock
        if not torch.isfinite(strategy.loss).all():
            raise DivergedError(
                f"the loss is {strategy.loss.item()} in experience {clock.train_exp_counter}, "
                f"iteration {clock.train_exp_iterations}"
            )
        if clock.train_exp_iterations + 1 == self.iterations:  # the clock counts this one later
            strategy.stop_training()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.epochs_end = time.perf_counter()


OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

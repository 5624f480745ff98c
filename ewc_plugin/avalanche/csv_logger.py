"""A logger that appends the accuracies of an Avalanche strategy to a CSV file in long format."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import phase_and_task
from avalanche.logging import BaseLogger
from avalanche.training.plugins.clock import Clock
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.templates.base_sgd import PeriodicEval

from ewc_plugin.fisher.scores import type_name

COLUMNS = (
    *("run_id", "benchmark", "dataset", "scenario", "method", "fisher_type", "ewc_lambda", "seed"),
    *("train_exp", "eval_exp", "accuracy", "loss", "n_samples", "stream", "task"),
)
UNTRAINED = -1
# Strings that pandas reads as missing values; they are not allowed as names.
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
_KEY = ("run_id", "stream", "train_exp", "eval_exp")  # no two rows of a file agree in all of them

_OF_EVERY_STRATEGY = (EvaluationPlugin, PeriodicEval, Clock)

Row = dict[str, str]


class TidyCSVLogger(BaseLogger):
    """Appends one row per evaluated experience to a CSV file: the accuracy matrix R in long format.

    The columns are those of `accuracy.csv` in our experiments, then `stream` ("test") and `task`
    (empty where an experience has no task label, or several). `fisher_type` and `ewc_lambda` are
    those of the strategy's EWC plugin, ours or Avalanche's; empty without one. Numbers have full
    precision. The experience trained through, `train_exp`, is -1 before any
    training. What is evaluated in the middle of an experience's training is not written, since it
    belongs to no row of R: call `eval` after `train`.

    The rows that a file has stay, those of other runs too; one that is measured again takes the
    place of the first. So a run that was killed goes on in the same file, whether the logger comes
    out of a checkpoint or is made anew. One process at a time may write to a file.

    Args:
        path: The file; made, with its folder, by the first row.
        run_id: Names the run. One that is repeated under the same name replaces its own rows.
        seed: Of the run.
        benchmark: Names the stream's kind, such as "permuted".
        dataset: Names the data, such as "mnist".
        scenario: Whether task labels are given: "task", "domain" or "class".
        method: Names the method, such as "naive" and "ewc" for two arms of a comparison. Default:
            the strategy's class and its plugins: "Naive", "Naive+DiagonalEWC", "DiagonalEWC".
        train_exp: The experience that a resumed run had trained through, where the logger itself
            does not come out of a checkpoint.

    Raises:
        ValueError: A name is no text of one line, or reads as a missing value; `seed` or
            `train_exp` is no integer; or the file has other columns or a row that is not theirs;
            or, when it evaluates, the `EvaluationPlugin` has no
            `accuracy_metrics(experience=True)`. Without `loss_metrics(experience=True)` the loss
            stays empty.

    Example:
        >>> from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
        >>> from avalanche.training.plugins import EvaluationPlugin
        >>> evaluator = EvaluationPlugin(
        ...     accuracy_metrics(experience=True),
        ...     loss_metrics(experience=True),
        ...     loggers=TidyCSVLogger("accuracy.csv", "ewc-30-seed-0", seed=0),
        ... )
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run_id: str,
        *,
        seed: int,
        benchmark: str = "unnamed",
        dataset: str = "unnamed",
        scenario: str = "unnamed",
        method: str | None = None,
        train_exp: int = UNTRAINED,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.train_exp = _checked_integer("train_exp", train_exp)
        names = {"run_id": run_id, "benchmark": benchmark, "dataset": dataset, "scenario": scenario}
        if method is not None:
            names["method"] = method
        self._names: dict[str, Any] = {n: _checked_name(n, text) for n, text in names.items()}
        self._names["seed"] = _checked_integer("seed", seed)
        self._in_training = False
        # Rows of this run by key; None until the file has been read.
        self._written: dict[tuple[str, ...], Row] | None = None
        if self.path.exists():
            _read(self.path)  # a wrong file is refused before hours of training

    def before_training_exp(self, strategy: Any, metric_values: Any, **kwargs: Any) -> None:
        """Ignore evaluations until the experience has been trained: they belong to no row of R."""
        self._in_training = True

    def after_training_exp(self, strategy: Any, metric_values: Any, **kwargs: Any) -> None:
        """Assign the evaluations that follow to this experience."""
        self._in_training = False
        self.train_exp = strategy.experience.current_experience

    def after_eval_exp(
        self, strategy: Any, metric_values: Iterable[MetricValue], **kwargs: Any
    ) -> None:
        """Write the experience's row."""
        if self._in_training:
            return
        found = {metric.name.split("/")[0]: metric.value for metric in metric_values}
        if "Top1_Acc_Exp" not in found:
            raise ValueError(
                "`TidyCSVLogger` writes what `accuracy_metrics(experience=True)` measures; give "
                "it to the `EvaluationPlugin` too, and `loss_metrics(experience=True)`."
            )
        experience = strategy.experience
        values = {
            **_method_of(strategy),
            **self._names,
            "train_exp": self.train_exp,
            "eval_exp": experience.current_experience,
            "accuracy": float(found["Top1_Acc_Exp"]),
            "loss": float(found["Loss_Exp"]) if "Loss_Exp" in found else None,
            "n_samples": len(experience.dataset),
            "stream": experience.origin_stream.name,
            "task": phase_and_task(strategy)[1],
        }
        self._put({name: "" if values[name] is None else str(values[name]) for name in COLUMNS})

    def _put(self, row: Row) -> None:
        if self._written is None:
            rows = _read(self.path) if self.path.exists() else []
            _replace(self.path, rows)  # begins the file, or drops what a kill left of a line
            own = (each for each in rows if each["run_id"] == row["run_id"])
            self._written = {_key(each): each for each in own}
        before = self._written.get(_key(row))
        self._written[_key(row)] = row
        if before is None:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                _writer(file).writerow(row)
        elif before != row:
            rows = [row if _key(each) == _key(row) else each for each in _read(self.path)]
            _replace(self.path, rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_written": None}  # the file may have got further than a checkpoint


def _method_of(strategy: Any) -> dict[str, Any]:
    ewc = next((p for p in strategy.plugins if hasattr(p, "ewc_lambda")), None)
    kind = getattr(ewc, "fisher_type", None)
    name = type(strategy).__name__
    # Such as `EWC`, whose plugin is `EWCPlugin`, is named once.
    added = [
        type(plugin).__name__.removesuffix("Plugin")
        for plugin in strategy.plugins
        if not isinstance(plugin, _OF_EVERY_STRATEGY)
    ]
    return {
        "method": "+".join([name, *(plugin for plugin in added if plugin != name)]),
        "fisher_type": None if kind is None else type_name(kind),
        "ewc_lambda": None if ewc is None else float(ewc.ewc_lambda),
    }


def _checked_name(argument: str, name: Any) -> str:
    if not isinstance(name, str) or not name.isprintable() or name.strip() in MISSING:
        raise ValueError(
            f"`{argument}` must be a text of one line that no reader of CSV files takes for a "
            f"missing value, got {name!r}."
        )
    return name


def _checked_integer(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"`{argument}` must be an integer, got {value!r}.")
    return int(value)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def _writer(file: Any) -> csv.DictWriter[str]:
    return csv.DictWriter(file, COLUMNS, lineterminator="\n")


def _read(path: Path) -> list[Row]:
    """Return the complete rows of a file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        ours = not text or tuple(lines.fieldnames or ()) == COLUMNS
        rows = list(lines)
    except (UnicodeDecodeError, csv.Error):  # such as a compressed file
        ours = False
    if not ours:
        raise ValueError(
            f"`path` must be a new file or one of `TidyCSVLogger`, got {path}, which has other "
            "columns. Choose another name."
        )
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(
                f"`path` must be a file of `TidyCSVLogger`, got {path}, whose row {number} does "
                f"not have {len(COLUMNS)} cells. Mend the row, or choose another name."
            )
    return rows


def _replace(path: Path, rows: list[Row]) -> None:
    """Write the file anew by rename, so that a kill leaves the old file or the new one.

    What a kill leaves of the new one has the same name each time, so the next write takes it along.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.ewc-plugin.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = _writer(file)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

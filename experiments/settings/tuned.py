"""Lambdas chosen on validation data: those of the main job, and those that `tune` wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.settings.run import RunSettings
from experiments.settings.values import shown

# What `python -m experiments tune` chose on validation data for the settings of the main job; a
# test holds these numbers to results/tuning.
CHOSEN_LAMBDA: dict[tuple[str, str, str, str], float] = {
    ("split", "mnist", "task", "ewc"): 3162.0,
    ("split", "mnist", "task", "avalanche-ewc"): 1e6,
    ("permuted", "mnist", "domain", "ewc"): 31.62,
    ("permuted", "mnist", "domain", "avalanche-ewc"): 316.2,
    ("split", "digits", "task", "ewc"): 3162.0,
    ("split", "digits", "task", "avalanche-ewc"): 3162.0,
    ("permuted", "digits", "domain", "ewc"): 100.0,
    ("permuted", "digits", "domain", "avalanche-ewc"): 1e3,
}


TUNING_SEEDS = (100, 101, 102)  # never reported
TUNED_FILE = "tuned.json"
# Where a search starts, by what F is divided by, else by Fisher type, else by method.
START_NORMALIZED = {"mean": 0.1, "trace": 1e4, "max": 1.0, "avalanche": 1e3}
START_TYPE = {
    **{"predicted": 100.0, "exact": 10.0, "empirical": 10.0, "sampled": 10.0, "reversed": 1.0},
    **dict.fromkeys(("batched", "class_mean", "class_mean_empirical"), 1e3),
    **dict.fromkeys(("batched_reversed", "class_mean_reversed"), 10.0),
}
START_METHOD = {"avalanche-ewc": 1e3, "l2": 0.1, "si": 1.0, "mas": 1.0, "lwf": 1.0}


def chosen_lambda(run: RunSettings) -> float:
    """The lambda chosen on validation data for this benchmark, scenario and method.

    Raises:
        ValueError: None was chosen for the scenario.
    """
    try:
        return CHOSEN_LAMBDA[run.benchmark, run.dataset, run.scenario, run.method]
    except KeyError:
        raise ValueError(
            f"`ewc_lambda` must be given for {run.method} on {run.benchmark} {run.dataset}, "
            f"scenario {run.scenario}: none was chosen on validation data; choose one by "
            f"`python -m experiments tune`, or start at --ewc-lambda {start_lambda(run):g}."
        ) from None


def check_unseen(seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
    """Raise a `ValueError` if a seed that is reported has a part in the choice of lambda."""
    for seed in set(seeds) & set(tuning_seeds):
        raise ValueError(f"`seeds` must be others than `tuning_seeds`, got {seed} in both.")


def start_lambda(run: RunSettings) -> float:
    """The lambda that a search of this arm starts from."""
    if run.normalize is not None:
        return START_NORMALIZED[run.normalize]
    if run.fisher_type is not None:
        return START_TYPE[run.fisher_type]
    return START_METHOD.get(run.method, 1.0)


# Settings in which a run that reports may differ from the one that its lambda was chosen with.
NOT_OF_THE_ARM = {"seed": 0, "ewc_lambda": 0.0, "validation": False, "eval_every": None}


def arm_of(run: RunSettings) -> RunSettings:
    """The run without what its arm does not depend on; of a method with a lambda."""
    return replace(run, **NOT_OF_THE_ARM)


@dataclass(frozen=True)
class Tuned:
    """Lambdas that were chosen on validation data.

    Attributes:
        lambdas: By arm.
        seeds: They were chosen with.
        files: They come from.
        at_edge: Arms whose lambda is the smallest or largest that was tried.
    """

    lambdas: dict[RunSettings, float]
    seeds: frozenset[int]
    files: str
    at_edge: tuple[str, ...] = ()

    def lambda_of(self, run: RunSettings) -> float:
        """The lambda of the run's arm.

        Raises:
            ValueError: None was chosen with exactly its settings, or one was chosen with its seed.
        """
        if run.seed in self.seeds:
            raise ValueError(
                f"`seeds` must be others than those that lambda was chosen with, got {run.seed}, "
                f"which is in {self.files}."
            )
        arm = arm_of(run)
        if arm not in self.lambdas:
            remedy = "run `python -m experiments tune` with the settings of this command"
            raise ValueError(
                f"`tuned` must hold a lambda for every arm, got {self.files} without "
                f"{arm.run_id.rpartition('-s')[0]}{self._nearest(arm)}; {remedy}."
            )
        return self.lambdas[arm]

    def _nearest(self, arm: RunSettings) -> str:
        """In what the arm differs from the one there that is most like it."""
        wanted, found = asdict(arm), [asdict(other) for other in self.lambdas]
        differences = (
            [f"{k} is {wanted[k]} here and {v} there" for k, v in other.items() if wanted[k] != v]
            for other in found
        )
        nearest = min(differences, key=len, default=[])
        return f" ({', '.join(nearest)})" if nearest else ""


def tuned_content(
    chosen: Iterable[RunSettings], seeds: Sequence[int], at_edge: Sequence[int] = ()
) -> str:
    """The content of the file that `read_tuned` reads.

    Args:
        chosen: A run of each arm, at its lambda.
        seeds: They were chosen with.
        at_edge: Places in `chosen` of lambdas that are the smallest or largest tried.

    Returns:
        JSON.
    """
    arms = []
    for run in chosen:
        settings = {k: v for k, v in asdict(run).items() if v is not None}
        arms.append({k: v for k, v in settings.items() if k not in ("seed", "validation")})
    content: dict[str, Any] = {"seeds": list(seeds), "arms": arms}
    if at_edge:
        content["at_edge"] = list(at_edge)
    return json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    """Of all else, as values; layout and order of keys do not count."""
    own = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def read_tuned(paths: Iterable[str]) -> Tuned:
    """The lambdas in the files, or folders, that `tune` wrote.

    Raises:
        ValueError: One is not such a file, was edited, or two give an arm different lambdas.
    """
    lambdas: dict[RunSettings, float] = {}
    seeds: set[int] = set()
    at_edge: list[str] = []
    for path in map(Path, paths):
        file = path / TUNED_FILE if path.is_dir() else path
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.get("digest") != _digest(content):
                raise ValueError("it was edited; give a lambda of your own by --ewc-lambda")
            runs = [RunSettings(seed=0, **arm) for arm in content["arms"]]
            seeds |= {int(seed) for seed in content["seeds"]}
            at_edge += [runs[i].run_id.rpartition("-s")[0] for i in content.get("at_edge", ())]
        except (OSError, ValueError, TypeError, LookupError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"`tuned` must be a folder or file that `tune` wrote, got {shown(str(file))} "
                f"({reason})."
            ) from None
        for run in runs:
            value: Any = run.ewc_lambda
            if lambdas.setdefault(arm_of(run), value) != value:
                raise ValueError(
                    f"`tuned` must give an arm one lambda, got {lambdas[arm_of(run)]:g} and "
                    f"{value:g} for {arm_of(run).run_id.rpartition('-s')[0]}."
                )
    return Tuned(lambdas, frozenset(seeds), ", ".join(paths), tuple(at_edge))

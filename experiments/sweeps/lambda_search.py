"""A search for lambda that stops by itself, on runs that are there or are asked for.

The values are start * 10^(step / 2). First the steps -2, 0 and 2 are tried, then, while the best is
the smallest or the largest, the next by a factor of 10; then both neighbours of the best at a
factor of sqrt(10). It ends there, or at `MOST_VALUES`. Of equally good values the smallest is best;
one where a run diverged is worse than all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from experiments.settings.run import RunSettings

MOST_VALUES = 8
WORSE = 0.01  # in accuracy: less is no reason to prefer one lambda to another

Outcome = tuple[str, float]  # status and average accuracy of a run


@dataclass(frozen=True)
class Arm:
    """Runs that differ in lambda and seed alone.

    Attributes:
        run: Any of them; its lambda is where the search starts.
        seeds: The same for every lambda.
    """

    run: RunSettings
    seeds: Sequence[int]

    def lambda_at(self, step: int) -> float:
        """The value of a step, with four digits."""
        start = self.run.ewc_lambda
        assert start is not None
        return float(f"{start * 10 ** (step / 2):.4g}")

    def cells(self, step: int) -> list[RunSettings]:
        """The runs of a step."""
        ewc_lambda = self.lambda_at(step)
        return [replace(self.run, ewc_lambda=ewc_lambda, seed=seed) for seed in self.seeds]


@dataclass(frozen=True)
class Search:
    """How far the search of an arm has come.

    Attributes:
        arm: The arm.
        found: Mean average accuracy by step, -inf where a run diverged.
        pending: Runs that it waits for; none where it has ended.
    """

    arm: Arm
    found: dict[int, float] = field(default_factory=dict)
    pending: list[RunSettings] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The best step."""
        return best_step(self.found)

    @property
    def place(self) -> str:
        """Where the best is: `inside` of what was tried, or the `smallest` or `largest` of it."""
        if self.best == min(self.found):
            return "smallest"
        return "largest" if self.best == max(self.found) else "inside"

    @property
    def as_good(self) -> list[int]:
        """The steps around the best, without a gap, that are not worse by more than `WORSE`."""
        steps = sorted(self.found)
        low = high = steps.index(self.best)
        enough = self.found[self.best] - WORSE
        while low > 0 and self.found[steps[low - 1]] >= enough:
            low -= 1
        while high < len(steps) - 1 and self.found[steps[high + 1]] >= enough:
            high += 1
        return steps[low : high + 1]


def best_step(found: Mapping[int, float]) -> int:
    """The step with the highest value; of several the smallest."""
    return max(found, key=lambda step: (found[step], -step))


def next_steps(found: Mapping[int, float]) -> list[int]:
    """The steps to try next; none where the search has ended.

    Args:
        found: Mean accuracy by step, of all that were tried.
    """
    if not found:
        return [-2, 0, 2]
    best, left = best_step(found), MOST_VALUES - len(found)
    if best % 2:  # between two that are a factor of 10 apart, and better than both
        return []
    outer = [step for step in (best - 2, best + 2) if step not in found]
    if outer:
        return outer[:left]
    inner = [step for step in (best - 1, best + 1) if step not in found]
    return sorted(inner, key=lambda step: -found[2 * step - best])[:left]


def search(arm: Arm, outcomes: Mapping[str, Outcome]) -> Search:
    """The search of an arm, as far as the runs that are there allow."""
    found: dict[int, float] = {}
    while steps := next_steps(found):
        runs = {step: arm.cells(step) for step in steps}
        pending = [run for step in steps for run in runs[step] if run.run_id not in outcomes]
        if pending:
            return Search(arm, found, pending)
        found |= {step: _value([outcomes[run.run_id] for run in runs[step]]) for step in steps}
    return Search(arm, found)


def _value(outcomes: Sequence[Outcome]) -> float:
    if any(status != "ok" for status, _ in outcomes):
        return -math.inf
    return sum(accuracy for _, accuracy in outcomes) / len(outcomes)

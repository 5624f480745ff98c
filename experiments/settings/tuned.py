"""Lambdas chosen on validation data, and the grids that they were searched on."""

from __future__ import annotations

from experiments.settings.run import RunSettings

# What `python -m experiments tune` chose on validation data for the settings of the main job; a
# test holds these numbers to results/tuning.
CHOSEN_LAMBDA: dict[tuple[str, str, str, str], float] = {
    ("split", "mnist", "task", "ewc"): 1e3,
    ("split", "mnist", "task", "avalanche-ewc"): 1e6,
    ("permuted", "mnist", "domain", "ewc"): 30.0,
    ("permuted", "mnist", "domain", "avalanche-ewc"): 300.0,
    ("split", "digits", "task", "ewc"): 1e6,
    ("split", "digits", "task", "avalanche-ewc"): 1e4,
    ("permuted", "digits", "domain", "ewc"): 100.0,
    ("permuted", "digits", "domain", "avalanche-ewc"): 1e3,
}


# A network that fits its training data has little predicted-label Fisher left, hence the digits'.
TUNING_GRIDS: dict[tuple[str, str, str, str], tuple[float, ...]] = {
    ("split", "mnist", "task", "ewc"): (1e2, 1e3, 1e4, 1e5, 1e6),
    ("split", "mnist", "task", "avalanche-ewc"): (1e3, 1e4, 1e5, 1e6, 1e7),
    ("permuted", "mnist", "domain", "ewc"): (3.0, 10.0, 30.0, 100.0, 300.0),
    ("permuted", "mnist", "domain", "avalanche-ewc"): (30.0, 100.0, 300.0, 1000.0, 3000.0),
    ("split", "digits", "task", "ewc"): (1e5, 1e6, 1e7, 1e8, 1e9),
    ("split", "digits", "task", "avalanche-ewc"): (1e3, 1e4, 1e5, 1e6, 1e7),
    ("permuted", "digits", "domain", "ewc"): (30.0, 100.0, 300.0, 1e3, 3e3),
    ("permuted", "digits", "domain", "avalanche-ewc"): (300.0, 1e3, 3e3, 1e4, 3e4),
}


TUNING_SEEDS = (100, 101, 102)  # never reported


def chosen_lambda(run: RunSettings, method: str) -> float:
    """The lambda chosen on validation data for this benchmark, scenario and method.

    Raises:
        ValueError: None was chosen for the scenario.
    """
    try:
        return CHOSEN_LAMBDA[run.benchmark, run.dataset, run.scenario, method]
    except KeyError:
        raise ValueError(
            f"`ewc_lambda` must be given for {method} on {run.benchmark} {run.dataset}, "
            f"scenario {run.scenario}: none was chosen on validation data; try --ewc-lambda 100."
        ) from None

"""What one run leaves behind."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments.results.metrics import METRICS
from experiments.settings.run import RunSettings

NO_SECONDS = {"train_s": 0.0, "fisher_s": 0.0, "eval_s": 0.0}


@dataclass(frozen=True)
class RunResult:
    """What one run leaves behind, as plain data.

    Attributes:
        record: The run's row of `runs.csv`.
        rows: Its rows of `accuracy.csv`.
    """

    record: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_record(
    settings: RunSettings,
    status: str,
    reason: str,
    *,
    metrics: dict[str, float] | None = None,
    seconds: dict[str, float] | None = None,
    peak_rss_mb: float = 0.0,
    penalty_state_mb: float = 0.0,
) -> dict[str, Any]:
    """The row of `runs.csv`; metrics are NaN where there are none."""
    return {
        "run_id": settings.run_id,
        "status": status,
        "reason": reason,
        **asdict(settings),
        **(metrics or dict.fromkeys(METRICS, math.nan)),
        **(seconds or NO_SECONDS),
        "peak_rss_mb": peak_rss_mb,
        "penalty_state_mb": penalty_state_mb,
        "config_hash": settings.config_hash,
    }


def failed(settings: RunSettings, reason: str) -> RunResult:
    """Of a run that left nothing, not even its own reason."""
    return RunResult(run_record(settings, "failed", reason))

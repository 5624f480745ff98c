"""The result of one run: its row of `runs.csv` and its rows of `accuracy.csv`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments.results.metrics import METRICS
from experiments.results.provenance import content_digest, provenance
from experiments.settings.run import RunSettings
from experiments.settings.unset import used

REASON_LENGTH = 500
NO_SECONDS = {"train_s": 0.0, "fisher_s": 0.0, "eval_s": 0.0}


@dataclass(frozen=True)
class RunResult:
    """The result of one run, as plain data.

    Attributes:
        record: The run's row of `runs.csv`.
        rows: Its rows of `accuracy.csv`.
    """

    record: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def sealed(cls, record: dict[str, Any], rows: list[dict[str, Any]]) -> RunResult:
        """A result whose record has the digest of all its values."""
        return cls({**record, "digest": content_digest(record, rows)}, rows)


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
        "reason": one_line(reason),
        **used(asdict(settings)),
        **(metrics or dict.fromkeys(METRICS, math.nan)),
        **(seconds or NO_SECONDS),
        "peak_rss_mb": peak_rss_mb,
        "penalty_state_mb": penalty_state_mb,
        "config_hash": settings.config_hash,
        **provenance(),
    }


def one_line(text: str) -> str:
    """Shorten text to a single line that fits tables and terminals."""
    words = " ".join(text.encode("utf-8", "replace").decode().split())
    printable = "".join(c if c.isprintable() else "?" for c in words)
    return printable if len(printable) <= REASON_LENGTH else f"{printable[:REASON_LENGTH]}..."


def failed(settings: RunSettings, reason: str) -> RunResult:
    """Make the result of a run that ended without one, such as a killed process."""
    return RunResult.sealed(run_record(settings, "failed", reason), [])

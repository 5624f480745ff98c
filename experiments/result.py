"""What one run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What one run leaves behind, as plain data.

    Attributes:
        record: The run's row of `runs.csv`.
        rows: Its rows of `accuracy.csv`.
    """

    record: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

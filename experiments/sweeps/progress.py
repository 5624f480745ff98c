"""Progress of a sweep on the terminal: a bar over all experiences, and a line for each run.

Where the output is no terminal, a plain line for each run that has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.reporting.labels import run_labels
from experiments.results.record import RunResult
from experiments.settings.run import RunSettings
from experiments.sweeps.worker import Event

RATE_WINDOW_S = 600.0  # the time left is estimated from the last ten minutes


class Display:
    """The progress of a sweep; its clock is one that never jumps.

    Args:
        cells: What will run.
        console: Where it is shown.
    """

    def __init__(self, cells: Sequence[RunSettings], console: Console) -> None:
        self.console = console
        self.start = time.monotonic()
        self.labels = run_labels(cells)
        self.n_experiences = {cell.run_id: cell.n_experiences for cell in cells}
        self.done = dict.fromkeys(self.n_experiences, 0)
        self.n_ended = 0
        self.n_failed = 0
        self.lines: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=RATE_WINDOW_S,
            get_time=time.monotonic,
        )
        total = sum(self.n_experiences.values())
        self.overall = self.progress.add_task("all runs", total=total, note=self._note())

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def update(self, event: Event) -> None:
        """Show that a run has begun (no experience is done) or finished an experience."""
        run_id, done, accuracy, note = event
        if note:
            self.say(note)
            return
        if self.done.get(run_id, done + 1) > done:
            return  # its result has overtaken the event, or it is another sweep's
        total = self.n_experiences[run_id]
        if run_id not in self.lines:
            self.lines[run_id] = self.progress.add_task(self.labels[run_id], total=total, note="")
        note = f"experience {min(done + 1, total)} of {total}"
        if done:
            note += f", accuracy {accuracy:.3f}"
        self.progress.update(self.lines[run_id], completed=done, note=note)
        self._advance(run_id, done)

    def finish(self, result: RunResult) -> None:
        """Show that a run has ended, well or not."""
        record = result.record
        run_id = record["run_id"]
        self._advance(run_id, self.n_experiences[run_id])
        self.n_ended += 1
        self.n_failed += record["status"] != "ok"
        self.progress.update(self.overall, note=self._note())
        if run_id in self.lines:
            self.progress.update(self.lines[run_id], visible=False)
        outcome = f"accuracy {record['average_accuracy']:.4f}"
        if record["status"] != "ok":
            outcome = f"{record['status'].upper()}: {record['reason']} ({run_id})"
        self.say(
            f"[{self.n_ended}/{len(self.done)}, {time.monotonic() - self.start:.0f} s"
            f"{self._time_left()}] {self.labels[run_id]}: {outcome}"
        )

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _advance(self, run_id: str, done: int) -> None:
        self.progress.update(self.overall, advance=max(done - self.done[run_id], 0))
        self.done[run_id] = max(done, self.done[run_id])

    def _time_left(self) -> str:
        left = self.progress.tasks[0].time_remaining
        return f", about {left:.0f} s left" if left and self.n_ended < len(self.done) else ""

    def _note(self) -> str:
        left = len(self.done) - self.n_ended
        return f"{self.n_ended - self.n_failed} runs done, {left} left, {self.n_failed} failed"

"""Hash, commit and date of the code that computed a run, and a digest of its rows."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

import ewc_plugin
from experiments.settings.unset import given

MEASUREMENT = ("code_hash", "commit", "measured_at")  # columns of every table
COLUMNS = (*MEASUREMENT, "digest")
NOT_RECORDED = "not recorded"  # of runs from before these columns
EXPERIMENTS = Path(__file__).parents[1]
ENTRY = EXPERIMENTS / "training" / "run.py"  # what a run executes


@functools.cache
def code_hash(entry: Path = ENTRY) -> str:
    """Twelve hex digits of the sources of `ewc_plugin`, and of every module that one imports.

    Args:
        entry: File of that module; what a run executes by default.
    """
    package = Path(str(ewc_plugin.__file__)).parent
    sources = {f"ewc_plugin/{p.relative_to(package).as_posix()}": p for p in package.rglob("*.py")}
    sources |= {p.relative_to(EXPERIMENTS).as_posix(): p for p in _imported(entry)}
    digest = hashlib.sha256()
    for name in sorted(sources):
        content = sources[name].read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _imported(file: Path) -> set[Path]:
    """A module's file and those of all modules of ours that it imports, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += _imports(current)
    return found


def _imports(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}".split(".")[0] == "experiments":
            folder = EXPERIMENTS.joinpath(*f"{node.module}".split(".")[1:])
            names = [folder, *(folder / alias.name for alias in node.names)]
            yield from (path for n in names if (path := n.with_suffix(".py")).exists())


@functools.cache
def commit() -> str | None:
    """The commit of this checkout, with "+" where its sources were changed; None outside of one."""
    if _git("ls-files", "--error-unmatch", ENTRY.name) is None:
        return None  # such as an installation inside another project's checkout
    changed = _git("status", "--porcelain", "--", str(EXPERIMENTS), "../../ewc_plugin")
    return f"{_git('rev-parse', 'HEAD')}{'+' if changed else ''}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ENTRY.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(entry: Path = ENTRY) -> dict[str, str | None]:
    """Return the columns with code hash, commit and current time.

    Args:
        entry: File of the module that made it.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"code_hash": code_hash(entry), "commit": commit(), "measured_at": now}


def provenance_of(rows: pd.DataFrame) -> dict[str, str]:
    """The columns of a row that is computed from others.

    Args:
        rows: With or without the columns of `MEASUREMENT`.

    Returns:
        Every version of the code and every commit, separated by spaces; the latest time.
    """
    found = rows.reindex(columns=list(MEASUREMENT)).astype(object).fillna(NOT_RECORDED)
    times = [time for time in found["measured_at"] if time != NOT_RECORDED]
    return {
        **{name: " ".join(sorted(found[name].unique())) for name in ("code_hash", "commit")},
        "measured_at": max(times, default=NOT_RECORDED),
    }


def content_digest(record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """Sixteen hex digits of all values of a run, from its files or from the tables.

    Args:
        record: Its row of `runs.csv`; its `digest` does not count, nor whether the value of an
            unset setting is written.
        rows: Its rows of `accuracy.csv`, in any order.
    """
    lines = sorted(_line(row) for row in rows)
    values = {**record, **given(record)}
    own = _line({name: value for name, value in values.items() if name != "digest"})
    return hashlib.sha256("\n".join([own, *lines]).encode()).hexdigest()[:16]


def _line(row: Mapping[str, Any]) -> str:
    """The values of a row; an empty or unrecorded one counts as missing, as in a CSV file."""
    missing = ("", NOT_RECORDED)
    values = {k: v for k, v in sorted(row.items()) if not (pd.isna(v) or v in missing)}
    plain = {k: v if isinstance(v, (str, bool)) else repr(float(v)) for k, v in values.items()}
    return json.dumps(plain)


def mixed_code(runs: pd.DataFrame) -> str:
    """A sentence on the versions of the code that made the runs; "" where there is one.

    Args:
        runs: Rows of `runs.csv`.
    """
    counts = runs["code_hash"].fillna(NOT_RECORDED).value_counts()
    if len(counts) < 2:
        return ""
    parts = ", ".join(f"{n} by {name}" for name, n in counts.items())
    return f"These runs were computed by {len(counts)} versions of the code: {parts}."

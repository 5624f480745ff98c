"""How files of a results folder are written: under its lock, beside the old one, then renamed."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from filelock import FileLock

# Files that are being written have names which nobody else gives.
TEMPORARY = ".ewc-plugin.tmp"
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(TEMPORARY))
LOCK = "lock"
LOCK_TIMEOUT_S = 120.0  # it is held for a second at most; a process that is stopped may hold it on


def folder_lock(parts: Path) -> FileLock:
    """What any process that writes to a results folder holds meanwhile; a kill sets it free."""
    return FileLock(parts / LOCK, timeout=LOCK_TIMEOUT_S)


def sweep_leftovers(*folders: Path) -> None:
    """Deletes what killed writes have left in the folders; nobody else's files."""
    for folder in folders:
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes beside the file, forces the bytes to the disk, then renames over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

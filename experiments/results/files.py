"""Write the files of a results folder: under its lock, beside the old one, then renamed."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from filelock import FileLock

from experiments.settings.values import shown

# Files that are being written have names which nobody else gives.
TEMPORARY = ".ewc-plugin.tmp"
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(TEMPORARY))
LOCK = "lock"
LOCK_TIMEOUT_S = 120.0  # normally held for under a second, longer by a suspended process


def folder_lock(parts: Path) -> FileLock:
    """Return the lock of a results folder; it is released if its process is killed."""
    return FileLock(parts / LOCK, timeout=LOCK_TIMEOUT_S)


def make_folder(folder: Path) -> None:
    """Make a folder if it isn't there, and try whether it can be written to.

    Raises:
        ValueError: It can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".try.", suffix=TEMPORARY)
        try:
            os.write(handle, b"0")
        finally:
            os.close(handle)
            os.unlink(name)
    except (OSError, ValueError) as error:  # of a name with a zero byte, a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"`out` must be a folder that can be written to, got {shown(str(folder))} ({reason})."
        ) from None


def sweep_leftovers(*folders: Path) -> None:
    """Delete temporary files that killed processes left in the folders, and no others."""
    for folder in folders:
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write beside the file, force the bytes to the disk, then rename over it."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # a path may have bytes of no text
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

"""Write `environment.json`: versions, hardware and data of a results folder."""

from __future__ import annotations

import json
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from experiments.data.sources import DataSource
from experiments.results.files import replace_file
from experiments.results.provenance import commit

PACKAGES = ("ewc-plugin", "avalanche-lib", "torch", "torchvision", "numpy", "pandas", "scipy")


def keep_environment(folder: Path, source: DataSource, n_added: int) -> None:
    """Write `environment.json` unless it is that of the folder's rows already."""
    if n_added or not (folder / "environment.json").exists():
        write_environment(folder, source)


def write_environment(folder: Path, source: DataSource | None) -> None:
    """Write what the numbers were computed with to `environment.json`; None: data were drawn."""
    state = commit()
    environment = {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m experiments", *sys.argv[1:]]),
        "commit": state and state.rstrip("+"),
        "uncommitted_changes": state and state.endswith("+"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads_per_run": 1,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "dataset": source and source.name,
        "dataset_checksum_md5": source and source.checksum,
        "own_files_sha256": {
            Path(file.path).name: file.sha256 for file in (source.files if source else ())
        },
        "packages": {name: _version(name) for name in PACKAGES},
    }
    replace_file(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

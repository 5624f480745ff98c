"""Every committed folder of results can be made again by a command that is listed."""

import runpy
import subprocess
import sys
from pathlib import Path

from support.paths import RESULTS

SCRIPT = RESULTS / "regenerate"


def test_every_folder_has_a_command():
    folders = {p.parent.relative_to(RESULTS) for p in RESULTS.rglob("environment.json")}
    parts = {Path("parity/curves"), Path("parity/tuning"), Path("drop_in/tuning")}
    commands = runpy.run_path(str(SCRIPT))["COMMANDS"]
    assert folders - parts <= {Path(name) for name in commands}


def test_list_prints_each_folder():
    run = [sys.executable, str(SCRIPT), "--list"]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "main: python -m experiments --dataset mnist --out runs/regenerate/main\n" in printed

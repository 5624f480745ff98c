"""Every committed folder of results can be made again by a command that is listed."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.command_line import parse
from experiments.settings.grids import Sweep
from experiments.settings.run import WITH_LAMBDA
from experiments.settings.tuned import arm_of
from experiments.studies.tune import Tune
from support.paths import RESULTS

SCRIPT = RESULTS / "regenerate"
SETTINGS = sorted(RESULTS.rglob("settings.toml"))


def test_every_folder_has_a_command():
    commands = {Path(name) for name in runpy.run_path(str(SCRIPT))["COMMANDS"]}
    made = {p.parent.relative_to(RESULTS) for p in RESULTS.rglob("environment.json")}
    made |= {p.parent.relative_to(RESULTS) for p in SETTINGS}
    with_others = {folder for folder in made - commands if folder.parent in commands}
    assert made - with_others == commands


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.parent.name)
def test_a_file_of_settings_serves_the_search_and_the_report(file):
    """The search has an arm for every run with a lambda that is reported, and no other."""
    out = Path("somewhere")
    tuning, report = runpy.run_path(str(SCRIPT))["arguments_of"](file.parent.name, out)
    assert tuning[-2:] == ["--out", str(out / "tuning")]
    assert report[-2:] == ["--out", str(out)]
    arms = parse("tune", Tune, tuning[1:], None).arms("mnist")
    sweep = parse("sweep", Sweep, report[1:], None)
    cells = list(replace(sweep, tuned=(), ewc_lambda=(1.0,)).cells("mnist"))
    with_lambda = {arm_of(cell) for cell in cells if cell.method in WITH_LAMBDA}
    assert {arm_of(arm.run) for arm in arms} == with_lambda
    assert not {cell.seed for cell in cells} & set(arms[0].seeds)


def test_list_prints_each_folder():
    run = [sys.executable, str(SCRIPT), "--list"]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "main: python -m experiments --dataset mnist --out runs/regenerate/main\n" in printed

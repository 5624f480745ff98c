"""The release: one version everywhere, and a wheel that advertises only what works from it."""

import os
import re
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import ewc_plugin
from support.paths import ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    assert re.search(r"^version: (\S+)$", read("CITATION.cff"), re.MULTILINE)[1] == (
        ewc_plugin.__version__
    )
    released = re.findall(r"^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.M)
    assert released[0][0] == ewc_plugin.__version__
    assert f'date-released: "{released[0][1]}"' in read("CITATION.cff")
    assert not re.search(r"^version = \"", read("pyproject.toml"), re.MULTILINE)


def test_the_task_runner_lists_every_task():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    tasks = set(re.findall(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)[0].split())
    assert {line.split()[0] for line in shown.stdout.splitlines()} == tasks


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="needs the extra `dev`")
    folder = tmp_path_factory.mktemp("dist")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    command = [sys.executable, "-m", "pip", "wheel", *options, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_advertises_its_own_extra(wheel):
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    assert {Path(name).parts[0] for name in names} == {"ewc_plugin", Path(metadata).parts[0]}
    assert "ewc_plugin/py.typed" in names
    assert fields["Version"] == ewc_plugin.__version__
    assert fields.get_all("Provides-Extra") == ["files"]
    needed = {re.split(r"[><=; ]", rule)[0] for rule in fields.get_all("Requires-Dist")}
    assert needed == {"avalanche-lib", "torch", "safetensors"}


@pytest.mark.slow
def test_the_package_works_from_the_wheel_in_an_environment_of_its_own(wheel, tmp_path):
    # torch and Avalanche come from this environment, by a path that is searched last; the package
    # itself must come from the wheel, and nothing else of the checkout may be importable.
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(pip, check=True, env=clean)
    (packages,) = environment.glob("lib/*/site-packages")
    outside = [p for p in sys.path if p.endswith("site-packages")]
    (packages / "outside.pth").write_text("\n".join(outside), encoding="utf-8")
    program = """
import importlib.util, torch, ewc_plugin
from ewc_plugin import DiagonalEWCPlugin, QuadraticPenalty, diagonal_fisher
model = torch.nn.Linear(3, 2)
fisher = diagonal_fisher(model, [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))])
penalty = QuadraticPenalty()
penalty.consolidate(model, fisher)
DiagonalEWCPlugin(0.01, normalize="mean")
print(ewc_plugin.__file__, float(penalty(model).detach()))
"""
    done = subprocess.run(
        [python, "-c", program], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where, value = done.stdout.split()[-2:]
    assert Path(where).is_relative_to(packages)
    assert float(value) == 0

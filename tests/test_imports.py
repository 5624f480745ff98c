"""Who may import what: the maths imports torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ewc_plugin

PACKAGE = Path(ewc_plugin.__file__).parent
ALLOWED = {"torch", "ewc_plugin", *sys.stdlib_module_names}


# Layers from top to bottom: a subpackage or module imports from layers below its own alone.
LAYERS = {
    "ewc_plugin": [
        ["__init__"],
        ["avalanche", "plain", "fisher_file"],
        ["fisher", "penalty"],
        ["batch_parts"],
        ["batches", "contexts"],
    ],
    "experiments": [
        ["__main__"],
        ["command_line", "main_job"],
        ["studies"],
        ["sweeps", "timing"],
        ["training", "reporting"],
        ["results"],
        ["data"],
        ["settings"],
    ],
}


def parts_imported_by(file, package):
    """First segments below `package` of all that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and f"{node.module}".startswith(f"{package}."):
            yield f"{node.module}".split(".")[1]


@pytest.mark.parametrize("package", LAYERS)
def test_packages_import_from_lower_layers_alone(package):
    layer = {part: i for i, parts in enumerate(LAYERS[package]) for part in parts}
    root = PACKAGE.parent / package
    for file in root.rglob("*.py"):
        part = file.relative_to(root).with_suffix("").parts[0]
        above = [
            other
            for other in parts_imported_by(file, package)
            if other in layer and other != part and layer[other] <= layer.get(part, -1)
        ]
        assert not above, f"{file} imports from {above}"


def test_only_the_adapters_folder_imports_avalanche():
    for file in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        names += [n.module or "ewc_plugin" for n in nodes if isinstance(n, ast.ImportFrom)]
        allowed = ALLOWED | ({"avalanche"} if file.parent.name == "avalanche" else set())
        assert {name.split(".")[0] for name in names} <= allowed, file


def test_maths_is_had_without_avalanche():
    code = "import sys, ewc_plugin; ewc_plugin.QuadraticPenalty, ewc_plugin.diagonal_fisher;"
    code += "assert not {'avalanche', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_can_be_had():
    for name in ewc_plugin.__all__:
        assert getattr(ewc_plugin, name).__name__ == name


@pytest.mark.slow
def test_maths_takes_a_tenth_of_avalanches_import_time():
    seconds = {}
    for module in ("ewc_plugin.plain", "avalanche.training.plugins"):
        code = f"import torch, {module}"
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True
        )
        lines = [line.split("|") for line in done.stderr.splitlines()]
        # With what it imports, less torch. Circular imports give a module several lines.
        seconds[module] = max(int(x[1]) / 1e6 for x in lines if x[-1].strip() == module)
    plain, avalanche = seconds.values()
    assert plain < avalanche / 10, seconds

"""The documents keep their word: code runs, tables and numbers are those of the CSVs."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from avalanche.models import SimpleMLP

from experiments import tables
from experiments.report import chosen_lambdas
from experiments.settings import CHOSEN_LAMBDA, TUNING_SEEDS
from experiments.table import render, summary_table

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "results/README.md")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
TABLE = re.compile(r"<!-- table:(\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def blocks():
    for name in DOCUMENTS:
        for i, code in enumerate(CODE.findall((ROOT / name).read_text(encoding="utf-8"))):
            yield pytest.param(code, id=f"{name}-{i}")


@pytest.mark.parametrize("code", blocks())
def test_code_in_the_documents_runs(code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    model = SimpleMLP(num_classes=3, input_size=4, hidden_size=5)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": torch.nn.CrossEntropyLoss(),
        "x": torch.randn(6, 4),
        "y": torch.tensor([0, 1, 2, 0, 1, 2]),
    }
    exec(code, names)


def test_the_readme_shows_the_committed_tables():
    found = TABLE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found
    for folder, shown in found:
        summary = tables.load(ROOT / folder)["summary"]
        assert shown.strip() == render(summary_table(summary), "markdown").strip(), (
            f"put the output of `python -m experiments table {folder}` into README.md"
        )


@pytest.mark.parametrize("folder", ["main", "tuning", "tuning_digits"])
def test_committed_tables_fit_their_schemas_and_each_other(folder):
    found = tables.load(ROOT / "results" / folder)
    runs = found["runs"]
    assert (runs["status"] == "ok").all()
    assert set(found["accuracy"]["run_id"]) == set(runs["run_id"])
    again = tables.summarise(runs)
    pd.testing.assert_frame_equal(again, found["summary"])


@pytest.mark.parametrize("folder", ["tuning", "tuning_digits"])
def test_lambdas_are_those_that_were_best_on_validation_data(folder):
    found = tables.load(ROOT / "results" / folder)
    assert found["runs"]["validation"].all()
    assert set(found["runs"]["seed"]) == set(TUNING_SEEDS)
    for row in chosen_lambdas(found["summary"]).itertuples():
        key = (row.benchmark, row.dataset, row.scenario, row.method)
        assert CHOSEN_LAMBDA[key] == row.ewc_lambda, key


def test_the_main_results_are_checked_against_the_built_in():
    parity = tables.load(ROOT / "results" / "main")["parity"]
    numerical = parity[parity["check"].str.startswith("importances")]
    assert len(numerical) == 6
    assert (numerical["verdict"] == "equal").all()
    assert (numerical["difference"] <= numerical["tolerance"]).all()
    assert len(parity) == 6 + 4  # two benchmarks: average accuracy and forgetting each
    accuracy = parity[parity["quantity"] == "average_accuracy"].set_index("benchmark")
    # As README.md puts it into words.
    assert dict(accuracy["verdict"]) == {"split": "equivalent", "permuted": "equivalent"}

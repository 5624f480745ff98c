"""The documents keep their word: code runs, tables and numbers are those of the CSVs."""

import re
import sys

import dill
import pandas as pd
import pytest
import torch
from avalanche.models import SimpleMLP

from ewc_plugin import DiagonalEWCPlugin
from support.pages import CODE, run_page
from support.paths import ROOT
from support.plugin_streams import N_FEATURES, Blobs

sys.path.append(str(ROOT / "docs"))
import quoted  # noqa: E402

DOCUMENTS = ("README.md", "results/README.md")
PAGES = sorted((ROOT / "docs" / "pages").rglob("*.md"))
# Pages with a test of their own, and among them those that train a strategy.
LEARNING = ("batches", "heads", "losses", "pretrained", "watch")
TRAINERS = ("accelerate", "hugging-face", "lightning")  # test_trainers.py
# "avalanche-threads" has test_avalanche_threads.py.
RUN_BELOW = {"index", "save", "plain-loop", "online", "avalanche-threads", *LEARNING, *TRAINERS}
OTHERS = [page for page in PAGES if page.stem not in RUN_BELOW]
OUTPUT = re.compile(r"```python\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```", re.DOTALL)


@pytest.fixture
def scratch(monkeypatch, tmp_path):
    """A working directory in which the code of the documents may write."""
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dill.settings, "byref", False)  # and back, where the code sets it


def blocks():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for i, code in enumerate(CODE.findall(OUTPUT.sub("", text))):
            yield pytest.param(code, id=f"{name}-{i}")


@pytest.mark.parametrize("code", blocks())
def test_code_in_the_documents_runs(code, scratch, capsys):
    names = what_the_documents_take_for_granted()
    exec(code, names)
    if "QuadraticPenalty" in code:
        assert names["penalty"].n_experiences == 2


def what_the_documents_take_for_granted():
    """A model, an optimizer, a loss, and two loaders with two classes each."""
    torch.manual_seed(0)
    model = SimpleMLP(num_classes=4, input_size=N_FEATURES, hidden_size=5)
    x, y = Blobs().x, Blobs().targets
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "criterion": torch.nn.CrossEntropyLoss(),
        "loaders": [[(x[y < 2], y[y < 2])] * 2, [(x[y > 1], y[y > 1])] * 2],
    }


@pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")
def test_the_readme_prints_what_it_shows(scratch, capsys):
    (shown,) = OUTPUT.finditer((ROOT / "README.md").read_text(encoding="utf-8"))
    exec(shown["code"], {})
    printed = capsys.readouterr().out.splitlines()
    lines = shown["output"].splitlines()
    assert len(printed) == len(lines)
    for line, expected in zip(printed, lines, strict=True):
        words, numbers = line.split(" tasks ")
        assert expected.startswith(words)
        accuracies = list(map(float, expected.split(" tasks ")[1].split()))
        # Versions of torch round differently, which moves single images.
        assert list(map(float, numbers.split())) == pytest.approx(accuracies, abs=0.03)


@pytest.mark.filterwarnings("ignore:Cannot locate reference to:Warning")  # dill's, and does
@pytest.mark.parametrize("page", OTHERS, ids=lambda p: p.stem)
def test_code_on_the_site_runs_from_top_to_bottom(page, scratch, capsys):
    run_page(page)


def test_the_quickstart_does_what_it_says(scratch, capsys):
    names = run_page(ROOT / "docs" / "pages" / "index.md")
    assert names["without"] + 0.01 < names["start"] < names["with_ewc"] - 0.01


@pytest.mark.filterwarnings("ignore:Cannot locate reference to:Warning")
def test_a_resumed_run_has_nothing_left_to_do(scratch, capsys):
    page = ROOT / "docs" / "pages" / "how-to" / "save.md"
    run_page(page)
    assert run_page(page)["done"] == 2
    assert len(pd.read_csv("accuracy.csv")) == 2 * 2


@pytest.mark.parametrize("page", LEARNING)
def test_the_penalty_takes_part_on_the_pages(page, scratch, capsys):
    names = run_page(ROOT / "docs" / "pages" / "how-to" / f"{page}.md")
    ewc = next(p for p in names["strategy"].plugins if isinstance(p, DiagonalEWCPlugin))
    assert ewc.penalty.n_experiences == 2
    assert float(ewc.penalty_loss) > 0


def test_online_streams_have_the_fishers_that_the_page_says(scratch, capsys):
    text = (ROOT / "docs" / "pages" / "how-to" / "online.md").read_text(encoding="utf-8")
    run_page(ROOT / "docs" / "pages" / "how-to" / "online.md")
    said = re.findall(r"n_experiences\)  # (\d)", text)
    assert capsys.readouterr().out.split() == said == ["2"] * 3


def test_the_plain_loop_does_what_it_says(scratch, capsys):
    page = ROOT / "docs" / "pages" / "how-to" / "plain-loop.md"
    names, text = run_page(page), page.read_text(encoding="utf-8")
    assert names["penalty"].n_experiences == 2
    assert names["ewc"].penalty(names["model"]) > 0
    (before, without), (_, with_it) = re.findall(
        "accuracy (.+), then (.+)", capsys.readouterr().out
    )
    said = re.search(r"falls from (\S+) to (\S+) without a penalty, and to (\S+) with it", text)
    found = [float(one) for one in (before, without, with_it)]
    assert [float(one) for one in said.groups()] == pytest.approx(found, abs=0.03)


@pytest.mark.results
def test_the_readme_shows_the_committed_tables():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table:" in readme
    assert quoted.with_tables(readme) == readme, "run `python docs/quoted.py`"


@pytest.mark.results
def test_the_readme_says_in_words_what_the_tables_have():
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert quoted._less_avalanche("main", "predicted", "all", "permuted") in words
    assert quoted._less_avalanche("class_incremental", "class_mean", "all") in words
    assert quoted._less_avalanche("class_incremental", "class_mean", "current") in words
    summary = quoted._csv("class_incremental/summary")
    rows = summary.query("metric == 'average_accuracy' and loss_classes == 'all'")
    for kind in (rows["method"] == "avalanche-ewc", rows["fisher_type"] == "class_mean"):
        (row,) = rows[kind].itertuples()
        assert f"{row.mean:.3f} ± {row.ci_high - row.mean:.3f}" in words


def test_the_readme_is_one_reading():
    assert 100 <= len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150

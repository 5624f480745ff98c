"""The documentation site: numbers, formulas, names; that it builds; and that the notebook runs."""

import re
import subprocess
import sys

import pytest

import ewc_plugin
from support.paths import ROOT

EXTRA = "needs the extra `docs`"
DOCS = ROOT / "docs"
PAGES = DOCS / "pages"
mkdocs = pytest.importorskip("mkdocs", reason=EXTRA)
jinja2 = pytest.importorskip("jinja2", reason=EXTRA)
jupytext = pytest.importorskip("jupytext", reason=EXTRA)
nbformat = pytest.importorskip("nbformat", reason=EXTRA)
nbclient = pytest.importorskip("nbclient", reason=EXTRA)
pytest.importorskip("latex2mathml", reason=EXTRA)
pytest.importorskip("nbconvert", reason=EXTRA)
pytest.importorskip("griffe", reason=EXTRA)

sys.path.append(str(DOCS))
import docstrings  # noqa: E402
import hooks  # noqa: E402
import quoted  # noqa: E402


class Page:
    """What the hooks read of a page."""

    class file:  # noqa: N801
        generated_by, name = None, "laplace"


@pytest.mark.results
def test_numbers_come_from_the_tables():
    shown = hooks.on_page_markdown("{{ small }} samples, {{ n_draws }} draws", page=Page)
    assert shown == "30 samples, 10 draws"
    with pytest.raises(jinja2.UndefinedError, match="no_such_number"):
        hooks.on_page_markdown("{{ no_such_number }}", page=Page)


@pytest.mark.results
@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda p: p.stem)
def test_every_number_that_is_read_is_quoted(page):
    text = page.read_text(encoding="utf-8")
    used = set(re.findall(r"\{\{ (\w+) \}\}", text))
    unused = {n for n in quoted.of_page(page.stem) if n not in used}
    # What `_laplace` reads of both problems alike.
    assert {n for n in unused if not n.startswith(("logistic_", "two_"))} == set()


def test_formulas_become_mathml():
    page = '<p><span class="arithmatex">\\(p(y \\mid x) &lt; 1\\)</span></p>'
    shown = hooks.on_page_content(page)
    assert shown.startswith('<p><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "&#x02223;" in shown
    assert "&#x0003C;" in shown
    block = hooks.on_page_content('<div class="arithmatex">\\[\\log p\\]</div>')
    assert 'display="block"' in block
    assert "<mi>log</mi><mspace" in block


def test_docstrings_are_plain_text():
    shown = docstrings.as_markdown("`*args`: theta* of [N]\n\nExample:\n    >>> a * b[0]\n    *c")
    assert shown == ("`*args`: theta&#42; of &#91;N]\n\nExamples:\n    >>> a * b[0]\n    &#42;c")


def test_the_api_page_has_every_public_name():
    text = (PAGES / "reference" / "api.md").read_text(encoding="utf-8")
    shown = {path.rsplit(".", 1)[1] for path in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    assert set(ewc_plugin.__all__) | {"EWC", "normal_train", "ewc_train", "test"} <= shown


@pytest.mark.results
def test_tables_say_what_the_pages_say_in_words():
    table = quoted._csv("normalized_lambda/normalized_lambda")
    for _, rows in table[table["normalize"] == "mean"].groupby(["benchmark", "fisher_type"]):
        mean = rows.set_index("ewc_lambda")["mean"]
        assert mean[0.01] > mean.max() - 0.002  # "start from 0.01"
    text = quoted.of_page("implicit-step")
    assert text["n_implicit_ok"] == text["n_implicit"]
    assert float(text["adam_implicit"]) > float(text["adam_explicit"])
    fisher = quoted.of_page("fisher")
    assert float(fisher["curvature_true"]) < 1.5
    assert float(fisher["square_true"].rstrip("%")) < 1
    how = quoted.of_page("laplace")
    nats = [float(how[f"logistic_{name}_nats"]) for name in ("full", "best", "exact", "none")]
    assert nats == sorted(nats)
    assert float(how["two_best_nats"]) < float(how["two_exact_nats"]) < float(how["two_none_nats"])
    assert float(how["logistic_variation_large"]) < float(how["logistic_variation_small"]) / 2


def test_the_notebooks_are_a_pair_with_small_clean_outputs():
    source, shown = jupytext.read(DOCS / "notebook.py"), nbformat.read(DOCS / "notebook.ipynb", 4)
    assert [(c.cell_type, c.source) for c in source.cells] == [
        (c.cell_type, c.source) for c in shown.cells
    ], "run `jupytext --to ipynb --execute docs/notebook.py`"
    outputs = [o for c in shown.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 1
    assert all(o.output_type in ("execute_result", "display_data") for o in outputs)
    assert (DOCS / "notebook.ipynb").stat().st_size < 100_000


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")  # about the theme's own future
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-f", str(DOCS / "mkdocs.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = [p for p in tmp_path.rglob("*.html") if p.stem != "404"]
    assert len(pages) == len(list(PAGES.rglob("*.md"))) + 1  # the notebook
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert 'class="arithmatex"' not in text
        assert "{{" not in text
        assert not re.findall(
            r'(?:<script[^>]*src|<link[^>]*href|<img[^>]*src)="(?:https?:)?//', text
        )
    assert "<math" in (tmp_path / "concepts" / "fisher.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the kernel's own transport
def test_the_notebook_runs_in_under_five_minutes():
    notebook = nbformat.read(DOCS / "notebook.ipynb", 4)
    last = nbformat.v4.new_code_cell("print(best, *test.mean(axis=1))")
    notebook.cells.append(last)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": DOCS}}
    ).execute()
    best, without, with_ewc = map(float, notebook.cells[-1].outputs[0].text.split())
    assert best == 0.1
    assert with_ewc > without + 0.03

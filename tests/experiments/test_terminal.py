"""Tables on terminals of several widths: every word whole, no line too long, nothing left out."""

import io

import pytest
from rich.console import Console

from experiments.reporting.terminal import print_comparisons, print_summary, print_table
from experiments.results import schemas, statistics, tables
from support.run_rows import run_rows


def printed(show, width, *arguments):
    """What `show` prints on a terminal of that width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    show(*arguments, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_no_line_is_too_long_and_no_entry_is_cut(width):
    records = [
        *run_rows("naive", [0.3, 0.4])[0],
        *run_rows("ewc", [0.7, 0.8], ewc_lambda=1e6)[0],
        *run_rows("avalanche-ewc", [0.5, 0.7], ewc_lambda=10)[0],
    ]
    runs = tables.frame(records, schemas.RUNS)
    summary = printed(print_summary, width, runs)
    comparisons = printed(print_comparisons, width, statistics.paired_differences(runs))
    for text in (summary, comparisons):
        assert max(map(len, text.splitlines())) <= width
        words = " ".join(text.split())
        assert all(name in words for name in ("Naive", "Avalanche's EWC", "EWC, per sample", "1e6"))
    assert " ".join(summary.split()).count(" ± ") >= 9  # three metrics of three methods
    assert ", predicted, λ = 1e6 − Avalanche's EWC, λ = 10" in " ".join(comparisons.split())


def test_the_first_column_becomes_a_line_before_a_row_becomes_a_sentence():
    rows = [{"what": "a long first entry", "n": "3", "error": "1e-6"}] * 2
    wide, narrow, narrower = (
        printed(print_table, w, "title", rows).splitlines() for w in (40, 20, 10)
    )
    assert wide[-1] == "a long first entry  3   1e-6"
    assert narrow[2:] == ["  n  error", "a long first entry", "  3   1e-6", "  3   1e-6"]
    assert narrower[2:] == ["  n  error", "a long", "first", "entry", "  3   1e-6", "  3   1e-6"]
    sentences = printed(print_table, 9, "title", rows).splitlines()
    assert sentences[-3:] == ["  n 3,", "  error", "  1e-6"]


def test_a_search_shows_no_pages_of_differences():
    records = [*run_rows("naive", [0.3, 0.4])[0]]
    for ewc_lambda in range(1, 26):
        records += run_rows("ewc", [0.7, 0.8], ewc_lambda=ewc_lambda)[0]
    records += run_rows("avalanche-ewc", [0.5, 0.7], ewc_lambda=10)[0]

    def shown():
        runs = tables.frame(records, schemas.RUNS)
        return printed(print_comparisons, 100, statistics.paired_differences(runs))

    text = shown()
    assert "102 differences; all are in comparisons.csv" in text
    assert "λ = 25 − Avalanche's EWC" in text
    assert "− Naive" not in text
    for ewc_lambda in range(26, 51):
        records += run_rows("ewc", [0.7, 0.8], ewc_lambda=ewc_lambda)[0]
    assert len(shown().splitlines()) < 6

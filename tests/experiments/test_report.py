"""The report's page, in a real browser; tables as text; and what is said to be the best."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.reporting.cells import summary_cells
from experiments.reporting.html import page
from experiments.reporting.text_table import render, summary_table, table_of
from experiments.results import schemas, statistics, tables
from experiments.results.statistics import best_cells
from support.run_rows import run_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


def write_folder(folder, parts):
    folder.mkdir()
    records, rows = ([row for part in parts for row in part[i]] for i in (0, 1))
    runs = tables.frame(records, schemas.RUNS)
    tables.write(runs, folder, schemas.RUNS)
    tables.write(tables.frame(rows, schemas.ACCURACY), folder, schemas.ACCURACY)
    tables.write(statistics.summarise(runs), folder, schemas.SUMMARY)
    return runs


PARTS = [
    run_rows("naive", [0.50, 0.60]),
    run_rows("avalanche-ewc", [0.69, 0.78], ewc_lambda=10),
    run_rows("ewc", [0.70, 0.78], ewc_lambda=10),
    run_rows("ewc", [0.80, 0.90], ewc_lambda=100),
    run_rows("ewc", [0.0, 0.0], ewc_lambda=1e9, status="diverged"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder of two methods, three lambdas of which one diverges, and a CSV of another kind."""
    folder = tmp_path_factory.mktemp("report")
    write_folder(folder / "sweep", PARTS)
    pd.DataFrame({"word": ["b", "a & b"], "number": [10.0, np.nan]}).to_csv(
        folder / "sweep" / "other.csv", index=False
    )
    (folder / "sweep" / "environment.json").write_text('{"command": "c", "packages": {"x": "1"}}')
    out = folder / "page.html"
    assert main(["report", str(folder / "sweep"), "--out", str(out)]) == 0
    return out


DRIVER = """
<script>
const seen = {problems: []};
addEventListener("error", e => seen.problems.push(e.message));
addEventListener("securitypolicyviolation", e => seen.problems.push(e.blockedURI));
addEventListener("load", () => {
  const column = (table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
  const summary = document.querySelector("h3 ~ div table");
  const heads = [...summary.tHead.rows[0].cells];
  const i = heads.findIndex(head => head.textContent === "average accuracy");
  const button = heads[i].querySelector("button");
  button.focus();
  seen.focused = document.activeElement === button;
  seen.sorted = ["ascending", "descending"].map(direction => {
    button.click();
    return [heads[i].getAttribute("aria-sort") === direction, column(summary, i)];
  });
  seen.tables = [...document.querySelectorAll("table")].map(table => [
    table.caption.textContent, table.tBodies[0].rows.length]);
  const theme = document.getElementById("theme");
  seen.grounds = [0, 1, 2].map(() => {
    const shown = [theme.dataset.theme, getComputedStyle(document.body).backgroundColor];
    theme.click();
    return shown;
  });
  const inView = (element, box) => {
    const r = element.getBoundingClientRect();
    return r.width > 0 && r.left >= box.left - 1 && r.right <= box.right + 1;
  };
  // The difference and its interval are seen without scrolling sideways, and so is the accuracy.
  const differences = document.querySelector("section table");
  seen.cut = [[differences, 1], [summary, 1]].map(([table, column]) => {
    const box = table.closest(".scroll").getBoundingClientRect();
    return [...table.rows].filter(row => !inView(row.cells[column], box)).length;
  });
  seen.answer = document.querySelector(".answers").textContent.trim();
  // No letter of a figure lies outside of it.
  seen.outside = [...document.querySelectorAll("svg")].flatMap(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(text => {
      const r = text.getBoundingClientRect();
      const room = 0.03 * box.width;  // the page's font is not the one it was laid out in
      return r.left < box.left - room || r.right > box.right + room
        || r.top < box.top - room || r.bottom > box.bottom + room;
    }).map(text => text.textContent);
  });
  seen.width = [innerWidth, document.documentElement.scrollWidth];
  seen.pictures = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width);
  seen.ids = [...document.querySelectorAll("[id]")].map(e => e.id);
  parent.postMessage(seen, "*");
});
</script>
"""
# A frame as wide as a phone: a window can't be.
FRAME = """
<script>
addEventListener("message", e => { document.body.textContent = JSON.stringify(e.data); });
</script>
<iframe src="driven.html" style="border: 0; width: {width}px; height: 900px"></iframe>
"""


def browse(path, folder, width):
    """What the driver saw in the page, and what the browser wrote to the console."""
    text = path.read_text(encoding="utf-8").replace("</head>", DRIVER + "</head>", 1)
    (folder / "driven.html").write_text(text, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("{width}", str(width)), encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--enable-logging=stderr", "--hide-scrollbars"),
            *("--window-size=1400,950", "--virtual-time-budget=20000"),
            *(f"--user-data-dir={folder / 'profile'}", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<body>(.*)</body>", done.stdout)[1]
    seen = json.loads(html.unescape(found))
    return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_an_error(report, tmp_path, width):
    seen, console = browse(report, tmp_path, width)
    assert seen["problems"] == []
    assert console == []
    assert seen["focused"]
    accuracies = ["0.6750 ± 0.3177", "0.7675 ± 0.2859", "0.7700 ± 0.2541", "0.8250 ± 0.3177", "–"]
    down = [*accuracies[3::-1], "–"]  # what is not known stays last
    assert seen["sorted"] == [[True, accuracies], [True, down]]
    assert seen["cut"] == [0, 0]
    assert "EWC, per sample, predicted, λ = 10 can't be told from Avalanche's" in seen[
        "answer"
    ].replace("\N{NO-BREAK SPACE}", " ")
    assert seen["outside"] == []
    assert seen["tables"] == [
        ["Average accuracy: difference [95 % interval], seed by seed", 5],
        ["Forgetting: difference [95 % interval], seed by seed", 5],
        ["Mean ± 95 % interval", 5],
        ["Runs that did not end well", 2],
        ["other.csv", 2],
        ["All runs", 10],
    ]
    themes, grounds = zip(*seen["grounds"], strict=True)
    assert themes == ("auto", "light", "dark")
    assert grounds[0] == grounds[1] != grounds[2]
    assert seen["width"] == [width, width]  # nothing but tables and pictures scrolls sideways
    assert len(seen["pictures"]) == 5  # differences, accuracy, lambda, trade-off, matrices
    assert min(seen["pictures"]) > 150
    assert len(set(seen["ids"])) == len(seen["ids"])


def test_the_page_needs_no_network_and_escapes_what_it_shows(report):
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:)[\w/.:]""", text)
    assert "https:" not in text
    assert "the loss is nan &lt;script&gt;" in text
    assert "a &amp; b" in text


def test_figures_for_papers_are_written_where_they_are_asked_for(report, tmp_path):
    assert not list(report.parent.glob("*figures*"))
    arguments = ["report", str(report.with_name("sweep")), "--out", str(tmp_path / "page.html")]
    assert main([*arguments, "--figures", str(tmp_path / "figures")]) == 0
    files = sorted(p.name for p in (tmp_path / "figures").rglob("*.*"))
    stream = "split-digits-task-incremental"
    names = [f"{kind}-{stream}" for kind in ("accuracy", "lambda", "matrix", "trade-off")]
    assert files == sorted(f"{n}.{e}" for n in ("differences", *names) for e in ("png", "svg"))


def test_the_pages_summary_is_that_of_the_table(report):
    found = tables.load(report.with_name("sweep"))
    (cells,) = summary_cells(found["runs"]).values()
    summary = found["summary"].set_index(["config_hash", "metric"])
    for cell in cells:
        assert (cell.n == 0) == ((cell.config_hash, "average_accuracy") not in summary.index)
        for metric, interval in cell.intervals.items():
            row = summary.loc[cell.config_hash, metric]
            assert (row["mean"], row["n"]) == (interval["mean"], interval["n"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "`folders` must hold result tables (*.csv), got nowhere"),
        (["results/tuning", "--out", "/proc/no/page.html"], "`out` must be a file that can be"),
    ],
)
def test_bad_input_gets_a_clear_line(arguments, said, capsys):
    assert main(["report", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_page_that_is_replaced_is_said_to_be(report, tmp_path, capsys):
    arguments = ["report", str(report.with_name("sweep")), "--out", str(tmp_path / "page.html")]
    said = []
    for _ in range(2):
        assert main(arguments) == 0
        said.append(capsys.readouterr().out.splitlines()[-1].removeprefix(f"Report: {tmp_path}"))
    assert said == ["/page.html", "/page.html, in the place of the page that was there"]


def test_tables_below_a_folder_are_shown_as_well(tmp_path):
    for name in ("a.csv", "b/c/d.csv", "e/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert page._with_tables(tmp_path) == [tmp_path, tmp_path / "b" / "c"]


def frame_of(*parts):
    return tables.frame([row for part in parts for row in part[0]], schemas.RUNS)


@pytest.mark.parametrize(
    ("ours", "builtin", "first_seed", "is_best"),
    [
        ([0.60, 0.70, 0.80], [0.59, 0.69, 0.788], 0, True),  # each seed better: paired
        ([0.60, 0.70, 0.80], [0.59, 0.69, 0.788], 9, False),  # other seeds: Welch's interval
        ([0.80, 0.81, 0.82], [0.59, 0.60, 0.61], 9, True),
        ([0.60, 0.70, 0.80], [0.61, 0.69, 0.70], 0, False),
        ([0.80], [0.50], 0, False),  # one seed has no interval
    ],
)
def test_the_best_is_bold_only_where_the_interval_allows_it(ours, builtin, first_seed, is_best):
    best = run_rows("ewc", ours, ewc_lambda=1)
    other = run_rows("avalanche-ewc", builtin, ewc_lambda=1, first_seed=first_seed)
    joint = run_rows("joint", [0.99, 0.99])  # the upper bound does not compete
    expected = {best[0][0]["config_hash"]} if is_best else set()
    runs = frame_of(best, other, joint)
    assert best_cells(runs, "average_accuracy") == expected
    assert best_cells(runs, "forgetting") == expected  # R[0, 0] is the same in all
    assert best_cells(runs, "learning_accuracy") == set()


def test_a_method_alone_is_not_the_best():
    assert best_cells(frame_of(run_rows("ewc", [0.7, 0.8], ewc_lambda=1)), "forgetting") == set()


def test_the_table_in_each_notation():
    runs = frame_of(
        run_rows("ewc", [0.60, 0.70, 0.80], ewc_lambda=1e6), run_rows("naive", [0.50, 0.60, 0.70])
    )
    table = summary_table(runs)
    assert render(table, "markdown").splitlines()[2:] == [
        "| Split digits, task-incremental | Naive |  |  | 0.7000 ± 0.1242 | 0.3000 ± 0.2484 | "
        "0.8500 ± 0.0000 | 3 |",
        "| Split digits, task-incremental | EWC, per sample | predicted | 1e6 | "
        "**0.7500 ± 0.1242** | **0.2000 ± 0.2484** | 0.8500 ± 0.0000 | 3 |",
    ]
    latex = render(table, "latex")
    assert latex.splitlines() == [
        r"\begin{tabular}{lllrrrrr}",
        r"\toprule",
        r"benchmark & method & Fisher & $\lambda$ & average accuracy & forgetting & "
        r"learning accuracy & n \\",
        r"\midrule",
        r"Split digits, task-incremental & Naive &  &  & 0.7000 $\pm$ 0.1242 & "
        r"0.3000 $\pm$ 0.2484 & 0.8500 $\pm$ 0.0000 & 3 \\",
        r" & EWC, per sample & predicted & $10^{6}$ & \textbf{0.7500 $\pm$ 0.1242} & "
        r"\textbf{0.2000 $\pm$ 0.2484} & 0.8500 $\pm$ 0.0000 & 3 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert render(table, "csv").splitlines()[2].split(",")[5:7] == ["1e6", "0.7500 ± 0.1242"]


def test_the_terminal_says_the_answer_first_and_breaks_no_word(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["compare", str(report.with_name("sweep"))]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("Split digits, task-incremental: EWC, per sample, predicted, λ")
    assert max(map(len, lines)) <= 100
    words = set(printed.replace("\N{NO-BREAK SPACE}", " ").split())
    assert {"Avalanche's", "difference", "undecided", "+0.0025", "[−0.0293,", "forgetting"} <= words


def test_a_comparison_as_a_table_has_a_line_per_pair_and_metric(report):
    folder = report.with_name("sweep")
    text = render(table_of(folder, "comparisons"), "markdown").splitlines()
    assert text[0].startswith("| stream | compared | metric | difference |")
    found = statistics.paired_differences(tables.load(folder)["runs"])
    assert len(text) == 2 + len(found) == 2 + 2 * 5


def test_the_table_of_a_folder_without_it_is_refused(report):
    with pytest.raises(ValueError, match=r"`folder` must hold reproduce\.csv, got .*sweep without"):
        table_of(report.with_name("sweep"), "reproduce")

"""The report's page, in a real browser; and what is said to be the best."""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from experiments.__main__ import main
from experiments.reporting.html import page
from experiments.reporting.html.tables import summary_tables
from experiments.reporting.text_table import render, summary_table, table_of
from experiments.results import schemas, statistics, tables
from experiments.results.metrics import continual_metrics
from experiments.results.statistics import best_cells
from experiments.settings.run import RunSettings
from support.paths import RESULTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


def run_rows(method, accuracies, *, ewc_lambda=None, first_seed=0, status="ok"):
    """Runs of two experiences: R[0, 0] = 0.9, R[1, 0] as given per seed, R[1, 1] = 0.8."""
    penalty = {"ewc_lambda": ewc_lambda, "mode": "separate"} if ewc_lambda is not None else {}
    kind = {"fisher_type": "predicted"} if method == "ewc" else {}
    records, rows = [], []
    for seed, value in enumerate(accuracies, start=first_seed):
        cell = RunSettings(
            "split", "digits", "task", method, seed, n_experiences=2, **penalty, **kind
        )
        matrix = np.array([[0.5, 0.5], [0.9, 0.5], [value, 0.8]])
        ok = status == "ok"
        metrics = continual_metrics(matrix)
        seconds = {"train_s": 1.0 + seed, "fisher_s": 0.5, "eval_s": 0.25}
        records.append({
            "run_id": cell.run_id,
            "status": status,
            "reason": "" if ok else "the loss is nan <script>",
            **dataclasses.asdict(cell),
            **{name: m if ok else np.nan for name, m in metrics.items()},
            **seconds,
            "peak_rss_mb": 1.0,
            "penalty_state_mb": 0.0,
            "config_hash": cell.config_hash,
        })
        for (i, j), a in np.ndenumerate(matrix if ok else matrix[:1]):
            shared = {k: records[-1][k] for k in list(schemas.ACCURACY.columns)[:8]}
            measured = {"train_exp": i - 1, "eval_exp": j, "accuracy": a}
            rows.append({**shared, **measured, "loss": 1.0, "n_samples": 9})
    return records, rows


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
  const summary = document.querySelector("table");
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
    accuracies = ["0.6750 ± 0.3177", "0.7700 ± 0.2541", "0.8250 ± 0.3177", "–"]
    down = [*accuracies[2::-1], "–"]  # what is not known stays last
    assert seen["sorted"] == [[True, accuracies], [True, down]]
    assert seen["tables"] == [
        ["Mean ± 95 % interval", 4],
        ["Runs that did not end well", 2],
        ["other.csv", 2],
        ["All runs", 8],
    ]
    themes, grounds = zip(*seen["grounds"], strict=True)
    assert themes == ("auto", "light", "dark")
    assert grounds[0] == grounds[1] != grounds[2]
    assert seen["width"] == [width, width]  # nothing but tables and pictures scrolls sideways
    assert len(seen["pictures"]) == 4 + 3  # accuracy, lambda, trade-off, time; a matrix per cell
    assert min(seen["pictures"]) > 150
    assert len(set(seen["ids"])) == len(seen["ids"])


def test_the_page_needs_no_network_and_escapes_what_it_shows(report):
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:)[\w/.:]""", text)
    assert "https:" not in text
    assert "the loss is nan &lt;script&gt;" in text
    assert "a &amp; b" in text


def test_pictures_for_papers_lie_beside_the_page(report):
    files = sorted(p.name for p in report.with_name("page-figures").rglob("*.*"))
    kinds = ("accuracy", "lambda", "matrix", "time", "trade-off")
    assert files == [
        f"{kind}-split-digits-task-incremental.{ending}"
        for kind in kinds
        for ending in ("png", "svg")
    ]


def test_the_pages_summary_is_that_of_the_table(report):
    found = tables.load(report.with_name("sweep"))
    ((_, _, shown),) = summary_tables(found["runs"])
    means = found["summary"].set_index(["config_hash", "metric"])["mean"]
    keys = {row[3].key for row in shown.rows}
    assert keys == {""} | {repr(m) for (_, name), m in means.items() if name == "average_accuracy"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "`folders` must hold result tables (*.csv), got nowhere"),
        (["results/main", "--out", "/proc/no/page.html"], "`out` must be a file that can be"),
    ],
)
def test_bad_input_gets_a_clear_line(arguments, said, capsys):
    assert main(["report", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


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
    table = summary_table(statistics.summarise(runs), runs)
    assert render(table, "markdown").splitlines()[2:] == [
        "| split digits, task-incremental | Naive |  |  | 0.7000 ± 0.1242 | 0.3000 ± 0.2484 | "
        "0.8500 ± 0.0000 | 3 |",
        "| split digits, task-incremental | EWC, per sample | predicted | 1e+06 | "
        "**0.7500 ± 0.1242** | **0.2000 ± 0.2484** | 0.8500 ± 0.0000 | 3 |",
    ]
    latex = render(table, "latex")
    assert latex.splitlines() == [
        r"\begin{tabular}{lllrrrrr}",
        r"\toprule",
        r"benchmark & method & Fisher & $\lambda$ & average accuracy & forgetting & "
        r"learning accuracy & n \\",
        r"\midrule",
        r"split digits, task-incremental & Naive &  &  & 0.7000 $\pm$ 0.1242 & "
        r"0.3000 $\pm$ 0.2484 & 0.8500 $\pm$ 0.0000 & 3 \\",
        r" & EWC, per sample & predicted & $10^{6}$ & \textbf{0.7500 $\pm$ 0.1242} & "
        r"\textbf{0.2000 $\pm$ 0.2484} & 0.8500 $\pm$ 0.0000 & 3 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert render(table, "csv").splitlines()[2].split(",")[5:7] == ["1e+06", "0.7500 ± 0.1242"]


@pytest.mark.parametrize(
    ("folder", "of", "first"),
    [
        ("parity", "parity", "| benchmark | compared | metric |"),
        ("reproduce/baselines", "reproduce", "| experiment | arm | published |"),
    ],
)
def test_the_table_of_a_comparison_has_a_line_per_row(folder, of, first):
    folder = RESULTS / folder
    text = render(table_of(folder, of), "markdown").splitlines()
    assert text[0].startswith(first)
    found = tables.load(folder)[of]
    if of == "parity":
        found = found[found["quantity"].isin(("average_accuracy", "forgetting"))]
    assert len(text) == 2 + len(found)
    for line, row in zip(text[2:], found.itertuples(), strict=True):
        assert line.endswith(f"| {row.n} | {row.verdict if of == 'parity' else row.reproduced} |")
        if pd.notna(row.difference):
            assert f"| {row.difference:+.4f} [" in line


def test_the_table_of_a_folder_without_it_is_refused():
    with pytest.raises(ValueError, match=r"`folder` must hold reproduce\.csv, got .*main without"):
        table_of(RESULTS / "main", "reproduce")

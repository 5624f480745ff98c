"""Every figure can be read: names inside it, legends off the data, no axes collapsed."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from experiments.reporting.figures import style
from experiments.reporting.figures.accuracy import draw_curves, draw_matrices, matrices_of
from experiments.reporting.figures.over_lambda import draw_over_lambda
from experiments.reporting.figures.runs import draw_differences, draw_methods, draw_trade_off
from experiments.reporting.labels import number, without_common
from experiments.reporting.tuned import draw_tuned
from experiments.results import schemas, statistics, tables
from experiments.settings.unset import used
from support.run_rows import run_rows

TYPES = ("predicted", "empirical", "sampled", "exact", "batched")
LAMBDAS = (0.1, 1.0, 10.0, 1e3, 1e6)


def grid(n_types, n_lambdas, n_sizes=1):
    """Tables of a grid: each Fisher type at each lambda and size, beside the other methods."""
    random = np.random.default_rng(0)
    parts = [run_rows("naive", [0.5, 0.6]), run_rows("joint", [0.95, 0.96])]
    kinds = itertools.product(TYPES[:n_types], LAMBDAS[:n_lambdas], range(n_sizes))
    for i, (fisher_type, ewc_lambda, size) in enumerate(kinds):
        changes = {"fisher_type": fisher_type, "hidden_size": 100 + size, "ewc_lambda": ewc_lambda}
        status = "diverged" if i % 7 == 6 else "ok"
        parts.append(run_rows("ewc", random.uniform(0.6, 0.9, 2), status=status, **changes))
    for ewc_lambda in LAMBDAS[:n_lambdas]:
        values = random.uniform(0.6, 0.9, 2)
        parts.append(run_rows("avalanche-ewc", values, ewc_lambda=ewc_lambda))
    records, rows = ([row for part in parts for row in part[i]] for i in (0, 1))
    return tables.frame(records, schemas.RUNS), tables.frame(rows, schemas.ACCURACY)


def drawn(kind, runs, accuracy):
    title = "Split digits, task-incremental"
    if kind in ("curves", "matrices"):
        cells = matrices_of(accuracy, runs)
        return (draw_curves if kind == "curves" else draw_matrices)(cells, title)
    if kind == "differences":
        return draw_differences(statistics.paired_differences(runs))
    draw = {"lambda": draw_over_lambda, "trade-off": draw_trade_off, "methods": draw_methods}
    return draw[kind](runs, title)


def extent(text, renderer):
    """Of the words alone, without the line that leads to them."""
    return Text.get_window_extent(text, renderer)


def no_word_lies_on_another(figure):
    """Neither ticks on each other, nor a title on what is below the axes above it."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    titles = [extent(axis.title, renderer) for axis in figure.axes if axis.get_title()]
    for axis in figure.axes:
        words = [*axis.get_xticklabels(), axis.xaxis.label]
        below = [extent(text, renderer) for text in words if text.get_text()]
        for a, b in itertools.combinations([*below, *titles], 2):
            assert a is b or not a.overlaps(b)
    plt.close(figure)


KINDS = ["curves", "matrices", "lambda", "trade-off", "differences", "methods"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 5), (4, 2, 6), (5, 1, 3)], ids=str)
def test_names_lie_inside_legends_off_the_data_and_no_axes_collapse(kind, size):
    figure = drawn(kind, *grid(*size))
    if figure is None:
        none = {
            "lambda": [(1, 1), (5, 1, 3), (4, 2, 6)],
            "differences": [(1, 5), (5, 5), (4, 2, 6)],
        }
        none["methods"] = [(1, 1), (1, 5), (5, 5), (4, 2, 6)]  # few, or at several lambdas
        assert size in none[kind]
        return
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    page = figure.bbox.padded(6)  # of layouts that end at the edge
    boxes = [axis.get_window_extent(renderer) for axis in figure.axes]
    for axis, box in zip(figure.axes, boxes, strict=True):
        assert box.height > 0.04 * figure.bbox.height
        assert box.width > (0.005 if axis.get_label() == "<colorbar>" else 0.1) * figure.bbox.width
        lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
        assert len(lines) <= style.MOST_LINES
        names = [extent(text, renderer) for text in axis.texts if text.get_text()]
        for name in names:
            assert page.xmin <= name.xmin and name.xmax <= page.xmax, kind
            assert page.ymin <= name.ymin and name.ymax <= page.ymax, kind
        if kind in ("curves", "lambda"):
            for a, b in itertools.combinations(names, 2):
                assert not a.padded(-1.5).overlaps(b.padded(-1.5))
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert not any(box.overlaps(other) for other in boxes)
        assert page.xmin <= box.xmin and box.xmax <= page.xmax
    assert not any(axis.get_legend() for axis in figure.axes)
    no_word_lies_on_another(figure)


def test_a_band_never_sets_an_axis():
    assert style.limits([0.6, 0.9, float("nan")]) == pytest.approx((0.576, 0.924))
    low, high = style.limits([0.0, 1.0])
    assert -0.05 < low < 0 and 1 < high < 1.05
    assert style.limits([]) == (0, 1)


def test_a_cell_has_the_same_colour_in_every_figure():
    assert style.colour_of("ewc", "predicted") == style.METHOD_COLOURS["ewc"]
    assert style.colour_of("ewc", "exact") == style.FISHER_COLOURS["exact"]
    assert style.colour_of("avalanche-ewc", None) == style.METHOD_COLOURS["avalanche-ewc"]
    known = [c for c in {*style.METHOD_COLOURS.values(), *style.FISHER_COLOURS.values()}]
    # Of methods that a committed figure shows beside every Fisher type.
    for method in ("naive", "avalanche-ewc", "joint", "si", "replay"):
        assert style.METHOD_COLOURS[method] not in style.FISHER_COLOURS.values()
    assert set(known) <= {style.INK, *(light for light, _ in style.PALETTE.values())}


def test_lines_of_one_colour_have_shades_that_differ():
    shades = style.shades(style.METHOD_COLOURS["ewc"], 5)
    assert len(set(shades)) == 5
    assert style.shades("#123456", 1) == ["#123456"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.001, "0.001"), (1e-4, "1e-4"), (300.0, "300"), (1e6, "1e6"), (2.5e7, "2.5e7"),
     (1e10, "1e10"), (-5e4, "-5e4"), (0.25, "0.25")],
)  # fmt: skip
def test_numbers_have_one_format(value, text):
    assert number(value) == text


def test_what_names_share_is_said_once():
    labels = ["EWC, exact, λ = 1", "EWC, exact, λ = 2"]
    assert without_common(labels) == ("EWC, exact", ["λ = 1", "λ = 2"])
    assert without_common(["EWC", "EWC, online"]) == ("", ["EWC", "EWC, online"])
    assert without_common([]) == ("", [])


def test_a_figure_is_written_whole_and_in_few_bytes(tmp_path):
    figure, axis = plt.subplots()
    axis.plot([0, 1], [0, 1], color=style.METHOD_COLOURS["ewc"])
    path = style.save(figure, tmp_path / "new" / "a.png")
    with Image.open(path) as image:
        assert image.mode == "P"
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert not plt.fignum_exists(figure.number)


def test_methods_have_a_panel_per_loss_and_the_best_is_on_top():
    runs, _ = grid(5, 1, 3)
    masked = runs.assign(loss_classes="current", config_hash="m" + runs["config_hash"])
    masked = masked.assign(average_accuracy=runs["average_accuracy"] / 2)
    figure = draw_methods(pd.concat([runs, masked]), "Split digits")
    assert [axis.get_title() for axis in figure.axes] == [
        "loss over all classes",
        "loss over current classes",
    ]
    assert figure.axes[0].get_yticklabels()[0].get_text().startswith("Joint")


def test_a_saved_figure_keeps_the_colours_of_a_few_dots(tmp_path):
    figure, axis = plt.subplots(figsize=(6, 6))
    axis.imshow(np.random.default_rng(0).uniform(size=(40, 40)), cmap="gray")
    for x, (colour, _) in enumerate(style.PALETTE.values()):
        axis.plot(3 * x, 3, "o", color=colour, markersize=6)
    with Image.open(style.save(figure, tmp_path / "dots.png")) as picture:
        assert picture.mode == "P"  # a palette: a third of the size
        pixels = np.asarray(picture.convert("RGB"), dtype=int).reshape(-1, 3)
    for colour, _ in style.PALETTE.values():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(pixels - wanted).max(axis=1).min() <= 3, colour


def of_many_methods(ewc_lambda=3.162e5):
    """The rows of `runs.csv` of eight Fisher types with two losses, beside five other methods."""
    types = [*TYPES, "class_mean", "reversed", "class_mean_reversed"]
    parts, losses = [run_rows("naive", [0.3, 0.4], scenario="class")], (None, "current")
    for i, (kind, loss) in enumerate(itertools.product(types, losses)):
        values = [0.5 + i / 100, 0.52 + i / 90]
        changes = {"fisher_type": kind, "loss_classes": loss, "normalize": "mean"}
        parts.append(run_rows("ewc", values, **changes, scenario="class", ewc_lambda=ewc_lambda))
    for method, loss in itertools.product(("avalanche-ewc", "l2", "si", "mas", "lwf"), losses):
        changes = {"loss_classes": loss, "scenario": "class"}
        parts.append(run_rows(method, [0.5, 0.6], **changes, ewc_lambda=ewc_lambda))
    records, rows = ([row for part in parts for row in part[i]] for i in (0, 1))
    return tables.frame(map(used, records), schemas.RUNS), tables.frame(rows, schemas.ACCURACY)


def test_of_many_differences_those_from_the_built_in_are_shown_and_the_others_counted():
    runs, _ = of_many_methods()
    comparisons = statistics.paired_differences(runs)
    figure = draw_differences(comparisons)
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert len(names) == 2 * 8
    assert all("Avalanche's EWC" in name and "loss" in name for name in names)
    assert figure.get_suptitle().endswith(f"EWC: 16 of {len(comparisons) // 2} pairs")
    figure.draw_without_rendering()
    assert axis.get_window_extent().width > 0.25 * figure.bbox.width
    plt.close(figure)


def test_many_methods_have_panels_by_their_loss_in_their_own_colours():
    runs, accuracy = of_many_methods()
    no_word_lies_on_another(drawn("matrices", runs, accuracy))
    panels = [axis.get_title() for axis in drawn("curves", runs, accuracy).axes]
    assert len(panels) == 4
    assert sum("current classes" in plain(title) for title in panels) == 2
    more, _ = of_many_methods(1.0)
    ((_, figure),) = draw_tuned(pd.concat([runs.iloc[2:], more.iloc[2:]]))  # without Naive
    assert [plain(axis.get_title()) for axis in figure.axes] == [
        "EWC, F by its mean, loss over all classes",
        "EWC, F by its mean, loss over current classes",
        "loss over all classes",
        "loss over current classes",
    ]
    for axis in figure.axes[:2]:
        colours = {line.get_color() for line in axis.lines}
        assert colours <= set(style.FISHER_COLOURS.values())


def plain(text):
    return " ".join(text.split())

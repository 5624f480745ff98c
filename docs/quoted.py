"""The numbers and tables that the pages quote, read from the committed results.

`python docs/quoted.py` puts the tables into README.md, which is not built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import generated
import pandas as pd

from experiments.reporting.cells import interval_text
from experiments.reporting.compare import pairs_against
from experiments.reporting.comparison import difference_of, difference_text
from experiments.reporting.labels import cell_labels, method_of, number, stream_title
from experiments.reporting.text_table import SummaryTable, render, table_of
from experiments.results.statistics import chosen_lambdas, differences
from experiments.settings.run import STREAM
from experiments.studies.between_classes import BETWEEN, BY_CLASS, PER_SAMPLE, SHUFFLED
from experiments.studies.between_classes import TYPES as PART_TYPES
from experiments.studies.factorial import ALL, WORDS
from experiments.studies.factorial import TYPES as TYPES_BY_PARTS
from experiments.timing.fisher_engines import OURS, UNIT
from experiments.timing.fisher_speed import KINDS, WRONG
from experiments.timing.sweep_speed import OURS_CLASSIC, PLAIN

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
README_TABLE = re.compile(r"(<!-- table:(\S+) columns: (.+) -->\n)(?:.*?)(<!-- end -->)", re.DOTALL)
TYPES = ["predicted", "empirical", "sampled", "exact"]
NETWORKS = {
    "mlp-512": "MLP 784-512-10",
    "mlp-2000": "MLP 784-2000-2000-10",
    "simple-cnn": "SimpleCNN",
    "resnet-18": "ResNet-18",
    "transformer": "Transformer",
    "bert": "BERT",
    "gpt2": "GPT-2",
    "vit": "ViT",
    "lstm": "LSTM",
    "gru": "GRU",
}


def of_page(name: str) -> dict[str, Any]:
    """What the page of this name may quote, by the names that it uses."""
    return PAGES[name]() if name in PAGES else {}


def with_tables(text: str) -> str:
    """Put the committed results' tables into a document.

    Args:
        text: Has comments `<!-- table:FOLDER columns: A, B -->` and `<!-- end -->`.

    Returns:
        The same with the folder's table between each two comments.
    """

    def filled(match: re.Match[str]) -> str:
        table, columns = table_of(ROOT / match[2], "summary"), match[3].split(", ")
        shown = SummaryTable(table.text[columns], table.best[columns])
        return f"{match[1]}{render(shown, 'markdown').strip()}\n{match[4]}"

    return README_TABLE.sub(filled, text)


def _results() -> dict[str, Any]:
    def shown(folder: str, of: str) -> str:
        return render(table_of(RESULTS / folder, of), "markdown")

    return {
        "main_table": shown("main", "summary"),
        "parity_table": shown("parity", "comparisons"),
        "kirkpatrick_table": shown("reproduce/kirkpatrick2017", "reproduce"),
        **_kirkpatrick_search(),
        "vandeven2022_table": shown("reproduce/vandeven2022", "reproduce"),
        "baselines_table": shown("reproduce/baselines", "reproduce"),
    }


def _choose_fisher() -> dict[str, Any]:
    traces = _csv("lambda_translation/lambda_translation")
    tanh = _identities("tanh network")
    return {
        **_modes(),
        "trace_table": _markdown(_by_benchmark(traces, "trace_of_exact", "{:.2g}")),
        "n_networks": traces["seed"].nunique(),
        "speed_table": _markdown(_speeds()),
        "fitted_loss": f"{tanh.loc['predicted', 'loss']:.2g}",
        "fitted_share": f"1/{1 / tanh.loc['predicted', 'mean_square_of_own']:.0f}",
        "sampled_low": f"{_end('tanh network', 'sampled')['mean_square_of_own'].min():.2g}",
        "sampled_high": f"{_end('tanh network', 'sampled')['mean_square_of_own'].max():.2g}",
    }


def _modes() -> dict[str, str]:
    """One quadratic for all experiences less one for each, by scenario."""
    runs = _csv("reproduce/vandeven2022/runs")
    ours = runs[(runs["method"] == "ewc") & (runs["pixels"] == "unit")]
    cells = ours.drop_duplicates("config_hash").set_index(["scenario", "mode"])["config_hash"]
    pairs = [(cells[s, "online"], cells[s, "separate"]) for s in ("task", "domain", "class")]
    rows = differences(runs, pairs)
    rows = rows[rows["metric"] == "average_accuracy"]
    return {f"online_{row['scenario']}": difference_of(row) for row in rows.to_dict("records")}


def _class_incremental() -> dict[str, Any]:
    summary = _csv("class_incremental/summary")
    rows = summary[summary["metric"] == "average_accuracy"]
    methods = rows.assign(normalize=None).to_dict("records")  # the same for all of ours
    names = {False: "loss over all classes", True: "loss over the current classes"}
    text = pd.DataFrame({
        "method": [method_of(row, with_type=True) for row in methods],
        "loss": (rows["loss_classes"] == "current").map(names),
        "mean": rows["mean"],
        "shown": [interval_text(r.mean, r.ci_high) for r in rows.itertuples()],
    })
    best_first = text.sort_values("mean", ascending=False)["method"].drop_duplicates()
    table = text.pivot(index="method", columns="loss", values="shown").loc[best_first]
    tuned = _csv("class_incremental/search/tuned").sort_values("mean", ascending=False)
    search = pd.DataFrame({
        "head": tuned["head"],
        "units": tuned["hidden_size"],
        "learning rate": tuned["learning_rate"].map(number),
        "λ": tuned["ewc_lambda"].map(number),
        "accuracy": [interval_text(r.mean, r.ci_high) for r in tuned.itertuples()],
    })
    return {
        "n": rows["n"].min(),
        "class_mean_all": _less_avalanche("class_incremental", "class_mean", "all"),
        "class_mean_current": _less_avalanche("class_incremental", "class_mean", "current"),
        "predicted_current": _less_avalanche("class_incremental", "predicted", "current"),
        "table": _markdown(table[[names[True], names[False]]].fillna("–").reset_index()),
        "search": _markdown(search.astype(str)),
    }


def _less_avalanche(folder: str, fisher_type: str, loss: str, benchmark: str = "split") -> str:
    """Average accuracy of ours less that of Avalanche's EWC: `+0.0123 [+0.0100, +0.0146]`."""
    pairs = _csv(f"{folder}/comparisons").query(
        "method == 'ewc' and other_method == 'avalanche-ewc' and metric == 'average_accuracy'"
        f" and fisher_type == '{fisher_type}' and loss_classes == '{loss}'"
        f" and benchmark == '{benchmark}'"
    )
    (row,) = pairs.to_dict("records")
    return difference_of(row)


def _factorial() -> dict[str, Any]:
    effects, summary = _csv("factorial/effects"), _csv("factorial/summary")
    is_main = (effects["given_factor"] == ALL) & (effects["factor"] != "loss_classes")
    main = effects[is_main].to_dict("records")
    of_accuracy = summary[summary["metric"] == "average_accuracy"].to_dict("records")
    differences = pd.DataFrame({
        "effect": [WORDS[row["factor"], row["level"]] for row in main],
        "stream": [_stream_and_loss(row) for row in main],
        "shown": [difference_of(r) for r in main],
    })
    cells = pd.DataFrame({
        "logits reversed": [TYPES_BY_PARTS[row["fisher_type"]][0] for row in of_accuracy],
        "squares of": [TYPES_BY_PARTS[row["fisher_type"]][1] for row in of_accuracy],
        "F by its mean": ["yes" if row["normalize"] == "mean" else "no" for row in of_accuracy],
        "stream": [_stream_and_loss(row) for row in of_accuracy],
        "shown": [interval_text(row["mean"], row["ci_high"]) for row in of_accuracy],
    })
    parts = ["logits reversed", "squares of", "F by its mean"]
    wide = {
        name: table.pivot_table("shown", index, "stream", "first", sort=False)
        for name, table, index in (("effects", differences, "effect"), ("cells", cells, parts))
    }
    key = ["scenario", "loss_classes", "factor", "level", "given_factor", "given_level"]
    split = effects[effects["benchmark"] == "split"].set_index(key)
    found = split[["difference", "ci_low", "ci_high"]].to_dict("index")
    over_all, of_loss = ("class", "all"), ("class", "all and current", "loss_classes", "current")
    quoted = {  # effects, most of them at a level of another part
        "reversed_as_it_is": (*over_all, "reversed", "yes", "normalize", "none"),
        "reversed_by_mean": (*over_all, "reversed", "yes", "normalize", "mean"),
        "mean_not_reversed": (*over_all, "normalize", "mean", "reversed", "no"),
        "mean_reversed": (*over_all, "normalize", "mean", "reversed", "yes"),
        "mean_of_samples": (*over_all, "normalize", "mean", "squared", "samples"),
        "mean_of_class_means": (*over_all, "normalize", "mean", "squared", "class means"),
        "batches_by_mean": ("domain", "all", "normalize", "mean", "squared", "mini-batches"),
        "current": (*of_loss, ALL, ALL),
        "current_reversed": (*of_loss, "reversed", "yes"),
        "current_not_reversed": (*of_loss, "reversed", "no"),
    }
    return {
        "n": int(effects["n"].min()),
        **{name: difference_text(*found[row].values()) for name, row in quoted.items()},
        **{name: _markdown(table.fillna("–").reset_index()) for name, table in wide.items()},
    }


def _many_tasks() -> dict[str, Any]:
    """Ten permutations: every arm, and what each task keeps."""
    runs, accuracy, summary = (_csv(f"ten_tasks/{n}") for n in ("runs", "accuracy", "summary"))
    arms = summary[summary["metric"] == "average_accuracy"]
    arms = arms.sort_values("mean", ascending=False).set_index("config_hash", drop=False)
    names = cell_labels(arms, with_type=True)
    against = {
        order: differences(runs, pairs_against(runs, f"avalanche-ewc,importance_order={order}"))
        .query("metric == 'average_accuracy'")
        .set_index("config_hash")
        for order in ("dataset", "shuffled")
    }

    def less(cell: str, order: str = "dataset") -> str:
        if cell not in against[order].index:
            return "–"
        return difference_of(against[order].loc[cell])

    table = pd.DataFrame({
        "method": [names[cell] for cell in arms.index],
        "average accuracy": [interval_text(row.mean, row.ci_high) for row in arms.itertuples()],
        "less Avalanche's EWC": [less(cell) for cell in arms.index],
    })
    last = accuracy[accuracy["train_exp"] == accuracy["train_exp"].max()]
    last = last.merge(runs[["run_id", "config_hash"]], on="run_id")
    shown = arms.index[arms["method"].isin(["ewc", "avalanche-ewc", "naive"])]
    kept = last.pivot_table("accuracy", "config_hash", "eval_exp").loc[shown]
    kept = kept.map(lambda value: f"{value:.3f}")
    kept.columns = [f"task {task + 1}" for task in kept.columns]
    kept.insert(0, "method", [names[cell] for cell in kept.index])
    return {
        "n_ten": int(arms["n"].min()),
        "arms": _markdown(table),
        "kept": _markdown(kept),
        "order": less(arms.index[arms["importance_order"] == "dataset"][0], "shuffled"),
        **{
            f"{row.fisher_type}_less": less(row.config_hash)
            for row in arms.itertuples()
            if row.fisher_type in ("predicted", "empirical", "class_mean")
        },
        **_parts(),
    }


def _parts() -> dict[str, Any]:
    """Traces of the Fisher's parts by task."""
    table = _csv("between_classes/between_classes")
    predicted, of_data = _traces(table)
    fashion, _ = _traces(_csv("between_classes/fashion/between_classes"))
    permuted, data = (t.loc["permuted"].droplevel(STREAM[1:]) for t in (predicted, of_data))
    grown, by_class = permuted.loc[PER_SAMPLE], data.loc[BY_CLASS]
    to_between, to_shuffled = by_class / data.loc[BETWEEN], by_class / data.loc[SHUFFLED]
    shown = pd.concat([permuted, data.loc[[BY_CLASS, SHUFFLED]]]).map("{:.2g}".format)
    shown.columns = [f"task {task + 1}" for task in shown.columns]

    def percent(benchmark: str, traces: pd.DataFrame) -> str:
        between, whole = (traces.xs(part, level="part") for part in (BETWEEN, PER_SAMPLE))
        share = (100 * between / whole).loc[benchmark]
        return f"{share.min(axis=None):.1f} to {share.max(axis=None):.0f} %"

    return {
        "traces": _markdown(shown.reset_index()),
        "n_traces": table["seed"].nunique(),
        "permuted_share": percent("permuted", predicted),
        "split_share": percent("split", predicted),
        "permuted_fashion_share": percent("permuted", fashion),
        "split_fashion_share": percent("split", fashion),
        "growth": f"{grown.iloc[-1] / grown.iloc[0]:.1f}",
        "first_to_tenth": f"{grown.iloc[0]:.0f} to {grown.iloc[-1]:.0f}",
        "sorted_to_between": f"{to_between.min():.2f} to {to_between.max():.2f}",
        "sorted_to_shuffled": f"{to_shuffled.min():.0f} to {to_shuffled.max():.0f}",
    }


def _traces(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Means over the networks by task, of the parts with predicted labels and with the data's."""
    cell = [*STREAM, "labels", "part", "experience"]
    traces = table.groupby(cell, sort=False)["trace"].mean().unstack()
    return (traces.xs(labels, level="labels") for labels in PART_TYPES)


def _stream_and_loss(row: dict[str, Any]) -> str:
    stream = stream_title(row["benchmark"], row["dataset"], row["scenario"])
    return f"{stream}, {row['loss_classes']} classes" if row["scenario"] == "class" else stream


def _choose_lambda() -> dict[str, Any]:
    traces = _csv("lambda_translation/lambda_translation")
    normalised = _csv("normalized_lambda/normalized_lambda")
    return {
        "same_strength": _markdown(_by_benchmark(traces, "same_strength_lambda", "{:.3g}")),
        "n_networks": traces["seed"].nunique(),
        "normalised": _markdown(_normalised(normalised)),
        "n_normalised": normalised["n"].max(),
        "chosen": _markdown(_chosen()),
        **_drop_in(),
    }


def _drop_in() -> dict[str, Any]:
    """`DiagonalEWC` at the lambda of Avalanche's EWC, over streams and mini-batches."""
    pairs = _csv("drop_in/comparisons").query(
        "metric == 'average_accuracy' and other_method == 'avalanche-ewc'"
    )
    cell = ["benchmark", "dataset", "scenario", "n_experiences", "batch_size"]
    rows = []
    for (benchmark, dataset, scenario, n, batch_size), both in pairs.groupby(cell):
        of_type = both.set_index("fisher_type").to_dict("index")
        first = of_type["predicted"]
        rows.append({
            "stream": f"{stream_title(benchmark, dataset, scenario)}, {n} tasks",
            "mini-batch": str(batch_size),
            "λ": number(first["ewc_lambda"]),
            "Avalanche's EWC": f"{first['other_mean']:.4f}",
            "`DiagonalEWC` less it": difference_of(first),
            **{
                f'with `"{name}"`': difference_of(of_type[name])
                for name in ("class_mean", "class_mean_empirical")
            },
        })
    return {"drop_in": _markdown(pd.DataFrame(rows)), "n_drop_in": int(pairs["n"].min())}


def _implicit_step() -> dict[str, Any]:
    implicit = _csv("implicit_step/runs")
    sgd = implicit[(implicit["optimizer"] == "sgd") & (implicit["penalty_step"] == "gradient")]
    adam = implicit[implicit["optimizer"] == "adam"]
    diverged = sgd.loc[sgd["status"] == "diverged", "ewc_lambda"]
    steady = implicit[(implicit["optimizer"] == "sgd") & (implicit["penalty_step"] == "implicit")]
    return {
        "diverged_from": f"{diverged.min():g}",
        "n_diverged": len(diverged),
        "n_explicit": len(sgd),
        "adam_explicit": f"{_best_lambda(adam[adam['penalty_step'] == 'gradient']):g}",
        "adam_implicit": f"{_best_lambda(adam[adam['penalty_step'] == 'implicit']):g}",
        "implicit_to": f"{steady['ewc_lambda'].max():g}",
        "n_implicit": len(steady),
        "n_implicit_ok": int((steady["status"] == "ok").sum()),
    }


def _tables() -> dict[str, Any]:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    return {"schemas": generated.schema_tables(), "dictionary": text.split("\n", 1)[1]}


def _command_line() -> dict[str, Any]:
    return {"command_line": generated.command_line()}


def _fisher() -> dict[str, Any]:
    table = _csv("identities/identities")
    own = table[table["labels"] == "own"]
    differences = ["variance_difference", "curvature_difference"]
    start = table[(table["step"] == 0) & (table["labels"] == "predicted")]
    tanh = _identities("tanh network")
    network = table[(table["problem"] == "tanh network") & (table["labels"] == "predicted")]
    curvature = network.groupby("step")["curvature_of_own"].mean()
    return {
        "n_seeds": table["seed"].nunique(),
        "steps": f"{table['step'].max():,}",
        "own_squared_mean": f"{own['squared_mean_share'].max():.0e}",
        "own_difference": f"{own[differences].max(axis=None):.0e}",
        "mean_share_start": f"{start['squared_mean_share'].mean():.0%}",
        "mean_share_end": f"{tanh.loc['predicted', 'squared_mean_share']:.2%}",
        "tanh_accuracy": f"{tanh.loc['predicted', 'accuracy']:.0%}",
        "square_predicted": f"{tanh.loc['predicted', 'mean_square_of_own']:.2%}",
        "times_smaller": f"{1 / tanh.loc['predicted', 'mean_square_of_own']:.0f}",
        "square_cosine": f"{tanh.loc['predicted', 'cosine_with_own']:.2f}",
        "logistic_accuracy": f"{_identities('logistic regression').loc['own', 'accuracy']:.1%}",
        "logistic_predicted": _share("logistic regression", "predicted"),
        "logistic_empirical": _share("logistic regression", "empirical"),
        "curvature_peak": f"{curvature.max():.2f}",
        "curvature_peak_step": int(curvature.idxmax()),
        "curvature_true": f"{tanh.loc['empirical', 'curvature_of_own']:.2f}",
        "square_true": f"{tanh.loc['empirical', 'mean_square_of_own']:.2%}",
    }


def _laplace() -> dict[str, Any]:
    return _posteriors() | _demonstration()


def _posteriors() -> dict[str, Any]:
    table = _csv("laplace/laplace")
    found: dict[str, Any] = {
        "n_draws": table["seed"].nunique(),
        "small": table["n"].min(),
        "large": table["n"].max(),
    }
    names = {"full": "full", "diagonal, exact": "exact", "none": "none"}
    for problem, rows in table.groupby("problem"):
        short = str(problem).split()[0].split("-")[0]  # logistic, two
        at_bayes = rows[rows["factor"].isin([0.0, 1.0])]
        middle = at_bayes.groupby(["n", "quadratic"])[["excess_nats", "total_variation"]].median()
        for quadratic, name in names.items():
            found[f"{short}_{name}_nats"] = f"{middle.loc[(100, quadratic), 'excess_nats']:.2g}"
        for size in ("small", "large"):
            variation = middle.loc[(found[size], "full"), "total_variation"]
            found[f"{short}_variation_{size}"] = f"{variation:.2g}"
        factor = rows[(rows["n"] == 100) & (rows["quadratic"] == "diagonal, exact")]
        best = factor.groupby("factor")["excess_nats"].median()
        found[f"{short}_best_factor"] = f"{best.idxmin():.2g}"
        found[f"{short}_best_nats"] = f"{best.min():.2g}"
    return found


def _demonstration() -> dict[str, Any]:
    curves, fisher = _csv("demonstration/curves"), _csv("demonstration/fisher")
    last = curves[curves["epoch"] == curves["epoch"].max()]
    accuracy = last.groupby(["method", "eval_task"])["accuracy"]
    labels = {"sgd": "plain SGD", "ewc": "EWC", "ewc-renewed": "EWC, anchor renewed every epoch"}
    rows = []
    for method, label in labels.items():
        row = {"method": label}
        for task in sorted(last["eval_task"].unique()):
            values = accuracy.get_group((method, task))
            spread = f" ({values.min():.3f}-{values.max():.3f})" if len(values) > 1 else ""
            row[f"task {task + 1}"] = f"{values.mean():.3f}{spread}"
        rows.append(row)
    return {
        "demonstration_table": _markdown(pd.DataFrame(rows)),
        "demonstration_seeds": "one seed"
        if last["seed"].nunique() == 1
        else f"mean and range of {last['seed'].nunique()} seeds",
        "loop_ratio_low": f"{fisher['ratio'].min():.0f}",
        "loop_ratio_high": f"{fisher['ratio'].max():.0f}",
        "loop_difference": f"{fisher['largest_difference'].max():.0e}",
    }


def _best_lambda(runs: pd.DataFrame) -> float:
    return float(runs.groupby("ewc_lambda")["average_accuracy"].mean().idxmax())


def _chosen() -> pd.DataFrame:
    rows = []
    for folder in ("tuning", "tuning_digits"):
        for row in chosen_lambdas(_csv(f"{folder}/summary")).itertuples():
            rows.append({
                "stream": f"{row.benchmark} {row.dataset}, {row.scenario}-incremental",
                "method": row.method,
                "λ": f"{row.ewc_lambda:g}",
                "validation accuracy": f"{row.mean:.4f}",
            })
    return pd.DataFrame(rows)


def _normalised(table: pd.DataFrame) -> pd.DataFrame:
    """A row per lambda, a column per benchmark and labels, F divided by its mean."""
    table = table[table["normalize"] == "mean"]
    rows = []
    for ewc_lambda, part in table.groupby("ewc_lambda"):
        cells = part.set_index(part["benchmark"] + " MNIST, " + part["fisher_type"])
        shown = {n: interval_text(c["mean"], c["ci_high"]) for n, c in cells.iterrows()}
        rows.append({"λ": number(ewc_lambda)} | shown)
    return pd.DataFrame(rows)


def _by_benchmark(table: pd.DataFrame, column: str, form: str) -> pd.DataFrame:
    """Smallest and largest value over the seeds, a row per Fisher, a column per benchmark."""
    grouped = table.groupby(["fisher", "benchmark"])[column]
    low, high = grouped.min(), grouped.max()
    rows = []
    for fisher in ["avalanche", *TYPES]:
        row = {"Fisher": "Avalanche's, batch of 128" if fisher == "avalanche" else fisher}
        for benchmark in ("permuted", "split"):
            ends = [form.format(end[fisher, benchmark]) for end in (low, high)]
            row[f"{benchmark} MNIST"] = " to ".join(dict.fromkeys(ends))
        rows.append(row)
    return pd.DataFrame(rows)


def _speeds() -> pd.DataFrame:
    """Ours, the fastest exact engine of all others, and the sample loop, on each network."""
    table = _csv("fisher_speed/fisher_speed")
    table = table[(table["device"] == "cpu") & (table["status"] == "ok")]
    rows = []
    for (network, kind), part in table.groupby(["network", "kind"], sort=False):
        by_engine = part.set_index("engine")
        others = by_engine.drop(index=[UNIT, OURS])["multiple_of_gradient_pass"]
        fastest = str(others.idxmin())
        rows.append({
            "network": NETWORKS.get(network, network),
            "labels": kind,
            "this package": _multiple(by_engine.loc[OURS]),
            "fastest other": f"{_multiple(by_engine.loc[fastest])}, {fastest}",
            "sample loop": f"{others['sample loop']:.3g}",
        })
    return pd.DataFrame(rows)


def _penalty() -> dict[str, Any]:
    """A training step with a penalty as a multiple of one without, a column per method."""
    table = _csv("penalty_speed/penalty_speed")
    networks = {
        "cnn": "SimpleCNN",
        "mlp-512": NETWORKS["mlp-512"],
        "mlp-2x2000": NETWORKS["mlp-2000"],
    }
    table = table.assign(network=table["model"].map(networks))
    cell = ["network", "batch_size", "past_experiences"]
    ratios = table.pivot_table("ratio", cell, "method", sort=False)[list(_STEPS)]
    shown = ratios.map("{:.2f}".format).replace("nan", "–").rename(columns=_STEPS)
    names = {"batch_size": "mini-batch", "past_experiences": "tasks"}
    steps = shown.reset_index().rename(columns=names).astype(str)
    mlps = table[table["model"] != "cnn"].groupby("method")["of_kernel"].agg(["min", "max"])
    of_kernel = (mlps["min"].map("{:.2f}".format) + mlps["max"].map(" to {:.2f}".format)).to_dict()
    ours = table[table["method"] == "in the gradient"]
    return {
        "steps": _markdown(steps),
        "of_kernel": of_kernel["in the gradient"],
        "calls_alone": of_kernel["the plugin's calls alone"],
        "penalty_rounds": f"{ours['rounds'].min()} to {ours['rounds'].max()}",
    }


_STEPS = {
    "in the gradient": "this plugin",
    "the plugin's calls alone": "its calls alone",
    "in the loss": "in the loss",
    "implicit step": "implicit step",
    "one compiled kernel": "one kernel",
    "one compiled kernel, with the value": "with the value",
    "Avalanche": "Avalanche's",
}


def _choose_engine() -> dict[str, Any]:
    table = _csv("fisher_speed/fisher_speed")
    table = table[table["device"] == "cpu"]
    versions = table.dropna(subset="version").groupby("engine", sort=False)["version"].first()
    return {
        **{kind: _markdown(_engines(table[table["kind"] == kind])) for kind in KINDS},
        "rounds": table["rounds"].max(),
        "wrong": f"{WRONG:.0%}".replace("%", " %"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _engines(table: pd.DataFrame) -> pd.DataFrame:
    """A row per engine, a column per network; a verdict where there is no right value."""
    rows: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        multiple = f"{row['multiple_of_gradient_pass']:.3g}"
        words = {"ok": multiple, "approximation": f"{multiple}, not exact", "failed": "fails"}
        words |= {"wrong values": "wrong values"}
        name = "this package" if row["engine"] == OURS else row["engine"]
        entry = words.get(row["status"], "–")
        rows.setdefault(name, {})[NETWORKS.get(row["network"], row["network"])] = entry
    offered = {name: cells for name, cells in rows.items() if set(cells.values()) != {"–"}}
    ours = {"this package": offered.pop("this package")}
    offered.pop(UNIT)
    return pd.DataFrame([{"engine": name, **cells} for name, cells in (ours | offered).items()])


def _multiple(row: pd.Series) -> str:
    middle, low, high = row["multiple_of_gradient_pass"], row["multiple_q1"], row["multiple_q3"]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _end(problem: str, labels: str) -> pd.DataFrame:
    table = _csv("identities/identities")
    end = table["step"] == table["step"].max()
    return table[end & (table["problem"] == problem) & (table["labels"] == labels)]


def _identities(problem: str) -> pd.DataFrame:
    """Means over the seeds at the end of training, a row per kind of labels."""
    table = _csv("identities/identities")
    end = table[(table["step"] == table["step"].max()) & (table["problem"] == problem)]
    return end.drop(columns="problem").groupby("labels").mean(numeric_only=True)


def _share(problem: str, labels: str) -> str:
    return f"{_identities(problem).loc[labels, 'mean_square_of_own']:.0%}"


def _kirkpatrick_search() -> dict[str, str]:
    """The best of our candidates with and without dropout and pixels in [0, 1]."""
    runs = _csv("reproduce/kirkpatrick2017/search/runs")
    ours = runs[runs["method"] == "ewc"]
    best = ours["average_accuracy"].groupby([ours["dropout"] > 0, ours["pixels"] == "unit"]).max()
    names = {"neither": (False, False), "dropout_alone": (True, False)}
    names |= {"pixels_alone": (False, True), "both": (True, True)}
    return {f"kirkpatrick_{name}": f"{best[key]:.3f}" for name, key in names.items()}


@cache
def _benchmarks() -> dict[str, Any]:
    ratio = _csv("sweep_speed/sweep_speed").set_index("run")["ratio"]
    return {"classic": f"{ratio[OURS_CLASSIC]:.1f}", "of_plain": f"{1 / ratio[PLAIN]:.2f}"}


def _avalanche_threads() -> dict[str, Any]:
    rows = pd.concat([_csv(f"reproduce/{n}/reproduce") for n in ("baselines", "kirkpatrick2017")])
    named = rows.set_index(["protocol", "arm"])
    ewc = named.loc[("baselines", "Avalanche's EWC, λ = 1")]
    attained = named.loc[("kirkpatrick2017", "Avalanche's EWC, online")]
    return {
        "baselines_naive": f"{named.loc[('baselines', 'Naive'), 'mean']:.3f}",
        "baselines_ewc": f"{ewc['mean']:.3f}",
        "kirkpatrick_avalanche": f"{attained['mean']:.3f}",
        "kirkpatrick_n": int(attained["n"]),
    }


def _csv(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"{name}.csv")


def _markdown(table: pd.DataFrame) -> str:
    plain = pd.DataFrame(False, index=table.index, columns=table.columns)
    return render(SummaryTable(table, plain), "markdown")


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "avalanche-threads": _avalanche_threads,
    "benchmarks": _benchmarks,
    "results": _results,
    "choose-fisher": _choose_fisher,
    "choose-lambda": _choose_lambda,
    "class-incremental": _class_incremental,
    "importance": _factorial,
    "many-tasks": _many_tasks,
    "choose-engine": _choose_engine,
    "fisher": _fisher,
    "laplace": _laplace,
    "penalty": _penalty,
    "implicit-step": _implicit_step,
    "tables": _tables,
    "command-line": _command_line,
}

if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")

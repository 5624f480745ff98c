"""Write the committed tables of older columns in those of today; for one commit, then deleted."""

import json
import re
from pathlib import Path

import pandas as pd

from experiments.results import schemas, statistics, tables
from experiments.results.files import replace_file
from experiments.settings.run import RunSettings
from experiments.studies.reproduce.protocol import PROTOCOLS, load_protocol
from experiments.studies.reproduce.table import arms_table
from experiments.timing.fisher_speed import FISHER_SPEED

HERE = Path(__file__).parent
RUN = re.compile(
    r"(?P<mode>\w+), (?P<optimizer>\w+) (?P<learning_rate>[\d.e-]+)(?:, dropout (?P<dropout>[\d.]+))?, "
    r"(?P<hidden_layers>\d+)x(?P<hidden_size>\d+), batch (?P<batch_size>\d+), "
    r"λ = (?P<ewc_lambda>[\d.e+]+), (?P<dtype>float\d+)"
)
WHAT = {
    "importances after every experience": ("importances after every experience", "experiences"),
    "penalty at every step": ("penalty at every step", "steps"),
    "weights at the end": ("weights at the end", "weights"),
    "largest relative difference of the value in any step": (
        "penalty's value at the same weights",
        "steps",
    ),
    "largest relative difference of the gradient in any step": (
        "penalty's gradient at the same weights",
        "steps",
    ),
    "sum of importances; largest relative difference": ("importances", "samples"),
}


def check(row, base):
    text, (what, size_of) = row["check"], WHAT[row["quantity"]]
    fields = {k: row[k] for k in ("benchmark", "dataset", "scenario")}
    found = {**base, **fields, "what": what, "size": row["n"], "size_of": size_of}
    found |= {"ours": row["ours"], "other": row["builtin"]}
    found |= {"largest_relative_error": row["difference"], "tolerance": row["tolerance"]}
    found |= {"verdict": row["verdict"], "against": "built-in", "scope": "one network"}
    found["fisher_type"] = re.search(r"batched|empirical|predicted", text)[0]
    found["dtype"] = re.search(r"float\d+", text)[0]
    if match := RUN.search(text):
        words = match.groupdict()
        found |= {k: words[k] for k in ("mode", "optimizer", "dtype")}
        found |= {k: float(words[k] or 0) for k in ("learning_rate", "dropout", "ewc_lambda")}
        found |= {k: int(words[k]) for k in ("hidden_layers", "hidden_size", "batch_size")}
        found |= {"scope": "whole run", "decay_factor": 0.9 if words["mode"] == "online" else None}
        found["penalty"] = "folded" if "folded" in text else "in the built-in's order"
        found["epochs"] = 3 if row["dataset"] == "digits" else 1
        if "importances at batch 1" in text:
            found["importance_batch"] = 1
    elif batch := re.search(r"built-in at batch (\d+)", text):
        found["importance_batch"] = int(batch[1])
    elif "sample loop" in text:
        found["against"] = "sample loop"
    else:
        found["against"] = "empirical, where every prediction is right"
    return found


def settings(**fields):
    return {k: v for k, v in vars(RunSettings(**fields)).items() if k in schemas.CHECKS.columns}


def base_of_network(runs, row):
    like = runs[(runs["benchmark"] == row["benchmark"]) & (runs["method"] == "ewc")].iloc[0]
    return {k: like[k] for k in schemas.CHECKS.columns if k in like}


def main():
    for file in HERE.rglob("runs.csv"):
        runs = tables.read(file.parent, schemas.RUNS)
        tables.write(statistics.summarise(runs), file.parent, schemas.SUMMARY)
    main_runs = tables.read(HERE / "main", schemas.RUNS)
    old = pd.read_csv(HERE / "main" / "parity.csv")
    old = old[old["check"].str.startswith("importances")].to_dict("records")
    rows = [check(row, base_of_network(main_runs, row)) for row in old]
    tables.write_rows(rows, HERE / "main", schemas.CHECKS)
    looked_at = settings(benchmark="split", dataset="mnist", scenario="domain", method="naive",
                         seed=0, hidden_size=64)  # fmt: skip
    rows = []
    from experiments.studies.parity.numerical import checks

    for name in checks(type("S", (), {"name": "mnist"})(), hidden_size=100, seed=0):
        file = HERE / "parity" / "numerical" / f"{name}.json"
        part = json.loads(file.read_text(encoding="utf-8"))
        if "check" in part[0]:
            part = [check(row, looked_at) for row in part]
            part = tables.frame(part, schemas.CHECKS).to_dict("records")
            part = [{k: None if pd.isna(v) else v for k, v in row.items()} for row in part]
            replace_file(file, json.dumps(part))
        rows += part
    tables.write_rows(rows, HERE / "parity", schemas.CHECKS)
    for name in ("main", "parity"):
        runs = tables.read(HERE / name, schemas.RUNS)
        tables.write(statistics.paired_differences(runs), HERE / name, schemas.COMPARISONS)
        (HERE / name / "parity.csv").unlink(missing_ok=True)
    for name in PROTOCOLS:
        folder = HERE / "reproduce" / name
        table = arms_table(load_protocol(name), tables.read(folder, schemas.RUNS))
        tables.write(table, folder, schemas.REPRODUCE)
    file = HERE / "fisher_speed" / "fisher_speed.csv"
    new = {"multiple": "multiple_of_gradient_pass"}
    new |= {"error": "relative_error", "error_float64": "relative_error_float64"}
    table = pd.read_csv(file, dtype={"version": str}, float_precision="round_trip")
    table = table.rename(columns=new)[list(FISHER_SPEED.columns)]
    tables.write(tables.check(table, FISHER_SPEED), file.parent, FISHER_SPEED)


if __name__ == "__main__":
    main()

"""Rows of `runs.csv` and `accuracy.csv` with made-up accuracies."""

import dataclasses

import numpy as np

from experiments.results import schemas
from experiments.results.metrics import continual_metrics
from experiments.settings.run import RunSettings


def run_rows(
    method, accuracies, *, ewc_lambda=None, first_seed=0, status="ok", scenario="task", **changes
):
    """Runs of two experiences: R[0, 0] = 0.9, R[1, 0] as given per seed, R[1, 1] = 0.8."""
    penalty = {"ewc_lambda": ewc_lambda, "mode": "separate"} if ewc_lambda is not None else {}
    kind = {"fisher_type": "predicted"} if method == "ewc" else {}
    fields = {"n_experiences": 2, **penalty, **kind, **changes}
    records, rows = [], []
    for seed, value in enumerate(accuracies, start=first_seed):
        cell = RunSettings("split", "digits", scenario, method, seed, **fields)
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

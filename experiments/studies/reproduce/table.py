"""Build `reproduce.csv`: our result beside the published number, for each arm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.results import schemas, statistics, tables
from experiments.results.provenance import provenance_of
from experiments.studies.reproduce.protocol import Arm, Protocol

METRIC = "average_accuracy"


def arms_table(protocol: Protocol, runs: pd.DataFrame) -> pd.DataFrame:
    """One row per arm: ours beside the published number, and beside another arm seed by seed."""
    by_arm = {arm.label: _runs_of(protocol, arm, runs) for arm in protocol.arms}
    return tables.frame((_row(protocol, arm, by_arm) for arm in protocol.arms), schemas.REPRODUCE)


def _runs_of(protocol: Protocol, arm: Arm, runs: pd.DataFrame) -> pd.DataFrame:
    """The arm's runs by seed, of whichever dataset they are."""
    hashes = {protocol.run_of(arm, dataset, 0).config_hash for dataset in ("mnist", "digits")}
    return runs[runs["config_hash"].isin(hashes)].set_index("seed")


def _row(protocol: Protocol, arm: Arm, by_arm: dict[str, pd.DataFrame]) -> dict[str, Any]:
    runs = by_arm[arm.label]
    done = runs[runs["status"] == "ok"]
    run = protocol.run_of(arm, "mnist", 0)
    row: dict[str, Any] = {
        "protocol": protocol.name,
        "source": protocol.source,
        "setting": protocol.in_words(),
        "reduced": protocol.reduced or "nothing",
        "arm": arm.label,
        **{k: getattr(run, k) for k in ("scenario", "method", "fisher_type", "ewc_lambda")},
        "n": 0,
        "diverged": int((runs["status"] == "diverged").sum()),
        "reproduced": "not run" if runs.empty else "no reference",
    }
    if arm.reference:
        row |= {
            "reference": arm.reference.value,
            "reference_where": arm.reference.where,
            "rule": arm.reference.rule,
        }
    if done.empty:
        return row
    row |= statistics.interval(done[METRIC].to_numpy(float))
    row |= provenance_of(done)
    row["run_s"] = float(done[["train_s", "fisher_s", "eval_s"]].sum(axis=1).mean())
    row["fisher_s"] = float(done["fisher_s"].mean())
    if arm.reference:
        row["reproduced"] = "yes" if arm.reference.is_met(row["mean"]) else "no"
    if arm.against:
        row |= _against(done, by_arm[arm.against]) | {"against": arm.against}
    return row


def _against(done: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    other = other[other["status"] == "ok"]
    seeds = done.index.intersection(other.index)
    if not len(seeds):
        return {}
    differences = np.asarray(done.loc[seeds, METRIC] - other.loc[seeds, METRIC], float)
    found = statistics.interval(differences)
    return {
        "difference": found["mean"],
        "difference_ci_low": found["ci_low"],
        "difference_ci_high": found["ci_high"],
        "differs": statistics.differs(differences),
        "within_margin": statistics.within_margin(differences),
    }

"""The parts of the Fisher between and within the classes, task by task."""

import pytest

from experiments.__main__ import main
from experiments.results import tables
from experiments.studies import between_classes


def test_mini_batches_of_one_sample_are_the_per_sample_fisher(tmp_path, monkeypatch):
    monkeypatch.setattr(
        between_classes, "STREAMS", (("permuted", "domain", 2), ("split", "class", 2))
    )
    arguments = ["--dataset", "digits", "--seeds", "0", "--batch-size", "1", "--hidden-size", "8"]
    assert main(["between-classes", *arguments, "--out", str(tmp_path)]) == 0
    table = tables.read(tmp_path, between_classes.BETWEEN_CLASSES)
    assert len(table) == 2 * 2 * 8
    traces = table.set_index(["benchmark", "experience", "labels", "part"])["trace"].unstack()
    whole = traces["between classes"] + traces["within classes"]
    assert whole.to_numpy() == pytest.approx(traces["per sample"].to_numpy())
    own = traces.xs("data's", level="labels")
    for part in ("mini-batches, sorted by class", "mini-batches, shuffled"):
        # On class-incremental streams Avalanche's F is of the same logits and labels too.
        assert own[part].to_numpy() == pytest.approx(own["per sample"].to_numpy(), rel=1e-4)
    assert (tmp_path / "between_classes.png").exists()

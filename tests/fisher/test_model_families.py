"""Every parameter of the models that people have is served by a rule: none falls off silently."""

import importlib.util

import pytest
import torch

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from experiments.timing.fisher_engines import NETWORKS
from support.reference import loop_fisher, relative_error

FAMILIES = ["bert", "gpt2", "vit", "lstm", "gru"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_serve_every_parameter(family):
    if family in ("bert", "gpt2", "vit") and not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    network = NETWORKS[family]
    model = network.build().eval()
    x = torch.randn(3, *network.shape) if network.shape else torch.randint(1000, (3, 32))
    served = explain(model, (x,))
    assert {s.engine for s in served.values()} == {"rules"}, served
    model, y = model.double(), torch.arange(3)
    x = x.double() if network.shape else x
    got = diagonal_fisher(model, [(x, y)], "empirical")
    assert relative_error(got, loop_fisher(model, x, y, "empirical")) < 1e-12

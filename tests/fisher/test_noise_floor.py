"""Gradients that are zero in exact arithmetic, and rules that are wrong."""

import pytest
import torch
from torch import nn

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from ewc_plugin.fisher.rules.linear import Linear
from support.reference import loop_fisher, relative_error


class Keys(nn.Module):
    """Separate projections, as BERT has them: softmax is invariant to the bias of the keys."""

    def __init__(self, width=32):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        for _ in range(2):
            scores = self.query(x) @ self.key(x).mT / 6
            x = self.norm(x + scores.softmax(-1) @ self.value(x))
        return self.head(x[:, 0])


def built(dtype, freeze=False):
    torch.manual_seed(0)
    model = Keys().to(dtype).eval()
    if freeze:
        model.key.weight.requires_grad_(False)
    return model, torch.randn(7, 9, 32, dtype=torch.float64).to(dtype), torch.arange(7) % 4


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "bias alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_cancels_costs_no_layer_its_rule(dtype, freeze):
    model, x, y = built(dtype, freeze)
    served = explain(model, (x, y))
    assert {s.engine for s in served.values()} == {"rules"}, served
    got = diagonal_fisher(model, [(x, y)])
    expected = loop_fisher(model.double(), x.double(), y, "predicted")
    largest = max(float(f.max()) for f in expected.values())
    assert float(got["key.bias"].max()) < 1e-10 * largest
    del got["key.bias"], expected["key.bias"]
    assert relative_error(got, expected) < (1e-4 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_rule_that_is_wrong_is_seen_beside_a_gradient_that_cancels(dtype, factor, monkeypatch):
    model, x, y = built(dtype)
    right = Linear.per_sample

    def wrong(self, call, a, g):
        return {n: t * (factor if "key" in n else 1.0) for n, t in right(self, call, a, g).items()}

    monkeypatch.setattr(Linear, "per_sample", wrong)
    served = explain(model, (x, y))
    assert served["key.weight"].detail == "the layer rule disagrees with the loop"
    assert served["query.weight"].engine == "rules"

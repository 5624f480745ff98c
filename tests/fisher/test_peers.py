"""BackPACK as an oracle, where it is installed: another derivation by other people."""

import pytest
import torch
from torch import nn

from ewc_plugin.fisher.diagonal import diagonal_fisher

# BackPACK warns of its own hooks.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    )
    return model.double(), torch.randn(7, 2, 5, 5).double(), torch.arange(7) % 4


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_backpack_agrees(kind):
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import DiagGGNExact, SumGradSquared

    model, x, y = problem()
    ours = diagonal_fisher(model, [(x, y)], kind, chunk_size=3)
    backpack.extend(model)
    criterion = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack.backpack(DiagGGNExact() if kind == "exact" else SumGradSquared()):
        criterion(model(x), y).backward()
    for name, p in model.named_parameters():
        theirs = (p.diag_ggn_exact if kind == "exact" else p.sum_grad_squared) / 7
        torch.testing.assert_close(ours[name], theirs, rtol=1e-11, atol=1e-14)

"""Adam's second moments as F, against the moving average written out."""

import pytest
import torch
from torch import nn

from ewc_plugin import adam_fisher


def trained(kind=torch.optim.Adam, steps=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    x, y = torch.randn(steps, 5, 4).double(), torch.arange(5 * steps).view(steps, 5) % 2
    history = []
    for x_t, y_t in zip(x, y, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_t), y_t).backward()
        history.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return model, optimizer, history


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_moments_are_a_weighted_mean_of_squares(kind, batch_size):
    model, optimizer, history = trained(kind, betas=(0.9, 0.8))
    found = adam_fisher(optimizer, model, batch_size=batch_size)
    weights = torch.tensor([0.8**2, 0.8, 1.0], dtype=torch.float64)
    weights /= weights.sum()
    for name, p in model.named_parameters():
        squares = torch.stack([g[name].square() for g in history])
        want = batch_size * torch.tensordot(weights, squares, 1)
        torch.testing.assert_close(found[name], want, rtol=1e-12, atol=0)
        assert found[name].shape == p.shape
    before = {n: f.clone() for n, f in found.items()}
    optimizer.step()
    assert all(torch.equal(before[name], found[name]) for name in found), "not a copy"


def test_a_parameter_without_a_gradient_has_no_importance():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "other_head": nn.Linear(2, 2)})
    optimizer = torch.optim.Adam(model.parameters())
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = adam_fisher(optimizer, model)
    assert not found["other_head.weight"].any()
    assert found["used.weight"].all()


@pytest.mark.parametrize(
    ("kind", "steps", "options", "error", "message"),
    [
        (torch.optim.SGD, 1, {}, TypeError, "`optimizer` must be Adam or AdamW.*SGD"),
        (torch.optim.Adam, 0, {}, ValueError, "has no state yet"),
        (torch.optim.Adam, 1, {"amsgrad": True}, ValueError, "amsgrad=True"),
        (torch.optim.Adam, 1, {"weight_decay": 0.1}, ValueError, "Use AdamW"),
    ],
)
def test_refused(kind, steps, options, error, message):
    model, optimizer, _ = trained(kind, steps, **options)
    with pytest.raises(error, match=message):
        adam_fisher(optimizer, model)


def test_a_parameter_that_is_not_optimised_is_named():
    model, optimizer, _ = trained()
    model.append(nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"no moments of 3\.weight, 3\.bias"):
        adam_fisher(optimizer, model)


@pytest.mark.parametrize("batch_size", [0, 2.5, True])
def test_bad_batch_sizes_are_refused(batch_size):
    model, optimizer, _ = trained()
    with pytest.raises(ValueError, match="`batch_size` must be a whole number"):
        adam_fisher(optimizer, model, batch_size=batch_size)

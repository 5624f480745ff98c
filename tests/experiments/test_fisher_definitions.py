"""The three definitions of Fisher information: closed forms, small networks, and the package."""

import pytest
import torch
from torch import nn

from ewc_plugin import diagonal_fisher
from experiments.results import tables
from experiments.studies.fisher_definitions import (
    IDENTITIES,
    Identities,
    Logistic,
    label_weights,
    measure_while_training,
    moments,
)
from support.paths import RESULTS

N, K, C = 40, 3, 4  # samples, features, classes
RESULTS = RESULTS / "identities"


def tanh_network():
    return nn.Sequential(nn.Linear(K, 5), nn.Tanh(), nn.Linear(5, C))


def relu_network():  # differentiable almost everywhere: the identities hold where it is
    return nn.Sequential(nn.Linear(K, 5), nn.ReLU(), nn.Linear(5, C))


MODELS = [lambda: Logistic(K), lambda: nn.Linear(K, C), tanh_network, relu_network]
IDS = ["logistic", "softmax", "tanh", "relu"]


def build(make):
    torch.manual_seed(0)
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p)
    x = torch.randn(N, K, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
    y = torch.randint(logits.size(1), (N,))
    return model, x, y, logits


def weights(logits, y):
    return label_weights(logits, y, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", MODELS, ids=IDS)
def test_the_three_definitions_agree_under_the_models_own_labels(make):
    model, x, y, logits = build(make)
    own = moments(model, x, weights(logits, y)["own"])
    scale = float(own.mean_square.max())
    assert float(own.mean.abs().max()) < 1e-14 * scale**0.5 * N
    torch.testing.assert_close(own.variance, own.mean_square, rtol=1e-12, atol=0)
    torch.testing.assert_close(own.curvature, own.mean_square, rtol=1e-9, atol=1e-13 * scale)


@pytest.mark.parametrize("make", MODELS, ids=IDS)
def test_mean_squares_are_the_packages_fishers(make):
    model, x, y, logits = build(make)
    found = weights(logits, y)
    for labels, kind in (("own", "exact"), ("predicted", "predicted"), ("empirical", "empirical")):
        fisher = torch.cat([f.flatten() for f in diagonal_fisher(model, [(x, y)], kind).values()])
        square = moments(model, x, found[labels]).mean_square
        torch.testing.assert_close(fisher, square, rtol=1e-11, atol=1e-14 * float(square.max()))


def test_logistic_regression_in_closed_form():
    model, x, y, logits = build(MODELS[0])
    p = logits.softmax(1)[:, 1]
    features = torch.cat([x, torch.ones(N, 1, dtype=x.dtype)], dim=1)  # weight, then bias
    fisher = (p * (1 - p)) @ features.square() / N
    found = {name: moments(model, x, W) for name, W in weights(logits, y).items()}
    torch.testing.assert_close(found["own"].mean_square, fisher)
    for labels in ("predicted", "empirical", "sampled"):  # the Hessian does not depend on y
        torch.testing.assert_close(found[labels].curvature, fisher)
    residual = (y - p)[:, None] * features
    torch.testing.assert_close(found["empirical"].mean, residual.mean(0))
    torch.testing.assert_close(found["empirical"].mean_square, residual.square().mean(0))


def test_softmax_regression_in_closed_form():
    model, x, y, logits = build(MODELS[1])
    p = logits.softmax(1)
    weight = torch.einsum("nc,nk->ck", p * (1 - p), x.square()) / N
    bias = (p * (1 - p)).mean(0)
    found = {name: moments(model, x, W) for name, W in weights(logits, y).items()}
    fisher = torch.cat([weight.flatten(), bias])
    torch.testing.assert_close(found["own"].mean_square, fisher)
    torch.testing.assert_close(found["predicted"].curvature, fisher)
    residual = (p.argmax(1)[:, None] == torch.arange(C)).double() - p
    square = torch.einsum("nc,nk->ck", residual.square(), x.square()) / N
    torch.testing.assert_close(found["predicted"].mean_square[: C * K], square.flatten())


def test_drawn_labels_come_from_the_model():
    logits = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64).repeat(20_000, 1)
    drawn = weights(logits, torch.zeros(20_000, dtype=torch.int64))["sampled"].mean(0)
    p = logits[0].softmax(0)
    assert ((drawn - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_under_other_labels_the_definitions_part():
    model, x, y, logits = build(tanh_network)
    for labels in ("predicted", "empirical"):
        found = moments(model, x, weights(logits, y)[labels])
        assert float(found.mean.square().sum() / found.mean_square.sum()) > 0.01
        assert float((found.curvature - found.mean_square).abs().max()) > 0.01


def test_rows_of_a_training_run():
    model, x, y, _ = build(tanh_network)
    settings = Identities(steps=(0, 5), batch_size=8)
    table = tables.frame(
        (
            {"problem": "p", "seed": 0, **row}
            for row in measure_while_training(model, x, y, settings, seed=0)
        ),
        IDENTITIES,
    )
    assert table["step"].tolist() == [0] * 4 + [5] * 4
    own = table[table["labels"] == "own"]
    assert (own[["variance_difference", "curvature_difference"]] < 1e-12).all(axis=None)
    assert (own["cosine_with_own"] - 1).abs().max() < 1e-12
    assert table["package_difference"].max() < 1e-11

"""Importances of the data's labels other than the empirical Fisher, against a plain loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_plugin import diagonal_fisher
from ewc_plugin.fisher import weighted_label_score
from support.gradients import between_classes, mean_square, sample_gradients
from support.problems import PROBLEMS
from support.reference import relative_error


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def data(N=13):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (N,), generator=generator)


def reversed_fisher(net, x, y, forward=None):
    """Mean square of the gradient of the cross entropy of the reversed logits."""
    forward = forward or (lambda net, x: net(x))
    return mean_square(
        sample_gradients(
            net,
            lambda n: F.cross_entropy(-forward(net, x[n : n + 1]), y[n : n + 1]),
            len(y),
        )
    )


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("size", [1, 5, 13])
def test_reversed_logits(engine, size):
    net, (x, y) = mlp(), data()
    batches = list(zip(x.split(size), y.split(size), strict=True))
    found = diagonal_fisher(net, batches, "reversed", engine=engine)
    assert relative_error(found, reversed_fisher(net, x, y)) < 1e-12
    in_single = diagonal_fisher(net.float(), [(x.float(), y)], "reversed", engine=engine)
    assert relative_error(in_single, reversed_fisher(net.double(), x, y)) < 1e-4


@pytest.mark.parametrize("name", ["conv", "transformer", "lstm"])
def test_reversed_logits_of_other_models(name):
    model, (x,), y = next(p for p in PROBLEMS if p.id == name).build()
    model.eval()
    found = diagonal_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])], "reversed")
    assert relative_error(found, reversed_fisher(model, x, y)) < 1e-12


def test_reversed_logits_of_masked_classes_stay_out():
    net, (x, y) = mlp(), data()
    active = torch.tensor([True, False, True, True])
    y = torch.where(y == 1, 0, y)
    of_three = torch.tensor([0, 0, 1, 2])[y]
    expected = reversed_fisher(net, x, of_three, lambda net, x: net(x)[:, active])
    found = diagonal_fisher(
        net,
        [(x, y)],
        "reversed",
        forward=lambda net, batch: net(batch[0]).masked_fill(~active, -torch.inf),
    )
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("size", [1, 5, 13])
def test_classes_means_of_reversed_logits(size):
    net, (x, y) = mlp(), data()
    gradients = sample_gradients(
        net, lambda n: F.cross_entropy(-net(x[n : n + 1]), y[n : n + 1]), len(y)
    )
    batches = list(zip(x.split(size), y.split(size), strict=True))
    found = diagonal_fisher(net, batches, "class_mean_reversed")
    assert relative_error(found, between_classes(gradients, y)) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 5, 13])
def test_mini_batches_of_reversed_logits(size, reduction):
    net, (x, y) = mlp(), data()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    expected = mean_square(
        sample_gradients(net, lambda b: criterion(-net(batches[b][0]), batches[b][1]), len(batches))
    )
    found = diagonal_fisher(net, batches, "batched_reversed", criterion=criterion)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("kind", ["class_mean_reversed", "batched_reversed"])
def test_masked_classes_stay_out_of_means_of_reversed_logits(kind):
    net, (x, y) = mlp(), data()
    active = torch.tensor([True, False, True, True])
    y = torch.where(y == 1, 0, y)
    of_three = torch.tensor([0, 0, 1, 2])[y]
    expected = diagonal_fisher(
        net, [(x, of_three)], kind, forward=lambda net, batch: net(batch[0])[:, active]
    )
    found = diagonal_fisher(
        net,
        [(x, y)],
        kind,
        forward=lambda net, batch: net(batch[0]).masked_fill(~active, -torch.inf),
    )
    assert relative_error(found, expected) < 1e-12


def test_labels_weighted_by_their_probability():
    """As `models/ewc_on.py` of Mammoth has it: exp(log p) times the square of its gradient."""
    net, (x, y) = mlp(), data()

    def log_p(n):
        return -F.nll_loss(net(x[n : n + 1]).log_softmax(1), y[n : n + 1])

    gradients = sample_gradients(net, log_p, len(y))
    p = torch.stack([log_p(n).detach().exp() for n in range(len(y))])
    expected = {
        name: (p.view(-1, *(1,) * (g.dim() - 1)) * g.square()).mean(0)
        for name, g in gradients.items()
    }
    found = diagonal_fisher(net, [(x[:5], y[:5]), (x[5:], y[5:])], weighted_label_score)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("kind", ["empirical", "reversed"])
@pytest.mark.parametrize("ignored", [-100, 7])
def test_ignored_samples_contribute_nothing_and_do_not_count(kind, ignored):
    net, (x, y) = mlp(), data()
    y[[0, 4, 12]] = ignored
    kept = y != ignored
    expected = diagonal_fisher(net, [(x[kept], y[kept])], kind)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    found = diagonal_fisher(net, batches, kind, ignore_index=ignored)
    assert relative_error(found, expected) < 1e-12
    predicted = diagonal_fisher(net, batches, ignore_index=ignored)  # reads no labels
    assert relative_error(predicted, diagonal_fisher(net, [(x, y)])) < 1e-12


def test_where_every_sample_is_ignored_there_is_no_fisher():
    net, (x, y) = mlp(), data()
    with pytest.raises(ValueError, match="No sample of `batches` has a label"):
        diagonal_fisher(net, [(x, torch.full_like(y, -100))], "empirical")


def test_other_labels_out_of_range_are_refused():
    net, (x, y) = mlp(), data()
    with pytest.raises(ValueError, match=r"must be in \[0, 4\), the logits' classes, or -100"):
        diagonal_fisher(net, [(x, y - 1)], "empirical")

"""The score of any loss and of a log-likelihood, against a plain loop over single samples."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_plugin import diagonal_fisher, gaussian_score, log_likelihood_score, loss_score
from ewc_plugin.fisher import bernoulli_score
from support.gradients import mean_square, sample_gradients
from support.reference import relative_error

N = 7


def mlp(outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def inputs(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classes(C=4):
    y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(2))
    y[3] = -100
    return y


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
LOSSES = {
    "weights": (4, nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), classes),
    "smoothing": (4, nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"), classes),
    "margin": (4, nn.MultiMarginLoss(reduction="sum"), lambda: classes().clamp(min=0)),
    "mse": (3, nn.MSELoss(reduction="sum"), lambda: inputs(3)),
    "huber": (3, nn.SmoothL1Loss(reduction="none"), lambda: inputs(3)),
    "bce": (
        3,
        nn.BCEWithLogitsLoss(reduction="sum", pos_weight=torch.tensor([2.0, 1.0, 3.0]).double()),
        lambda: (inputs(3) > 0).double(),
    ),
    "reconstruction": (6, lambda out, x: (out - x).abs().pow(3), lambda: inputs(6)),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, engine):
    outputs, criterion, targets = LOSSES[name]
    net, x, y = mlp(outputs), inputs(6), targets()
    want = mean_square(
        sample_gradients(net, lambda n: criterion(net(x[n : n + 1]), y[n : n + 1]).sum(), N)
    )
    for size in (1, 3, N):
        batches = list(zip(x.split(size), y.split(size), strict=True))
        found = diagonal_fisher(net, batches, loss_score(criterion), engine=engine)
        assert relative_error(found, want) < 1e-12


def test_ctc():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = inputs(8, 6)
    y = torch.randint(1, 4, (N, 3), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([3, 2, 1, 3, 2, 3, 1])

    def ctc(outputs, batch):  # [N, T, C]
        _, y, lengths = batch
        log_p = outputs.log_softmax(-1).transpose(0, 1)
        steps = torch.full((len(y),), outputs.size(1))
        return F.ctc_loss(log_p, y, steps, lengths, reduction="none")

    def loss(n):
        one = slice(n, n + 1)
        return ctc(net(x[one]), (x[one], y[one], lengths[one])).sum()

    want = mean_square(sample_gradients(net, loss, N))
    score = loss_score(ctc, targets=lambda batch: batch)
    found = diagonal_fisher(net, [(x[:4], y[:4], lengths[:4]), (x[4:], y[4:], lengths[4:])], score)
    assert relative_error(found, want) < 1e-12


@pytest.mark.parametrize("size", [1, N])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=WEIGHT),
        lambda out, y: (out - out.mean(0)).square().sum(),
    ],
)
def test_losses_that_are_no_sum_over_samples_are_refused(criterion, size):
    net, x, y = mlp(4), inputs(6), classes()
    batches = list(zip(x.split(size), y.split(size), strict=True))
    with pytest.raises(ValueError, match="`criterion` must be a sum over samples"):
        diagonal_fisher(net, batches, loss_score(criterion))


def test_a_criterion_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="`criterion` must map"):
        loss_score("mse")


class Flow(nn.Module):
    """An affine flow: log p(x) of a standard normal after x -> A(tanh-gated) x + b."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        fixed, moved = x.chunk(2, 1)
        s = torch.tanh(self.scale(fixed))
        z = torch.cat([fixed, moved * s.exp() + self.shift(fixed)], 1)
        return -z.square().sum(1) / 2 + s.sum(1)


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_log_likelihoods(engine):
    torch.manual_seed(0)
    net, x = Flow().double(), inputs(4)
    want = mean_square(sample_gradients(net, lambda n: net(x[n : n + 1])[0], N))
    found = diagonal_fisher(net, [(x[:3],), (x[3:],)], log_likelihood_score, engine=engine)
    assert relative_error(found, want) < 1e-12


def test_more_than_one_log_likelihood_is_refused():
    with pytest.raises(ValueError, match="one log-likelihood per sample"):
        diagonal_fisher(mlp(2), [(inputs(6),)], log_likelihood_score)


def test_one_value_per_sample_is_no_logit():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="log_likelihood_score"):
        diagonal_fisher(Flow().double(), [(inputs(4),)])


@pytest.mark.parametrize(
    "score", [functools.partial(gaussian_score, variance=2.0), bernoulli_score]
)
def test_many_outputs_are_made_one_vector_at_a_time(score):
    """N D^2 entries, 2.6 GB here, are never in memory together; all vectors are one at a time."""
    resource = pytest.importorskip("resource")
    N, D = 512, 800
    torch.manual_seed(0)
    net, x = nn.Linear(3, D), torch.randn(N, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = diagonal_fisher(net, [(x,)], score)
    p = net(x).detach().sigmoid()
    variance = torch.full_like(p, 0.5) if isinstance(score, functools.partial) else p * (1 - p)
    want = {"weight": (variance.T @ x.square()) / N, "bias": variance.mean(0)}
    assert relative_error(found, {k: v.double() for k, v in want.items()}) < 1e-4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB

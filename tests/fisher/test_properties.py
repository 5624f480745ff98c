"""Properties over random networks, splits and label types."""

from itertools import pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from ewc_plugin.fisher.diagonal import diagonal_fisher
from support.reference import loop_fisher, relative_error

CHANNELS, SIZE, N = 4, 4, 5
BODY = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "strided": lambda: nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 2),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "prelu": lambda: nn.PReLU(CHANNELS),
    "relu": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
}


class Network(nn.Module):
    def __init__(self, layers, classes):
        super().__init__()
        self.body = nn.Sequential(*(BODY[layer]() for layer in layers))
        self.tokens = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 5), nn.Tanh())
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.tokens(self.body(x).flatten(2).transpose(1, 2)).mean(1))


def differentiable(layers):
    """An in-place ReLU overwrites what these layers need for their backward: PyTorch refuses."""
    return not any(b == "relu" and a in ("relu", "tanh") for a, b in pairwise(layers))


networks = st.lists(st.sampled_from(sorted(BODY)), max_size=4).filter(differentiable)


def worst_error(got, expected):
    """Largest error of an entry, in units of what rounding allows it.

    A scale before a norm has a gradient g that nearly cancels: its error is that of its terms,
    about eps g_max, so F = g^2 is off by about eps g g_max, which is far more than eps F.
    """
    largest = max(e.max().item() for e in expected.values())
    worst = 0.0
    for name, e in expected.items():
        F = e.max().item()
        allowed = 1e-11 * F + 1e-14 * (F * largest) ** 0.5 + 1e-28 * largest
        error = (got[name] - e).abs().max().item()
        worst = max(worst, error / allowed if allowed else error)
    return worst


@settings(max_examples=20, deadline=None, derandomize=True)
@example(["batch norm", "instance norm"], 2, "predicted", [1] * N, 1, 2)
@given(
    layers=networks,
    classes=st.integers(2, 4),
    kind=st.sampled_from(["predicted", "empirical", "exact"]),
    sizes=st.lists(st.integers(1, N), min_size=N, max_size=N),
    chunk=st.sampled_from([1, 2, 3, None]),
    seed=st.integers(0, 2**16),
)
def test_any_network_in_any_split_equals_the_loop(layers, classes, kind, sizes, chunk, seed):
    torch.manual_seed(seed)
    model = Network(layers, classes).double()
    x, y = torch.randn(N, CHANNELS, SIZE, SIZE).double(), torch.randint(classes, (N,))
    batches, start = [], 0
    for size in sizes:
        if start < N:
            batches.append((x[start : start + size], y[start : start + size]))
            start += size
    got = diagonal_fisher(model, batches, kind, chunk_size=chunk)
    assert all(bool((f >= 0).all()) for f in got.values())
    assert worst_error(got, loop_fisher(model.eval(), x, y, kind)) < 1


@settings(max_examples=5, deadline=None, derandomize=True)
@given(layers=networks, seed=st.integers(0, 2**16))
def test_sampled_goes_to_exact(layers, seed):
    torch.manual_seed(seed)
    model, x = Network(layers, 3).double(), torch.randn(N, CHANNELS, SIZE, SIZE).double()
    exact = diagonal_fisher(model, [(x,)], "exact")
    draws = 20_000
    sampled = diagonal_fisher(
        model, [(x,)], "sampled", n_draws=draws, generator=torch.Generator().manual_seed(seed)
    )
    # A label's share has a standard error of at most sqrt(share / draws): relative to the exact
    # sum over labels, a few times 1 / sqrt(draws * the smallest probability).
    p = model.eval()(x).softmax(1).min().item()
    assert relative_error(sampled, exact) < 5 / (draws * p) ** 0.5

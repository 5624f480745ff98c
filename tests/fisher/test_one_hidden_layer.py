"""All of EXACT's vectors at once, for one hidden layer: where that is done, and its values."""

import pytest
import torch
from torch import nn

from ewc_plugin.fisher import one_hidden_layer
from ewc_plugin.fisher.diagonal import diagonal_fisher
from support.reference import loop_fisher, relative_error

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "threshold": lambda: nn.Threshold(0.1, 0.0),
    "none": nn.Identity,
    "two": lambda: nn.Sequential(nn.Tanh(), nn.Dropout(), nn.Flatten(), nn.Softplus()),
}
N = 7


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        z = self.first(x)
        return self.last(z.relu()) + z[:, :4]


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        z = self.first(x).relu()
        return self.last(z.roll(1, dims=1))


def build(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).double().eval()


def data(n=N):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=generator).double(), torch.zeros(n, dtype=torch.long)


@pytest.fixture
def taken(monkeypatch):
    """How often the vectors were taken all at once."""
    calls = []
    kind = one_hidden_layer.OneHiddenLayer
    add = kind.add
    monkeypatch.setattr(kind, "add", lambda self, *a: (calls.append(a), add(self, *a))[1])
    return calls


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_elementwise_activations(activation, taken):
    model, (x, y) = build(nn.Linear(6, 5), activation(), nn.Linear(5, 4)), data()
    got = diagonal_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])], "exact")
    assert taken
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12


OTHERS = {
    "two hidden layers": [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4)],
    "softmax": [nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 4)],
    "norm": [nn.Linear(6, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 4)],
    "behind the logits": [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh()],
    "no hidden layer": [nn.Linear(6, 4)],
    "two classes": [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)],
    "convolution": [
        *(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 1, 2), nn.Flatten(), nn.ReLU(), nn.Linear(5, 4))
    ],
    "skip": [Skip()],
    "entries mixed": [Transposed()],
}


@pytest.mark.parametrize("layers", OTHERS.values(), ids=OTHERS)
def test_other_networks_go_vector_by_vector(layers, taken):
    model, (x, y) = build(*layers), data()
    got = diagonal_fisher(model, [(x, y)], "exact")
    assert not taken
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12


def test_one_vector_is_pulled_back(taken):
    model, (x, y) = build(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), data()
    for kind in ("predicted", "empirical"):
        diagonal_fisher(model, [(x, y)], kind)
    assert not taken


def test_frozen_layers_and_biases(taken):
    model, (x, y) = build(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False)), data()
    model[0].weight.requires_grad_(False)
    got = diagonal_fisher(model, [(x, y)], "exact")
    assert list(got) == ["0.bias", "2.weight"]
    assert len(taken) == 1
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12


def test_hooks_see_every_vector(taken):
    model, (x, y) = build(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), data()
    for layer in (1, 2):
        seen = []

        def forward(m, batch, layer=layer, seen=seen):
            h = m[: layer + 1](batch[0])
            h.register_hook(seen.append)
            return m[layer + 1 :](h)

        diagonal_fisher(model, [(x, y)], "exact", forward=forward)
        assert len(seen) >= 3
    assert not taken


def test_out_of_memory_halves_the_chunk(taken, monkeypatch):
    model, (x, y) = build(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), data()
    expected = loop_fisher(model, x, y, "exact")
    products = one_hidden_layer.summed_squares

    def run_out(vectors, weight):
        if len(vectors) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return products(vectors, weight)

    monkeypatch.setattr(one_hidden_layer, "summed_squares", run_out)
    assert relative_error(diagonal_fisher(model, [(x, y)], "exact"), expected) < 1e-12
    assert len(taken) > 2


def test_many_classes_are_bounded_in_memory(taken):
    model, (x, y) = build(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3000)), data(1)
    diagonal_fisher(model, [(x, y)], lambda logits, batch: torch.ones(2, 1, 3000).double())
    assert not taken


@pytest.mark.parametrize("logit_scale", [1.0, 10.0, 40.0])
def test_float32_keeps_its_digits_on_saturated_outputs(logit_scale, taken):
    # Entries are sums over the pairs of classes that cancel where the network is sure.
    model, (x, y) = build(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 10)), data(64)
    with torch.no_grad():
        model[2].weight.mul_(logit_scale)
    expected = diagonal_fisher(model, [(x, y)], "exact", engine="loop")
    got = diagonal_fisher(model.float(), [(x.float(), y)], "exact")
    assert len(taken) == 1
    assert relative_error({k: v.double() for k, v in got.items()}, expected) < 1e-5

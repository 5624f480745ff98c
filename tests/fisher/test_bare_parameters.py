"""Parameters that no layer holds, and those that several calls read, against the sample loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from ewc_plugin.fisher.tracing import shared
from support.reference import loop_fisher, relative_error


class ClassToken(nn.Module):
    """A vision transformer's embedding and LayerScale."""

    def __init__(self, expand):
        super().__init__()
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, 6)),
            nn.Parameter(torch.randn(9, 6)),
        )
        self.gain, self.body, self.head = (
            nn.Parameter(torch.ones(6)),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
        )
        self.expand = expand

    def forward(self, x):
        x = torch.cat([self.expand(self.token, x), x], dim=1)
        x = x + self.places[: x.size(1)]
        return self.head((x + self.gain * torch.tanh(self.body(x)))[:, 0])


class LearnedQuery(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head, self.attend = nn.Linear(12, 4), attend

    def forward(self, x):
        return self.head(self.attend(self, x).flatten(1))


def by_products(m, x):
    return (x @ m.query.T).softmax(1).mT @ x


def by_batched_products(m, x):
    return (m.query @ x.mT).softmax(-1) @ x


def by_attention(m, x):
    queries = m.query.unsqueeze(0).expand(len(x), -1, -1)
    return m.attention(queries, x, x, need_weights=False)[0]


class Used(nn.Module):
    """One matrix and one vector, used in a way of the test's."""

    def __init__(self, use, *shape):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(6))
        self.register_buffer("mask", (torch.rand(6, 6) > 0.4).double())
        self.head, self.use = nn.Linear(6, 4), use

    def forward(self, x):
        return self.head(torch.tanh(self.use(self, x)))


def in_place(m, x):
    x = x.clone()
    x += m.p
    x[:, 0].mul_(m.q)
    return x.mean(1)


USES = {
    "added": ((6,), lambda m, x: (x + m.p).mean(1)),
    "taken from one": ((6,), lambda m, x: ((1 - m.p) * x).mean(1)),
    "divided by": ((6,), lambda m, x: (x / m.p.exp()).mean(1)),
    "power": ((6,), lambda m, x: x.abs().pow(m.p).mean(1)),
    "per channel": ((6, 1), lambda m, x: (x.mT * m.p).mean(2)),
    "logit scale": ((), lambda m, x: x.mean(1) * m.p.exp()),
    "in place": ((6,), in_place),
    "chosen": ((6,), lambda m, x: torch.where(x > 0, m.p, x).mean(1)),
    "fused": ((6,), lambda m, x: torch.addcmul(m.q, x, m.p).mean(1)),
    "twice": ((6,), lambda m, x: (torch.tanh(x * m.p) * m.p).mean(1)),
    "scaled and shifted by one": ((6,), lambda m, x: (x * m.p + m.p).mean(1)),
    "expanded by repeat": ((1, 6), lambda m, x: x.mean(1) + m.p.repeat(len(x), 1)),
    "expanded and moved": (
        (6,),
        lambda m, x: (m.p.expand(len(x), -1).unsqueeze(1).transpose(1, 2).mT * x).mean(1),
    ),
    "stacked": ((6,), lambda m, x: torch.stack([m.p.expand(len(x), -1), x[:, 0]], 1).mean(1)),
    "indexed": ((9, 6), lambda m, x: (x + m.p[torch.tensor([4, 2, 0])]).mean(1)),
    "an index twice": ((9, 6), lambda m, x: (x + m.p[torch.arange(3) // 2]).mean(1)),
    "matrix": ((6, 6), lambda m, x: torch.tanh(x @ m.p).mean(1)),
    "matrix and vector": (
        (6, 6),
        lambda m, x: torch.addmm(m.q, x.flatten(0, 1), m.p).view_as(x)[:, 1],
    ),
    "attention pool": ((6,), lambda m, x: ((x @ m.p).softmax(1).unsqueeze(1) @ x)[:, 0]),
    "low rank": ((2, 6), lambda m, x: x.mean(1) @ (0.5 * m.p).T @ (m.p * m.q)),
    "merged low rank": (
        (2, 6),
        lambda m, x: F.linear(x, m.mask + 0.5 * m.p.T @ (m.p * m.q)).mean(1),
    ),
    "masked": ((6, 6), lambda m, x: F.linear(x, m.p * m.mask, m.q).mean(1)),
    "standardised": (
        (6, 6),
        lambda m, x: F.linear(x, (m.p - m.p.mean(1, keepdim=True)) / m.p.std()).mean(1),
    ),
    "tied transposed": ((6, 6), lambda m, x: F.linear(torch.tanh(F.linear(x, m.p)), m.p.T).mean(1)),
    "called k times": ((6, 6), lambda m, x: k_times(m, x.mean(1))),
    "cell in a loop": ((6, 6), lambda m, x: cell(m, x)),
    "convolution of a sum": (
        (6, 6, 1),
        lambda m, x: F.conv1d(x.mT, m.p + m.q[:, None, None]).mean(2),
    ),
    "convolution twice": (
        (6, 6, 3),
        lambda m, x: F.conv1d(F.conv1d(x.mT, m.p, m.q, padding=1), m.p, padding=1).mean(2),
    ),
    "norm twice": (
        (6,),
        lambda m, x: F.layer_norm(torch.tanh(F.layer_norm(x, (6,), m.p)), (6,), m.p, m.q).mean(1),
    ),
    "slope twice": ((1,), lambda m, x: F.prelu(F.prelu(x, m.p) - 0.3, m.p).mean(1)),
}


def k_times(m, h):
    for _ in range(5):
        h = torch.tanh(F.linear(h, m.p, m.q))
    return h


def cell(m, x):
    h = torch.zeros(len(x), 6, dtype=x.dtype)
    for step in x.unbind(1):
        h = torch.tanh(step + h @ m.p + m.q)
    return h


MODELS = {
    "class token": lambda: ClassToken(lambda token, x: token.expand(len(x), -1, -1)),
    "class token as x": lambda: ClassToken(lambda token, x: token.expand_as(x[:, :1])),
    "query by products": lambda: LearnedQuery(by_products),
    "query by batched products": lambda: LearnedQuery(by_batched_products),
    "query in attention": lambda: LearnedQuery(by_attention),
    **{name: lambda use=use: Used(use[1], *use[0]) for name, use in USES.items()},
}


def built(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    return model, torch.randn(7, 3, 6, dtype=torch.float64), torch.arange(7) % 4


@pytest.mark.parametrize("name", MODELS)
def test_rules_serve_every_parameter_exactly(name):
    model, x, y = built(name)
    served = explain(model, (x, y))
    assert {s.engine for s in served.values()} == {"rules"}, served
    for kind in ("empirical", "exact"):
        got = diagonal_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])], kind, chunk_size=3)
        assert relative_error(got, loop_fisher(model, x, y, kind)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_within_1e_4(name):
    model, x, y = built(name, torch.float32)
    got = diagonal_fisher(model, [(x.float(), y)], "exact")
    expected = loop_fisher(model.double(), x.float().double(), y, "exact")
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize(
    "name", ["twice", "merged low rank", "tied transposed", "convolution twice"]
)
def test_blocks_of_samples_change_nothing(name, monkeypatch):
    monkeypatch.setattr(shared, "_ENTRIES", 1)
    model, x, y = built(name)
    got = diagonal_fisher(model, [(x, y)], "exact", engine="rules")
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12


class TiedEmbedding(nn.Module):
    """A language model's words in and out."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.words, self.body = nn.Embedding(5, 6, padding_idx), nn.Linear(6, 6)

    def forward(self, index):
        h = torch.tanh(self.body(self.words(index)))
        return F.linear(h[:, -1], self.words.weight)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_tied_to_the_head(padding_idx):
    torch.manual_seed(0)
    model = TiedEmbedding(padding_idx).double().eval()
    x, y = torch.randint(5, (7, 6)), torch.arange(7) % 5
    assert explain(model, (x,))["words.weight"].detail == "embedding + linear in 2 calls"
    got = diagonal_fisher(model, [(x, y)], "exact")
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12


class RaggedLoop(nn.Module):
    """Calls its cell once per step of the longest sequence of a batch."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x, length):
        h = torch.zeros(len(x), 6, dtype=x.dtype)
        for t in range(int(length.max())):
            step = torch.tanh(self.cell(h) + x[:, t])
            h = torch.where(length[:, None] > t, step, h)
        return self.head(h)


def test_the_number_of_calls_may_differ_between_batches():
    torch.manual_seed(0)
    model = RaggedLoop().double().eval()
    x, y = torch.randn(7, 9, 6).double(), torch.arange(7) % 4
    length = torch.tensor([3, 2, 5, 9, 4, 1, 8])
    served = explain(model, (x, length), forward=lambda m, b: m(*b[:2]))
    assert served["cell.weight"].engine == "rules"
    got = diagonal_fisher(
        model, [(x, length, y)], "exact", forward=lambda m, b: m(*b[:2]), chunk_size=3
    )
    expected = loop_fisher(model, (x, length), y, "exact", lambda m, b: m(*b))
    assert relative_error(got, expected) < 1e-12


class WrittenTo(nn.Module):
    """Writes into what it expanded: the tracing must not separate the two."""

    def __init__(self, write):
        super().__init__()
        self.token, self.head, self.write = (
            nn.Parameter(torch.randn(1, 3, 6)),
            nn.Linear(18, 4),
            write,
        )

    def forward(self, x):
        out = self.token.repeat(len(x), 1, 1)
        self.write(out, x)
        return self.head(torch.tanh(out).flatten(1))


def to_view(out, x):
    out[:, 1].add_(x[:, 1])


def to_item(out, x):
    out[:, 1] = x[:, 1]


@pytest.mark.parametrize("write", [to_view, to_item, lambda out, x: out.mul_(x)])
def test_a_model_that_writes_into_an_expansion_is_never_wrong(write):
    torch.manual_seed(0)
    model = WrittenTo(write).double().eval()
    x, y = torch.randn(7, 3, 6).double(), torch.arange(7) % 4
    got = diagonal_fisher(model, [(x, y)], "exact")
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12

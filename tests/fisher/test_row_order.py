"""Rows that a model picks or sorts by the data: to their own samples, in every chunk."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from support.reference import loop_fisher, relative_error

N, CHUNK = 48, 16
G = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, 6, generator=G, dtype=torch.float64)
Y = torch.randint(3, (N,), generator=G)
LENGTHS = torch.randint(1, 6, (N,), generator=G)
LENGTHS[:CHUNK] = 3  # the first chunk is in order whatever is sorted
RAGGED = torch.tensor([3] * CHUNK + [1, 5] * CHUNK)
IDS = torch.randperm(99, generator=G)[:N]
IDS[:CHUNK] = IDS[:CHUNK].sort().values
EXPERT = X.clone()
EXPERT[:CHUNK, :, 0] = EXPERT[:CHUNK, :, 0].abs()


class Model(nn.Module):
    """The layers that the cases read from."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.lstm = nn.LSTM(6, 8)
        self.ids, self.up = nn.Embedding(99, 6), nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head, self.narrow = nn.Linear(8, 3), nn.Linear(6, 3)


def two_packed(m, x, n):
    """One encoder for two sequences of their own lengths."""

    def encoded(x, n):
        packed = pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        return m.gru(packed)[1][-1]

    return m.head(encoded(x, n) + encoded(x.flip(1), 6 - n))


def packed_by_keyword(m, x, n):
    packed = pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
    outputs = pad_packed_sequence(m.gru(input=packed)[0], batch_first=True, total_length=5)[0]
    return m.head(outputs.sum(1))


def sorted_by_hand(m, x, n):
    """As before `enforce_sorted` was there."""

    def encoded(x, n):
        lengths, order = n.sort(descending=True)
        packed = pack_padded_sequence(x.transpose(0, 1).index_select(1, order), lengths)
        return m.lstm(packed)[1][0][-1].index_select(0, order.argsort())

    return m.head(encoded(x, n) + encoded(x.flip(1), 6 - n))


def steps_of_packed(m, x, n):
    packed = pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
    for _ in range(2):
        packed = packed._replace(data=m.up(packed.data).tanh())
    return m.head(m.gru(packed)[1][-1])


def tokens_by_expert(m, x):
    h = x.flatten(0, 1)
    expert = (h[:, 0] < 0).long()
    order = expert.argsort(stable=True)
    sizes = torch.bincount(expert, minlength=2).tolist()
    parts = m.up(h[order]).tanh().split(sizes)
    out = torch.cat([e(p) for e, p in zip(m.experts, parts, strict=True)])[order.argsort()]
    return m.narrow(out.view(len(x), -1, 6).mean(1))


def end_to_end(m, x, n):
    """Sequences without padding, one behind the other."""
    n = n.tolist()
    h = m.up(torch.cat([x[i, :k] for i, k in enumerate(n)])).relu()
    return m.narrow(torch.stack([part.mean(0) for part in h.split(n)]))


def distinct_ids(m, i):
    ids, place = i.unique(return_inverse=True)
    return m.narrow(m.up(m.up(m.ids(ids)).tanh())[place])


def sorted_ids(m, i):
    ids, order = i.sort()
    return m.narrow(m.up(m.ids(ids)).tanh() + m.up(m.ids(ids)))[order.argsort()]


def rows_by_a_list(m, x, n):
    order = n.argsort(stable=True).tolist()
    h = m.up(torch.stack([x[i] for i in order]).mean(1))
    h = m.up(h.tanh())
    return m.narrow(torch.stack([h[order.index(i)] for i in range(len(x))]))


def sorted_and_back(reordered):
    """Two passes of one layer: over the rows as they are, and as `reordered(rows, order)`."""

    def case(m, x, n):
        order, h = n.argsort(stable=True), x.mean(1)
        back = reordered(m.up(reordered(2 * h, order)).tanh(), order.argsort())
        return m.narrow(m.up(h).tanh() + back)

    case.__name__ = reordered.__name__
    return case


def by_an_array(rows, order):
    return rows[order.numpy()]


def by_a_copied_list(rows, order):
    return rows[torch.tensor(order.tolist())]


def by_stacking(rows, order):
    return torch.stack([1.0 * rows[i] for i in order.tolist()])


def by_writing(rows, order):
    out = torch.zeros_like(rows)
    for place, i in enumerate(order.tolist()):
        out[place] = rows[i]
    return out


def by_a_matrix(rows, order):
    return nn.functional.one_hot(order, len(rows)).to(rows) @ rows


def by_flat_places(rows, order):
    return rows.take(order[:, None] * 6 + torch.arange(6))


def rolled(m, x, n):
    """By as much as the data say, which is nothing in the first chunk."""
    k, h = int((n != 3).any()), x.mean(1)
    return m.narrow(m.up(h).tanh() + m.up(h.roll(k, 0)).tanh().roll(-k, 0))


def halves(m, x, n):
    """First the samples with a large number, then the others."""
    large, h = n > 2, x.mean(1)
    both = torch.cat([h[large], h[~large]])
    out = torch.zeros_like(h)
    out[large], out[~large] = m.up(m.up(both)).tanh().split([int(large.sum()), int((~large).sum())])
    return m.narrow(m.up(h) + out)


def packed_by_hand(m, x, n):
    def encoded(x, n):
        order = n.argsort(descending=True, stable=True).tolist()
        packed = pack_sequence([x[i, : n[i]] for i in order])
        last = m.gru(packed)[1][-1]
        return torch.stack([last[order.index(i)] for i in range(len(x))])

    return m.head(encoded(x, n) + encoded(x.flip(1), 6 - n))


REORDERED = (by_an_array, by_a_copied_list, by_stacking, by_writing, by_a_matrix, by_flat_places)
MOVED = [
    *((sorted_and_back(reordered), (X, LENGTHS)) for reordered in REORDERED),
    *((case, (X, LENGTHS)) for case in (rolled, halves, packed_by_hand)),
    *((case, (X, LENGTHS)) for case in (sorted_by_hand, steps_of_packed, rows_by_a_list)),
    (end_to_end, (X, RAGGED)),
    (tokens_by_expert, (EXPERT,)),
    *((case, (IDS,)) for case in (distinct_ids, sorted_ids)),
]
PACKED = [(two_packed, (X, LENGTHS)), (packed_by_keyword, (X, LENGTHS))]


def last_tokens(m, x, n):
    return m.narrow(m.up(x)[torch.arange(len(x)), n - 1])


def gathered(m, x, n):
    index = (n - 1)[:, None, None].expand(-1, 1, 6)
    return m.narrow(m.up(x).gather(1, index)[:, 0])


def sorted_within(m, x, n):
    h = m.up(x)
    return m.narrow(h.topk(2, dim=1).values.sum(1) + h.sort(1).values[:, 0])


def edges(m, x, n):
    """Messages between the nodes of each sample's graph."""
    h = m.up(x.flatten(0, 1))
    first = 5 * torch.arange(len(x))[:, None]
    to, by = (
        (first + (n[:, None] + k) % 5).flatten() for k in (torch.arange(3), torch.arange(1, 4))
    )
    h = torch.zeros_like(h).index_add(0, to, m.up(h[by].tanh()))
    return m.narrow(h.view(len(x), 5, 6).mean(1))


def masked(m, x, n):
    h = m.up(x)
    h[torch.arange(5) >= n[:, None]] = 0
    return m.narrow(m.up(h).sum(1))


def as_long_as_the_chunk(m, x, n):
    h = m.up(x.repeat(1, 4, 1)[:, :CHUNK])
    return m.narrow(
        h.gather(1, (n - 1)[:, None, None].expand(-1, 1, 6))[:, 0] + h.topk(2, 1)[0][:, 0]
    )


def by_keyword(m, x, n):
    index = (n - 1)[:, None, None].expand(-1, 1, 6)
    h = torch.gather(input=m.up(x), dim=1, index=index)[:, 0]
    return m.narrow(torch.where(condition=h > 0, input=h, other=2 * h))


def sample_by_sample(m, x, n):
    return m.narrow(
        torch.vmap(lambda row: torch.cat([row[:3], row.sort()[0][3:]]))(m.up(x.mean(1)))
    )


def steps_in_reverse(m, x, n):
    steps = torch.stack([m.up(x)[:, t] for t in reversed(range(5))])
    return m.narrow(m.up(steps).tanh().sum(0))


def longest(m, x, n):
    return m.narrow(m.up(x).sum(1) / (1 + 0 * n.sort()[0][-1]))


WITHIN = [
    (case, (X, LENGTHS))
    for case in (
        *(last_tokens, gathered, sorted_within, edges, masked, as_long_as_the_chunk, by_keyword),
        *(sample_by_sample, steps_in_reverse, longest),
    )
]


def named(cases):
    return pytest.mark.parametrize(("case", "parts"), cases, ids=[c.__name__ for c, _ in cases])


@named([*MOVED, *PACKED, *WITHIN])
def test_rows_count_for_their_own_samples(case, parts):
    torch.manual_seed(0)
    model = Model().double()
    expected = loop_fisher(model, parts, Y, "empirical", lambda m, b: case(m, *b))
    got = diagonal_fisher(
        model,
        [(*parts, Y)],
        "empirical",
        forward=lambda m, b: case(m, *b[:-1]),
        targets=lambda b: b[-1],
        chunk_size=CHUNK,
    )
    assert relative_error(got, expected) < 1e-12


@named([*PACKED, *WITHIN])
def test_rows_that_stay_with_their_samples_are_served_by_rules(case, parts):
    batch = tuple(part[CHUNK:] for part in parts)
    served = explain(Model().double(), batch, forward=lambda m, b: case(m, *b))
    assert {s.engine for s in served.values()} == {"rules"}

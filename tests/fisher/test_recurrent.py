"""Recurrent layers and cells: a rule per sequence, against torch's own layers one by one."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from support.reference import loop_fisher, relative_error

LENGTHS = torch.tensor([3, 5, 1, 5, 2, 4, 3])


class Sequences(nn.Module):
    """A recurrent layer and a head on its outputs and last states."""

    def __init__(self, layer, *, packed=False, learned_start=False, **options):
        super().__init__()
        self.body = layer(3, 4, **options)
        batch = (2 if options.get("bidirectional") else 1) * options.get("num_layers", 1)
        self.start = nn.Parameter(torch.randn(batch, 1, 4)) if learned_start else None
        self.head, self.packed = nn.LazyLinear(4), packed

    def forward(self, x, lengths):
        first = self.body.batch_first
        if not first:
            x = x.transpose(0, 1)
        start = None if self.start is None else self.start.expand(-1, len(lengths), -1)
        if isinstance(self.body, nn.LSTM) and start is not None:
            start = start, torch.tanh(start)
        if self.packed:
            x = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        out, last = self.body(x, start)
        if self.packed:
            out = pad_packed_sequence(out, batch_first=first)[0]
        last = last[0] if isinstance(last, tuple) else last
        last = last.transpose(0, 1).flatten(1)
        return self.head(torch.cat([out.sum(1 if first else 0), last], 1))


OPTIONS = {
    "plain": {"batch_first": True},
    "time first": {},
    "no bias": {"batch_first": True, "bias": False},
    "two layers": {"batch_first": True, "num_layers": 2},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "packed": {"batch_first": True, "packed": True},
    "packed both ways": {"packed": True, "bidirectional": True, "num_layers": 2},
    "learned start": {"batch_first": True, "learned_start": True},
}
LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


def forward(model, batch):
    return model(batch[0], batch[1])


def built(layer, options, dtype=torch.float64):
    torch.manual_seed(0)
    model = Sequences(LAYERS[layer], **OPTIONS[options])
    x, y = torch.randn(7, 5, 3, dtype=torch.float64), torch.arange(7) % 4
    model(x.float(), LENGTHS)  # sizes the head
    return model.to(dtype).eval(), x.to(dtype), y


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_rules_serve_recurrent_layers_exactly(layer, options):
    model, x, y = built(layer, options)
    served = explain(model, (x, LENGTHS, y), forward=forward)
    assert {s.engine for s in served.values()} == {"rules"}, served
    got = diagonal_fisher(model, [(x, LENGTHS, y)], "exact", forward=forward, chunk_size=3)
    expected = loop_fisher(model, (x, LENGTHS), y, "exact", forward)
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("layer", LAYERS)
def test_float32_is_within_1e_4(layer):
    model, x, y = built(layer, "packed both ways", torch.float32)
    got = diagonal_fisher(model, [(x, LENGTHS, y)], "exact", forward=forward)
    expected = loop_fisher(model.double(), (x.double(), LENGTHS), y, "exact", forward)
    assert relative_error(got, expected) < 1e-4


class Stepwise(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_rules_serve_cells_called_in_a_loop(cell):
    torch.manual_seed(0)
    model, x, y = Stepwise(cell).double().eval(), torch.randn(7, 5, 3).double(), torch.arange(7) % 4
    assert {s.engine for s in explain(model, (x, y)).values()} == {"rules"}
    got = diagonal_fisher(model, [(x, y)], "exact")
    assert relative_error(got, loop_fisher(model, x, y, "exact")) < 1e-12


def test_projected_states_fall_back():
    torch.manual_seed(0)
    model = Sequences(nn.LSTM, batch_first=True)
    model.body = nn.LSTM(3, 4, proj_size=2, batch_first=True)
    model.head = nn.Linear(4, 4)
    model, x, y = model.double().eval(), torch.randn(7, 5, 3).double(), torch.arange(7) % 4
    assert explain(model, (x, LENGTHS), forward=forward)["body.weight_hr_l0"].engine != "rules"
    got = diagonal_fisher(model, [(x, LENGTHS, y)], "exact", forward=forward)
    assert relative_error(got, loop_fisher(model, (x, LENGTHS), y, "exact", forward)) < 1e-12

"""`nn.LSTM`, `nn.GRU` and `nn.RNN`, unrolled with their matrix products in sight.

Torch runs a whole layer in one function, which hides the gradients at its gates. Here the product
with the inputs of all steps is one call of `F.linear`. That with the hidden states is recorded as
one call on all steps too: its input is known after the last step, before any gradient is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) or (h, c), each [N, H]
# Maps (W_hh, b_hh, tensor like the result) to b_hh [N, T, G], W_hh, and what takes the hidden
# states [N, T, H] before each step.
Recurrence = Callable[
    [Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Callable[[Tensor], None]]
]


def _lstm(gates: Tensor, state: State) -> State:
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _rnn_tanh(gates: Tensor, state: State) -> State:
    return (torch.tanh(gates),)


def _rnn_relu(gates: Tensor, state: State) -> State:
    return (torch.relu(gates),)


def _gru(x: Tensor, hh: Tensor, state: State) -> State:
    """From both products, which the reset gate keeps apart."""
    H = state[0].size(1)
    x_gates, x_new = x.split((2 * H, H), 1)
    h_gates, h_new = hh.split((2 * H, H), 1)
    r, z = torch.sigmoid(x_gates + h_gates).chunk(2, 1)
    new = torch.tanh(x_new + r * h_new)
    return (new + z * (state[0] - new),)


# Steps that take the sum of both products; None for the GRU's, which takes each.
_LAYERS = {
    torch.lstm: _lstm,
    torch.gru: None,
    torch.rnn_tanh: _rnn_tanh,
    torch.rnn_relu: _rnn_relu,
}
_CELLS = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: None,
    torch.rnn_tanh_cell: _rnn_tanh,
    torch.rnn_relu_cell: _rnn_relu,
}
RECURRENT = {*_LAYERS, *_CELLS}


@dataclass(frozen=True)
class _Call:
    """A call of one of torch's functions for whole layers.

    Attributes:
        x: Inputs [N, T, I], padded.
        alive: Of packed sequences [N, T, 1]: whether they are as long as each step.
        order: Of packed sequences: the place of each in the order of their lengths.
        state: Each [layers * directions, N, H].
        weights: W_ih, W_hh and the biases of each layer and direction.
    """

    x: Tensor
    alive: Tensor | None
    order: Tensor | None
    batch_first: bool
    state: State
    weights: list[Tensor]
    biased: bool
    layers: int
    directions: int


def plain_call(func: Any, args: Any, kwargs: dict[str, Any], order: Tensor | None) -> _Call | None:
    """The call; None where it drops out, projects its states or has no axis for samples."""
    if func not in _LAYERS or kwargs:
        return None
    packed = isinstance(args[3], (list, tuple))
    if packed:
        x, sizes, hx, weights, biased, layers, dropout, train, both = args
        batch_first = True
        x = torch._pad_packed_sequence(x, sizes, True, 0.0, len(sizes))[0]
        n = torch.arange(len(x), device="cpu")[:, None]
        alive = (sizes.cpu() > n).to(x.device)[..., None]
    else:
        x, hx, weights, biased, layers, dropout, train, both, batch_first = args
        alive = order = None
        x = x if batch_first else x.transpose(0, 1)
    directions = 2 if both else 1
    plain = len(weights) == layers * directions * (4 if biased else 2)
    if not plain or x.dim() != 3 or (train and dropout):
        return None
    state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    if alive is not None and order is not None:  # a rule wants the samples in the batch's order
        x, alive = x[order], alive[order]
        state = tuple(s[:, order] for s in state)
    weights = list(weights)
    return _Call(x, alive, order, batch_first, state, weights, biased, layers, directions)


def unrolled(
    func: Any, call: _Call, linear: Callable[..., Tensor], recurrence: Recurrence
) -> tuple[Tensor, ...]:
    """Compute what torch's function returns for a supported call.

    Args:
        func: The function.
        call: Its call.
        linear: `F.linear`, seen by the trace.
        recurrence: The same for the product with the hidden states, whose input comes later.

    Returns:
        The outputs, and the last states.
    """
    x, alive = call.x, call.alive
    last: list[State] = []
    weights = iter(call.weights)
    for _ in range(call.layers):
        outputs = []
        for direction in range(call.directions):
            w_ih, w_hh = next(weights), next(weights)
            b_ih, b_hh = (next(weights), next(weights)) if call.biased else (None, None)
            state = tuple(s[len(last)] for s in call.state)
            bias, weight, record = recurrence(w_hh, b_hh, gates := linear(x, w_ih, b_ih))
            step = _steps(func, gates, bias, weight.t())
            order = range(x.size(1))
            before: list[Tensor] = []
            after: list[Tensor] = []
            for t in reversed(order) if direction else order:
                before.append(state[0])
                new = step(t, state)
                if alive is not None:
                    pairs = zip(new, state, strict=True)
                    new = tuple(torch.where(alive[:, t], now, old) for now, old in pairs)
                state = new
                after.append(state[0])
            if direction:
                before.reverse()
                after.reverse()
            record(torch.stack(before, 1).detach())
            outputs.append(torch.stack(after, 1))
            last.append(state)
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    states = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
    if alive is not None:
        lengths = alive[..., 0].sum(1)
        if call.order is not None:
            by_length = call.order.argsort()
            x, lengths = x[by_length], lengths[by_length]
            states = tuple(s[:, by_length] for s in states)
        return torch._pack_padded_sequence(x, lengths.cpu(), True)[0], *states
    return (x if call.batch_first else x.transpose(0, 1)), *states


def _steps(
    func: Any, gates: Tensor, bias: Tensor, weight_t: Tensor
) -> Callable[[int, State], State]:
    """The step at time t, from the input's products and the hidden states' bias [N, T, G]."""
    cell = _LAYERS[func]
    if cell is None:
        x, h = gates.unbind(1), bias.unbind(1)
        return lambda t, state: _gru(x[t], torch.addmm(h[t], state[0], weight_t), state)
    both = (gates + bias).unbind(1)
    return lambda t, state: cell(torch.addmm(both[t], state[0], weight_t), state)


def cell(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute what torch's function for one step returns; None for any other function."""
    if func not in _CELLS or kwargs:
        return None
    x, hx, w_ih, w_hh, *biases = args
    b_ih, b_hh = biases or (None, None)
    state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    products = F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh)
    step = _CELLS[func]
    new = _gru(*products, state) if step is None else step(products[0] + products[1], state)
    return new if len(new) > 1 else new[0]

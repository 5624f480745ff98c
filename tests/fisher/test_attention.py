"""Attention as the function mode runs it: what torch gives, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ewc_plugin.fisher.tracing.attention import attention, plain_call

T, N, E, HEADS = 5, 3, 8, 2
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * (T - n) + [True] * n for n in range(N)])


class Through(TorchFunctionMode):
    """Runs `attention` where torch's function is called, and counts how often."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and (call := plain_call(args, kwargs)):
            self.count += 1
            return attention(call)
        return func(*args, **kwargs)


def outputs_and_gradients(layer, x, options):
    x = x.clone().requires_grad_()
    out, weights = layer(x, x, x, **options)
    parts = [out] if weights is None else [out, weights]
    loss = sum((part * torch.arange(part.numel()).view_as(part)).sum() for part in parts)
    return [*parts, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def assert_as_torch(layer, x, options, ours):
    expected = outputs_and_gradients(layer, x, options)
    with Through() as mode:
        got = outputs_and_gradients(layer, x, options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert mode.count == ours


def layer_of(**settings):
    torch.manual_seed(0)
    return nn.MultiheadAttention(E, HEADS, dtype=torch.float64, **settings)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": True},
        {"attn_mask": 0.3 * torch.arange(T * T, dtype=torch.float64).view(T, T)},
        {"attn_mask": CAUSAL.expand(N * HEADS, T, T)},
        {"key_padding_mask": PADDED},
        {"key_padding_mask": PADDED, "need_weights": True},
        {"key_padding_mask": PADDED, "attn_mask": CAUSAL, "is_causal": True},
        {"key_padding_mask": torch.where(PADDED, -torch.inf, 0.0).double()},
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_as_torch(batch_first, bias, options):
    layer = layer_of(bias=bias, batch_first=batch_first)
    x = normal(N, T, E) if batch_first else normal(T, N, E)
    assert_as_torch(layer, x, {"need_weights": False, **options}, ours=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same_values", [True, False])
@pytest.mark.parametrize("width", [E, 3])  # another width than the queries': separate weights
def test_cross_attention_as_torch(width, same_values, bias):
    layer, memory = layer_of(bias=bias, kdim=width, vdim=width), normal(T + 2, N, width)
    values = memory if same_values else normal(T + 2, N, width)
    query = normal(T, N, E)
    expected = layer(query, memory, values)
    with Through() as mode:
        got = layer(query, memory, values)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert mode.count == 1


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_rare_calls_are_left_to_torch(settings):
    layer = layer_of(batch_first=True, **settings)
    assert_as_torch(layer, normal(N, T, E), {"need_weights": False}, ours=0)


def test_one_sample_without_a_batch_axis_is_torchs():
    layer = layer_of()
    assert_as_torch(layer, normal(T, E), {"need_weights": False}, ours=0)


@pytest.mark.parametrize(
    ("width", "options", "said"),
    [
        (E + 1, {}, "embedding dimension"),
        (E, {"is_causal": True}, "Need attn_mask"),
    ],
)
def test_a_wrong_call_gives_torchs_error(width, options, said):
    layer = layer_of(batch_first=True)
    x = normal(N, T, width)
    with Through(), pytest.raises((AssertionError, RuntimeError), match=said):
        layer(x, x, x, need_weights=False, **options)

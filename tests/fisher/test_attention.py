"""Attention as the function mode runs it: what torch gives, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ewc_plugin.fisher.tracing import attention as attention_module
from ewc_plugin.fisher.tracing.attention import attention

T, N, E, HEADS = 5, 3, 8, 2
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * (T - n) + [True] * n for n in range(N)])


class Through(TorchFunctionMode):
    """Runs `attention` where torch's function is called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.multi_head_attention_forward:
            func = attention
        return func(*args, **(kwargs or {}))


def outputs_and_gradients(layer, x, options):
    x = x.clone().requires_grad_()
    out, weights = layer(x, x, x, **options)
    parts = [out] if weights is None else [out, weights]
    loss = sum((part * torch.arange(part.numel()).view_as(part)).sum() for part in parts)
    return [*parts, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def assert_as_torch(layer, x, options):
    expected = outputs_and_gradients(layer, x, options)
    with Through():
        got = outputs_and_gradients(layer, x, options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def layer_of(**settings):
    torch.manual_seed(0)
    return nn.MultiheadAttention(E, HEADS, dtype=torch.float64, **settings)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def torchs_code_only_raises(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("torch's own code was run")

    monkeypatch.setattr(attention_module, "_torch_attention", fail)


@pytest.mark.usefixtures("torchs_code_only_raises")
@pytest.mark.parametrize("options", [{}, {"attn_mask": CAUSAL, "is_causal": True}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_goes_the_short_way(batch_first, bias, options):
    layer = layer_of(bias=bias, batch_first=batch_first)
    x = normal(N, T, E) if batch_first else normal(T, N, E)
    assert_as_torch(layer, x, {"need_weights": False, **options})


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"need_weights": True}),
        ({}, {"attn_mask": CAUSAL}),
        ({}, {"key_padding_mask": PADDED}),
        ({}, {"key_padding_mask": PADDED, "attn_mask": CAUSAL, "is_causal": True}),
        ({"add_bias_kv": True}, {}),
        ({"add_zero_attn": True}, {}),
        ({"kdim": E, "vdim": E}, {}),
    ],
)
def test_any_other_call_is_torchs(settings, options):
    layer = layer_of(batch_first=True, **settings)
    assert_as_torch(layer, normal(N, T, E), {"need_weights": False, **options})


def test_one_sample_without_a_batch_axis_is_torchs():
    layer = layer_of()
    assert_as_torch(layer, normal(T, E), {"need_weights": False})


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

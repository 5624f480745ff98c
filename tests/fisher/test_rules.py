"""Equal forms of one rule against each other and the plain loop over samples, in float64."""

import pytest
import torch
from torch import nn

from ewc_plugin.fisher.diagonal import diagonal_fisher, explain
from ewc_plugin.fisher.rules import conv as conv_rules
from ewc_plugin.fisher.rules import products
from ewc_plugin.fisher.rules.registry import LAYER_RULES, register_rule

CONVOLUTION = conv_rules.Convolution("conv2d")


def plain(g, a):
    return sum((g_n.T @ a_n).square() for g_n, a_n in zip(g, a, strict=True))


@pytest.mark.parametrize("T", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("large", [1, 2**15], ids=["one by one", "in a buffer"])
def test_product_forms_agree(T, large, monkeypatch):
    monkeypatch.setattr(products, "_LARGE", large)
    monkeypatch.setitem(products._BUFFER_ENTRIES, "cpu", 40)
    g, a = torch.randn(5, T, 3).double(), torch.randn(5, T, 4).double()
    into = torch.ones(3, 4).double()
    products.add_product_squares(g, a, into)
    torch.testing.assert_close(into, 1 + plain(g, a), rtol=1e-12, atol=1e-13)
    into.fill_(1)
    products.add_pair_squares(g.transpose(0, 1), a.transpose(0, 1), into)
    torch.testing.assert_close(into, 1 + plain(g, a), rtol=1e-11, atol=1e-12)


def convolution():
    """A call, its input, three gradients at its output and the plain squares of each."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    a = torch.randn(6, 3, 4, 5).double()
    out = layer(a)
    gs = [torch.randn_like(out) for _ in range(3)]
    call = CONVOLUTION.bind(a, layer.weight, None, (2, 1), (1, 2), (1, 2))
    return layer, call, a, out, gs


def plain_squares(layer, out, gs, images=1):
    """One sample of so many images after the other, through autograd."""
    expected = torch.zeros_like(layer.weight)
    for g in gs:
        for rows in torch.arange(len(out)).split(images):
            alone = torch.zeros_like(g).index_copy_(0, rows, g[rows])
            (grad,) = torch.autograd.grad(out, layer.weight, alone, retain_graph=True)
            expected += grad.square()
    return expected.detach()


@pytest.mark.parametrize("form", ["by taps", "one by one", "grouped", "unfolded together"])
def test_convolution_forms_agree(form, monkeypatch):
    monkeypatch.setattr(conv_rules, "MAX_PAIRS", 10**6)
    monkeypatch.setattr(conv_rules, "_LARGE", 0 if form == "one by one" else 10**9)
    layer, call, a, out, (g, *_) = convolution()
    into = torch.zeros_like(layer.weight).detach()
    if form == "by taps":
        conv_rules._add_weight(call.options, a[:, None], g[:, None], into)
    elif form == "unfolded together":
        assert conv_rules._add_unfolded_together(call.options, a[:, None], g[:, None], into)
    else:
        conv_rules._add_grouped(call.options, a[:, None], g[:, None], into)
    torch.testing.assert_close(into, plain_squares(layer, out, [g]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("entries", [1, 200, 10**6])  # one row of the output, two, all three
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("S", [1, 3])
def test_unfolded_samples_agree_with_autograd(S, images, entries, memory_format, monkeypatch):
    monkeypatch.setattr(conv_rules, "_UNFOLDED_ENTRIES", entries)
    layer, call, a, out, gs = convolution()
    a, *gs = (
        t.contiguous(memory_format=memory_format).unflatten(0, (-1, images)) for t in (a, *gs)
    )
    into = torch.ones_like(layer.weight).detach()
    conv_rules._add_unfolded(call.options, a, gs[:S], into)
    expected = 1 + plain_squares(layer, out, [g.flatten(0, 1) for g in gs[:S]], images)
    torch.testing.assert_close(into, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 5), (6, 3), (9, 5), (999, 5)])
def test_vectors_wait_for_each_other_in_blocks_of_like_size(count, size):
    _, call, _, _, (g, *_) = convolution()
    assert CONVOLUTION.block_size(call, g[:, None], count) == size


def test_large_gradients_and_tiny_maps_do_not_wait(monkeypatch):
    _, call, _, _, (g, *_) = convolution()
    assert CONVOLUTION.block_size(call, g[:, None, :, :1, :1], 9) == 1
    monkeypatch.setattr(conv_rules, "_BLOCK_ENTRIES", 2 * g.numel())
    assert CONVOLUTION.block_size(call, g[:, None], 9) == 2
    monkeypatch.setattr(conv_rules, "_BLOCK_ENTRIES", 1)
    assert CONVOLUTION.block_size(call, g[:, None], 9) == 1


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale


@pytest.fixture
def scale_rule():
    yield lambda rule: register_rule(Scale)(rule)
    LAYER_RULES.pop(Scale, None)


def scaled():
    torch.manual_seed(0)
    return nn.Sequential(Scale(), nn.ReLU(inplace=True), nn.Linear(6, 4)).double()


def test_registered_rule_serves_its_layer(scale_rule):
    model, batch = scaled(), (torch.randn(7, 6).double(),)
    expected = diagonal_fisher(model, [batch], "exact")
    assert explain(model, batch)["0.scale"].detail == "broadcast"
    scale_rule(lambda layer, a, g: {"scale": (a * g).square().sum(0)})
    assert explain(model, batch)["0.scale"].detail == "Scale"
    assert not model[0]._forward_hooks
    got = diagonal_fisher(model, [batch], "exact", engine="rules")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=0)


def test_wrong_registered_rule_is_left_aside(scale_rule):
    model, batch = scaled(), (torch.randn(7, 6).double(),)
    expected = diagonal_fisher(model, [batch])
    scale_rule(lambda layer, a, g: {"scale": (a * g).sum(0).square()})  # squares a sum
    served = explain(model, batch)["0.scale"]
    assert (served.engine, served.detail) == ("vmap", "the layer rule disagrees with the loop")
    torch.testing.assert_close(diagonal_fisher(model, [batch])["0.scale"], expected["0.scale"])


def test_registered_rule_must_return_every_parameter(scale_rule):
    scale_rule(lambda layer, a, g: {})
    with pytest.raises(ValueError, match=r"registered for Scale must return .* `scale`, got None"):
        diagonal_fisher(scaled(), [(torch.randn(7, 6).double(),)])

"""Convolutions and transposed convolutions in 1 to 3 dimensions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_plugin.rules.base import LayerCall, LayerRule, Sums, channel_sums
from ewc_plugin.rules.products import MAX_PAIRS, add_pair_squares, add_product_squares, n_pairs

_LARGE = 2**15  # entries of a weight above which one sample at a time is faster than a group
_GROUP = 16  # samples in one grouped convolution
_FEW_CHANNELS = 4


@dataclass(frozen=True)
class _Geometry:
    """The arguments of a convolution, one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] = ()  # of a transposed convolution; else empty

    @property
    def transposed(self) -> bool:
        return bool(self.output_padding)


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _bind(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> LayerCall:
    axes = weight.dim() - 2
    dilations = _per_axis(dilation, axes)
    if padding == "same":  # an odd total puts the larger half behind: pad the input itself
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        input = F.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
    if isinstance(padding, str):
        padding = 0
    geometry = _Geometry(_per_axis(stride, axes), _per_axis(padding, axes), dilations, groups)
    return LayerCall(input, {"weight": weight, "bias": bias}, geometry)


def _bind_transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> LayerCall:
    axes = weight.dim() - 2
    geometry = _Geometry(
        _per_axis(stride, axes),
        _per_axis(padding, axes),
        _per_axis(dilation, axes),
        groups,
        _per_axis(output_padding, axes),
    )
    return LayerCall(input, {"weight": weight, "bias": bias}, geometry)


def _add(call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
    """F_W += sum_n (weight gradient of sample n)^2; F_b += sum_n (sum of g_n over positions)^2.

    a [N, K, I, ...] and g [N, K, O, ...], with K images per sample.
    """
    geometry: _Geometry = call.options
    if name := call.names.get("weight"):
        _add_weight(geometry, a, g, into[name])
    if name := call.names.get("bias"):
        into[name].add_(channel_sums(g).square_().sum(0))


def _add_weight(geometry: _Geometry, a: Tensor, g: Tensor, into: Tensor) -> None:
    if geometry.groups == 1 and a.size(1) == 1 and not geometry.transposed:
        positions = math.prod(g.shape[3:])
        if n_pairs(positions) <= MAX_PAIRS:
            _add_by_taps(geometry, a[:, 0], g[:, 0], into)
            return
    if a.device.type != "cpu" and _add_unfolded(geometry, a, g, into):
        return
    if (into.numel() >= _LARGE and geometry.groups == 1) or a.size(2) < _FEW_CHANNELS:
        for a_n, g_n in zip(a.unbind(0), g.unbind(0), strict=True):  # [K, I, ...], [K, O, ...]
            gradient = _weight_gradient(geometry, a_n, g_n, into.shape)
            into.addcmul_(gradient, gradient)
        return
    for a_part, g_part in zip(a.split(_GROUP), g.split(_GROUP), strict=True):
        # Each sample a group of its own, its K images the batch: [K, n * I, ...].
        n, (out_channels, *rest) = len(a_part), into.shape
        a_part, g_part = (t.transpose(0, 1).flatten(1, 2) for t in (a_part, g_part))
        gradients = _weight_gradient(geometry, a_part, g_part, (n * out_channels, *rest), n)
        into.add_(gradients.view(n, *into.shape).square_().sum(0))


def _weight_gradient(
    geometry: _Geometry, a: Tensor, g: Tensor, shape: Sequence[int], n: int = 1
) -> Tensor:
    """Gradient of a weight of this shape, summed over the images; n as many groups as usual."""
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g,
        a,
        g.new_empty(1).expand(*shape),  # only a shape
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding or (0,) * len(geometry.stride),
        n * geometry.groups,
        (False, True, False),
    )[1]
    return gradient


def _add_unfolded(geometry: _Geometry, a: Tensor, g: Tensor, into: Tensor) -> bool:
    """Products with the unfolded input, where a GPU would run grouped convolutions one by one.

    Returns:
        Whether the call could be served so.
    """
    if geometry.groups > 1 or geometry.transposed or len(geometry.stride) != 2 or a.size(1) > 1:
        return False
    columns = F.unfold(
        a[:, 0], into.shape[2:], geometry.dilation, geometry.padding, geometry.stride
    )  # [N, I * taps, L]
    add_product_squares(g.flatten(3)[:, 0].mT, columns.mT, into.flatten(1))
    return True


def _add_by_taps(geometry: _Geometry, a: Tensor, g: Tensor, into: Tensor) -> None:
    """For outputs of a few positions: one product over samples and pairs of positions per tap.

    A tap (an offset in the kernel) pairs an output position with one input position, or with the
    padding, where it contributes nothing: on a 1 x 1 map only one tap of a 3 x 3 kernel is alive.
    """
    sizes, positions = a.shape[2:], list(product(*(range(size) for size in g.shape[2:])))
    a_first = a.flatten(2).permute(2, 0, 1).contiguous()  # [input positions, N, I]
    g_first = g.flatten(2).permute(2, 0, 1).contiguous()  # [output positions, N, O]
    for column, tap in enumerate(product(*(range(size) for size in into.shape[2:]))):
        alive = []  # (output position, input position)
        for i, position in enumerate(positions):
            source = [
                o * s + k * d - p
                for o, k, s, d, p in zip(
                    position, tap, geometry.stride, geometry.dilation, geometry.padding, strict=True
                )
            ]
            if all(0 <= x < size for x, size in zip(source, sizes, strict=True)):
                flat = 0
                for x, size in zip(source, sizes, strict=True):
                    flat = flat * size + x
                alive.append((i, flat))
        if alive:
            outputs, inputs = (list(ends) for ends in zip(*alive, strict=True))
            squares = into.new_zeros(into.shape[:2])
            add_pair_squares(g_first[outputs], a_first[inputs], squares)
            into.flatten(2)[..., column].add_(squares)  # a view: sums are contiguous


CONVOLUTIONS = tuple(
    LayerRule(name, function, _bind, _add)
    for name, function in (("conv1d", F.conv1d), ("conv2d", F.conv2d), ("conv3d", F.conv3d))
) + tuple(
    LayerRule(name, function, _bind_transposed, _add)
    for name, function in (
        ("conv_transpose1d", F.conv_transpose1d),
        ("conv_transpose2d", F.conv_transpose2d),
        ("conv_transpose3d", F.conv_transpose3d),
    )
)

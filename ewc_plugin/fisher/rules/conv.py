"""Layer rules of convolutions and transposed convolutions in 1 to 3 dimensions.

The squares of the weight are computed in one of four ways, each the fastest somewhere:

- By taps (`_add_by_taps`): one product per kernel offset over all samples and pairs of output
  positions. For outputs of few positions (`MAX_PAIRS`), one image per sample, on any device.
- Unfolded (`_add_unfolded`): each sample's input is unfolded in turn and multiplied with the
  gradients of one or several score vectors. On a CPU, for several vectors, a large weight or an
  input of few channels.
- Unfolded together (`_add_unfolded_together`): all inputs are unfolded at once. On other devices,
  in 2 dimensions, one image per sample.
- Grouped (`_add_grouped`): the convolution that is the weight's gradient, with a group per sample;
  one sample at a time where the weight is large. Everything else, so always for transposed and
  grouped convolutions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_plugin.fisher.rules.base import (
    LayerCall,
    LayerRule,
    Sums,
    TakesSeveral,
    channel_sums,
    device_kind,
)
from ewc_plugin.fisher.rules.products import (
    MAX_PAIRS,
    add_pair_squares,
    add_product_squares,
    n_pairs,
)

_LARGE = 2**15  # weights with more entries: one sample at a time beats a grouped convolution
_FEW_CHANNELS = 4  # inputs with fewer channels: one sample at a time is faster, too
_GROUP = 16  # samples in one grouped convolution
_UNFOLDED_ENTRIES = 2**20  # of an unfolded input, at a time
# CPU matrix products whose row length is not a multiple of 8 run up to a third slower.
_VECTOR = 8
# Score vectors whose gradients are collected: more than five are hardly faster, and every call of
# the network keeps its own at the same time.
_BLOCK_VECTORS, _BLOCK_ENTRIES = 5, 2**22


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

    @property
    def plain(self) -> bool:
        """Whether the convolution is ungrouped and not transposed."""
        return self.groups == 1 and not self.transposed


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


class Convolution(LayerRule, TakesSeveral):
    """Rule of `F.conv1d` to `F.conv3d`; a call's `options` are its `_Geometry`."""

    def bind(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> LayerCall:
        """The arguments of `F.conv1d`, `F.conv2d` and `F.conv3d`."""
        axes = weight.dim() - 2
        dilations = _per_axis(dilation, axes)
        if padding == "same":  # an odd total puts the larger half behind: pad the input itself
            total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            input = F.pad(input.detach(), sides)
        if isinstance(padding, str):
            padding = 0
        geometry = _Geometry(_per_axis(stride, axes), _per_axis(padding, axes), dilations, groups)
        return LayerCall(input, {"weight": weight, "bias": bias}, geometry)

    def add(self, call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
        """F_W += sum_n (weight gradient of sample n)^2; F_b += sum_n (sum of g_n over positions)^2.

        a [N, K, I, ...] and g [N, K, O, ...], with K images per sample.
        """
        self.add_several(call, a, [g], into)

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """Gradients of the weight and sums of g_n over positions."""
        return _per_sample(call, a, g)

    def block_size(self, call: LayerCall, g: Tensor, count: int) -> int:
        """Number of vectors that share one unfolding of the input, in blocks of similar size."""
        if not _unfolds(call.options, g):
            return 1
        most = min(_BLOCK_VECTORS, max(1, _BLOCK_ENTRIES // g.numel()))
        return math.ceil(count / math.ceil(count / most))

    def add_several(self, call: LayerCall, a: Tensor, gs: list[Tensor], into: Sums) -> None:
        """Do what `add` does for each gradient in `gs`; unfold the input at most once."""
        geometry: _Geometry = call.options
        if name := call.names.get("weight"):
            F_weight = into[name]
            pays = len(gs) > 1 or F_weight.numel() >= _LARGE or a.size(2) < _FEW_CHANNELS
            if pays and _unfolds(geometry, gs[0]):
                _add_unfolded(geometry, a, gs, F_weight)
            else:
                for g in gs:
                    _add_weight(geometry, a, g, F_weight)
        if name := call.names.get("bias"):
            for g in gs:
                into[name].add_(channel_sums(g).square_().sum(0))


class TransposedConvolution(LayerRule):
    """Rule of `F.conv_transpose1d` to `F.conv_transpose3d`."""

    def bind(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> LayerCall:
        """The arguments of `F.conv_transpose1d`, `F.conv_transpose2d` and `F.conv_transpose3d`."""
        axes = weight.dim() - 2
        geometry = _Geometry(
            _per_axis(stride, axes),
            _per_axis(padding, axes),
            _per_axis(dilation, axes),
            groups,
            _per_axis(output_padding, axes),
        )
        return LayerCall(input, {"weight": weight, "bias": bias}, geometry)

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """As for `Convolution`."""
        return _per_sample(call, a, g)

    def add(self, call: LayerCall, a: Tensor, g: Tensor, into: Sums) -> None:
        """As for `Convolution`."""
        if name := call.names.get("weight"):
            _add_weight(call.options, a, g, into[name])
        if name := call.names.get("bias"):
            into[name].add_(channel_sums(g).square_().sum(0))


def _per_sample(call: LayerCall, a: Tensor, g: Tensor) -> Sums:
    gradients = {}
    if name := call.names.get("weight"):
        weight = call.params["weight"]
        assert weight is not None
        gradients[name] = _grouped_gradients(call.options, a, g, weight.shape)
    if name := call.names.get("bias"):
        gradients[name] = channel_sums(g)
    return gradients


def _unfolds(geometry: _Geometry, g: Tensor) -> bool:
    """Whether to unfold the inputs one sample at a time: possible, and no method is faster."""
    return device_kind(g) == "cpu" and geometry.plain and not _by_taps(g)


def _by_taps(g: Tensor) -> bool:
    """Whether there are few enough pairs of positions for one product over all of them."""
    return g.size(1) == 1 and n_pairs(math.prod(g.shape[3:])) <= MAX_PAIRS


def _add_weight(geometry: _Geometry, a: Tensor, g: Tensor, into: Tensor) -> None:
    if geometry.plain:
        if _by_taps(g):
            _add_by_taps(geometry, a[:, 0], g[:, 0], into)
            return
        if device_kind(a) != "cpu" and _add_unfolded_together(geometry, a, g, into):
            return
    _add_grouped(geometry, a, g, into)


def _add_unfolded(geometry: _Geometry, a: Tensor, gs: list[Tensor], into: Tensor) -> None:
    """Unfold one sample's input at a time into a reused buffer; multiply once for all of `gs`.

    On a CPU this beats one convolution per sample and vector, by more the more vectors share it.
    """
    S, out = len(gs), gs[0].shape[3:]
    windows = _windows(geometry, a, into.shape[2:], out)  # [N, I, taps, K, *out]
    rows = max(1, _UNFOLDED_ENTRIES * out[0] // windows[0].numel())  # of the output, at a time
    memory = into.new_empty(windows[0].narrow(-len(out), 0, min(rows, out[0])).numel())
    blocks = []  # built once: it does not depend on the sample
    for start in range(0, out[0], rows):
        size = min(rows, out[0] - start)
        parts = windows.narrow(-len(out), start, size)
        unfolded = memory[: parts[0].numel()].view(parts.shape[1:])
        columns = unfolded.view(into[0].numel(), -1).T  # [K * positions, I * taps]
        g_parts = [g.narrow(3, start, size).transpose(1, 2).flatten(2) for g in gs]
        stacked = into.new_empty(S, *g_parts[0].shape[1:] if S > 1 else ())
        views = list(zip(parts.unbind(0), *(g.unbind(0) for g in g_parts), strict=True))
        blocks.append((views, unfolded, columns, stacked))
    turned = into[0].numel() % _VECTOR > 0
    shape = (S * len(into), into[0].numel())
    product = into.new_empty(shape[::-1] if turned else shape)
    total = into.flatten(1) if S == 1 and not turned else torch.zeros_like(product)
    for n in range(len(a)):
        for i, (views, unfolded, columns, stacked) in enumerate(blocks):
            window, g_n, *more = views[n]
            unfolded.copy_(window)
            if more:
                g_n = torch.stack([g_n, *more], out=stacked).flatten(0, 1)
            factors = (columns.T, g_n.T) if turned else (g_n, columns)
            if i == 0:
                torch.mm(*factors, out=product)
            else:
                product.addmm_(*factors)
        total.addcmul_(product, product)
    if turned:
        total = total.T
    if S > 1 or turned:
        into.flatten(1).add_(total.reshape(S, len(into), -1).sum(0))


def _windows(geometry: _Geometry, a: Tensor, kernel: Sequence[int], out: Sequence[int]) -> Tensor:
    """[N, I, *kernel, K, *out] from a [N, K, I, ...]: what each tap sees, a view where unpadded."""
    if any(geometry.padding):
        a = F.pad(a, [p for p in reversed(geometry.padding) for _ in range(2)])
    samples, images, channels, *strides = a.stride()
    taps = [stride * d for stride, d in zip(strides, geometry.dilation, strict=True)]
    steps = [stride * s for stride, s in zip(strides, geometry.stride, strict=True)]
    return a.as_strided(
        (len(a), a.size(2), *kernel, a.size(1), *out),
        (samples, channels, *taps, images, *steps),
        a.storage_offset(),
    )


def _add_grouped(geometry: _Geometry, a: Tensor, g: Tensor, into: Tensor) -> None:
    """Compute weight gradients by a convolution, for a group of samples or one at a time."""
    if into.numel() >= _LARGE and geometry.groups == 1:
        for a_n, g_n in zip(a.unbind(0), g.unbind(0), strict=True):  # [K, I, ...], [K, O, ...]
            gradient = _weight_gradient(geometry, a_n, g_n, into.shape)
            into.addcmul_(gradient, gradient)
        return
    for a_part, g_part in zip(a.split(_GROUP), g.split(_GROUP), strict=True):
        into.add_(_grouped_gradients(geometry, a_part, g_part, into.shape).square_().sum(0))


def _grouped_gradients(geometry: _Geometry, a: Tensor, g: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradients of the weight [N, *shape]: each sample a group of its own, its K images a batch."""
    n, (out_channels, *rest) = len(a), shape
    a, g = (t.transpose(0, 1).flatten(1, 2) for t in (a, g))  # [K, n * I, ...]
    return _weight_gradient(geometry, a, g, (n * out_channels, *rest), n).view(n, *shape)


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


def _add_unfolded_together(geometry: _Geometry, a: Tensor, g: Tensor, into: Tensor) -> bool:
    """Unfold all inputs and multiply once: for GPUs, where grouped convolutions are slow.

    Returns:
        Whether the call could be served so.
    """
    if len(geometry.stride) != 2 or a.size(1) > 1:
        return False
    columns = F.unfold(
        a[:, 0], into.shape[2:], geometry.dilation, geometry.padding, geometry.stride
    )  # [N, I * taps, L]
    add_product_squares(g.flatten(3)[:, 0].mT, columns.mT, into.flatten(1))
    return True


def _add_by_taps(geometry: _Geometry, a: Tensor, g: Tensor, into: Tensor) -> None:
    """For outputs with few positions: one product per tap over samples and position pairs.

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

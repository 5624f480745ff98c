"""Normalisation layers: out = x_hat * weight + bias, with x_hat free of both."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ewc_plugin.fisher.rules.base import LayerCall, LayerRule, Sums, channel_sums

Normalise = Callable[[Tensor], Tensor]  # a call's `options`: [N * K, ...] to x_hat


def _add_channels(call: LayerCall, x_hat: Tensor, g: Tensor, into: Sums) -> None:
    """F_w += sum_n (sum_t g_nt x_hat_nt)^2; F_b += sum_n (sum_t g_nt)^2; [N, K, C, ...]."""
    if name := call.names.get("weight"):
        into[name].add_(channel_sums(x_hat * g).square_().sum(0))
    if name := call.names.get("bias"):
        into[name].add_(channel_sums(g).square_().sum(0))


def _add_features(call: LayerCall, x_hat: Tensor, g: Tensor, into: Sums) -> None:
    """The same where weight and bias have the shape of the trailing axes; [N, K, ..., *shape]."""
    for role, name in call.names.items():
        terms = x_hat * g if role == "weight" else g
        into[name].add_(terms.reshape(len(g), -1, *into[name].shape).sum(1).square_().sum(0))


def _x_hat(call: LayerCall, a: Tensor) -> Tensor:
    if "weight" not in call.names:
        return a  # which nobody reads
    normalise: Normalise = call.options
    return normalise(a.flatten(0, 1)).view_as(a)


def _bind_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> LayerCall:
    def normalise(a: Tensor) -> Tensor:
        assert running_mean is not None and running_var is not None
        shape = (1, -1, *(1,) * (a.dim() - 2))
        scale = (running_var.to(a.dtype) + eps).rsqrt().view(shape)
        return a.sub(running_mean.to(a.dtype).view(shape)).mul_(scale)

    return LayerCall(input, {"weight": weight, "bias": bias}, normalise)


def _bind_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> LayerCall:
    return LayerCall(
        input,
        {"weight": weight, "bias": bias},
        # On a CPU it takes twice as long without a weight.
        lambda a: F.layer_norm(a, list(normalized_shape), a.new_ones(normalized_shape), eps=eps),
    )


def _bind_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> LayerCall:
    return LayerCall(
        input, {"weight": weight}, lambda a: F.rms_norm(a, list(normalized_shape), eps=eps)
    )


def _bind_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> LayerCall:
    return LayerCall(
        input, {"weight": weight, "bias": bias}, lambda a: F.group_norm(a, num_groups, eps=eps)
    )


def _bind_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> LayerCall:
    def normalise(a: Tensor) -> Tensor:
        if use_input_stats:  # without the running statistics, which the call would update
            return F.instance_norm(a, eps=eps)
        assert running_mean is not None and running_var is not None
        stats = running_mean.to(a.dtype), running_var.to(a.dtype)
        return F.instance_norm(a, *stats, use_input_stats=False, eps=eps)

    return LayerCall(input, {"weight": weight, "bias": bias}, normalise)


NORMS = tuple(
    LayerRule(name, function, bind, add, prepare=_x_hat)
    for name, function, bind, add in (
        ("batch_norm", F.batch_norm, _bind_batch_norm, _add_channels),
        ("layer_norm", F.layer_norm, _bind_layer_norm, _add_features),
        ("rms_norm", F.rms_norm, _bind_rms_norm, _add_features),
        ("group_norm", F.group_norm, _bind_group_norm, _add_channels),
        ("instance_norm", F.instance_norm, _bind_instance_norm, _add_channels),
    )
)

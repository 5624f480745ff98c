"""Rules of normalisation layers: out = x_hat * weight + bias; x_hat depends on neither."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ewc_plugin.fisher.outputs import SamplesInteractError
from ewc_plugin.fisher.rules.base import LayerCall, LayerRule, Sums, channel_sums

Normalise = Callable[[Tensor], Tensor]  # a call's `options`: [N * K, ...] to x_hat


class _Norm(LayerRule):
    """The rule of a layer whose call has, as its `options`, the function that gives x_hat."""

    def prepare(self, call: LayerCall, a: Tensor) -> Tensor:
        """x_hat from a [N, K, ...]; `a` itself where the weight is frozen and nobody reads it."""
        if "weight" not in call.names:
            return a
        normalise: Normalise = call.options
        return normalise(a.flatten(0, 1)).view_as(a)


class _ChannelNorm(_Norm):
    """Base of rules whose weight and bias have one entry per channel."""

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """Of the weight sum_t g_nt x_hat_nt, of the bias sum_t g_nt; a and g [N, K, C, ...]."""
        return {
            name: channel_sums(a * g if role == "weight" else g)
            for role, name in call.names.items()
        }


class _FeatureNorm(_Norm):
    """Base of rules whose weight and bias have the shape of the trailing axes."""

    def per_sample(self, call: LayerCall, a: Tensor, g: Tensor) -> Sums:
        """The same sums over all other axes of a sample; a and g [N, K, ..., *shape]."""
        gradients = {}
        for role, name in call.names.items():
            p = call.params[role]
            assert p is not None
            terms = a * g if role == "weight" else g
            gradients[name] = terms.reshape(len(g), -1, *p.shape).sum(1)
        return gradients


class BatchNorm(_ChannelNorm):
    """Rule of `F.batch_norm` in eval mode; with batch statistics, samples would interact."""

    def bind(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> LayerCall:
        """The arguments of `F.batch_norm`; raises where it would use batch statistics."""
        if training or running_mean is None or running_var is None:
            raise SamplesInteractError(
                "`model` runs BatchNorm on batch statistics (training=True or no running "
                "statistics), so its samples interact and no per-sample Fisher exists. Keep the "
                "layer in eval mode with track_running_stats=True, or use fisher_type 'batched'."
            )
        mean, var = running_mean, running_var

        def normalise(a: Tensor) -> Tensor:
            shape = (1, -1, *(1,) * (a.dim() - 2))
            scale = (var.to(a.dtype) + eps).rsqrt().view(shape)
            return a.sub(mean.to(a.dtype).view(shape)).mul_(scale)

        return LayerCall(input, {"weight": weight, "bias": bias}, normalise)


class LayerNorm(_FeatureNorm):
    """Rule of `F.layer_norm`: normalises over the trailing axes."""

    def bind(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> LayerCall:
        """The arguments of `F.layer_norm`."""
        shape = list(normalized_shape)
        return LayerCall(
            input,
            {"weight": weight, "bias": bias},
            # On a CPU it takes twice as long without a weight.
            lambda a: F.layer_norm(a, shape, a.new_ones(shape), eps=eps),
        )


class RMSNorm(_FeatureNorm):
    """Rule of `F.rms_norm`: over the trailing axes, without mean or bias."""

    def bind(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> LayerCall:
        """The arguments of `F.rms_norm`."""
        shape = list(normalized_shape)
        return LayerCall(input, {"weight": weight}, lambda a: F.rms_norm(a, shape, eps=eps))


class GroupNorm(_ChannelNorm):
    """Rule of `F.group_norm`: normalises over groups of channels."""

    def bind(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> LayerCall:
        """The arguments of `F.group_norm`."""
        return LayerCall(
            input, {"weight": weight, "bias": bias}, lambda a: F.group_norm(a, num_groups, eps=eps)
        )


class InstanceNorm(_ChannelNorm):
    """Rule of `F.instance_norm`: over the positions of a channel, or by running statistics."""

    def bind(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> LayerCall:
        """The arguments of `F.instance_norm`."""

        def normalise(a: Tensor) -> Tensor:
            if use_input_stats:  # without the running statistics, which the call would update
                return F.instance_norm(a, eps=eps)
            assert running_mean is not None and running_var is not None
            stats = running_mean.to(a.dtype), running_var.to(a.dtype)
            return F.instance_norm(a, *stats, use_input_stats=False, eps=eps)

        return LayerCall(input, {"weight": weight, "bias": bias}, normalise)

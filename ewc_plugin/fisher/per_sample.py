"""The slower engines, for whatever no layer rule serves: `vmap(grad)`, and a loop over samples."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ewc_plugin.batches import Batch, copied, has_samples, join, n_samples, take
from ewc_plugin.fisher.model_call import Forward, ModelCall
from ewc_plugin.fisher.rules.base import Sums, sum_dtype

_VMAP_ENTRIES = 2**26  # of per-sample gradients held at a time


class _Bound(nn.Module):
    """Model and forward as one module, whose parameters `functional_call` can replace."""

    def __init__(self, call: ModelCall) -> None:
        super().__init__()
        self.model = call.model
        self._call = call.forward

    def forward(self, batch: Batch) -> Tensor:
        return self._call(self.model, batch)


def vmap_squares(call: ModelCall, batch: Batch, vectors: Tensor) -> Sums:
    """sum_n sum_s (J_n^T v_ns)^2 by `torch.func`.

    Args:
        call: The model and the parameters that are replaced.
        batch: N samples.
        vectors: [N, S, C], in the logits' dtype.

    Returns:
        The sums, one per parameter.
    """
    bound = _Bound(call)
    values = {f"model.{name}": p.detach() for name, p in call.params.items()}
    leaves, tree = tree_flatten(batch)
    axes = tuple(0 if has_samples(leaf) else None for leaf in leaves)

    def squares(v: Tensor, *sample: Any) -> dict[str, Tensor]:
        one = tree_unflatten(
            [s[None] if axis == 0 else s for s, axis in zip(sample, axes, strict=True)], tree
        )
        pull_back = vjp(lambda p: functional_call(bound, p, (one,))[0], values)[1]
        total: dict[str, Tensor] = {}
        for v_s in v.unbind(0):
            (grads,) = pull_back(v_s)
            for name, grad in grads.items():
                square = grad.to(sum_dtype(grad)).square()
                total[name] = total[name] + square if name in total else square
        return total

    step = max(1, _VMAP_ENTRIES // sum(p.numel() for p in call.params.values()))
    sums = zeros(call.params)
    for part in _slices(len(vectors), step):
        sliced = tree_flatten(take(batch, part))[0]
        # Other parameters need no gradients. Silence vmap's "performance drop" warning: this is
        # already the fallback.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            squared = vmap(squares, in_dims=(0, *axes))(vectors[part], *sliced)
        for name, s in squared.items():
            sums[name.removeprefix("model.")] += s.sum(0)
    return sums


def taking_single_samples(model: nn.Module, forward: Forward, batch: Batch) -> Forward:
    """`forward`; for a model that can't take a batch of one sample, with a copy beside a lone one.

    A `squeeze()` that also takes the sample axis away is the usual reason, as in Avalanche's
    `MTSimpleCNN`.

    Args:
        model: In eval mode.
        forward: Maps (model, batch) to logits.
        batch: Its first sample is tried.

    Returns:
        A forward that takes a single sample, if the model takes two.
    """
    try:
        with torch.no_grad():
            logits = forward(model, copied(take(batch, slice(0, 1))))
        if not isinstance(logits, Tensor) or (logits.dim() == 2 and len(logits) == 1):
            return forward
    except Exception:  # whatever a model's code raises; a real fault is raised again by two
        pass

    def beside_a_copy(model: nn.Module, batch: Batch) -> Tensor:
        if n_samples(batch) > 1:
            return forward(model, batch)
        return forward(model, join([batch, copied(batch)]))[:1]

    return beside_a_copy


def loop_squares(call: ModelCall, batch: Batch, vectors: Tensor) -> Sums:
    """The same as `vmap_squares`, one sample at a time: for models that vmap can't follow."""
    sums = zeros(call.params)
    for n in range(n_samples(batch)):
        logits = call.forward(call.model, take(batch, slice(n, n + 1)))
        add_gradient_squares(sums, call.params, logits, vectors[n])
    return sums


def add_gradient_squares(
    sums: Sums, params: dict[str, nn.Parameter], logits: Tensor, vectors: Tensor
) -> Sums:
    """Adds sum_s (J^T v_s)^2 of one sample, from its logits [1, C] and vectors [S, C]."""
    if logits.requires_grad:
        for s, v in enumerate(vectors):
            grads = torch.autograd.grad(
                logits,
                list(params.values()),
                v[None],
                retain_graph=s < len(vectors) - 1,
                allow_unused=True,
            )
            for name, grad in zip(params, grads, strict=True):
                if grad is not None:
                    dense = (grad.to_dense() if grad.is_sparse else grad).to(sums[name].dtype)
                    sums[name].addcmul_(dense, dense)
    return sums


def zeros(params: dict[str, nn.Parameter]) -> Sums:
    """A zero sum for each parameter."""
    return {
        name: torch.zeros(p.shape, dtype=sum_dtype(p), device=p.device)
        for name, p in params.items()
    }


def _slices(N: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, N, step))

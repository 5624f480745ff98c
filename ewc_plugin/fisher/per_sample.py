"""The two slower engines, for parameters without a layer rule: `vmap(grad)` and a sample loop."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ewc_plugin.batches import Batch, has_samples, n_samples, take
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.outputs import INTERACT, SamplesInteractError, is_half, outputs_agree
from ewc_plugin.fisher.rules.base import Sums, sum_dtype

_VMAP_ENTRIES = 2**26  # of per-sample gradients in memory at a time


class _Bound(nn.Module):
    """Wraps model and forward function in a module, for `functional_call`."""

    def __init__(self, call: ModelCall) -> None:
        super().__init__()
        self.model = call.model
        self._call = call

    def forward(self, batch: Batch) -> Tensor:
        return self._call.functional(self.model, batch)


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
    try:
        for part in _slices(len(vectors), step):
            sliced = tree_flatten(take(batch, part))[0]
            # Other parameters need no gradients. Silence vmap's "performance drop" warning: this is
            # already the fallback.
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                call.state.restore()
                squared = vmap(squares, in_dims=(0, *axes))(vectors[part], *sliced)
            for name, s in squared.items():
                sums[name.removeprefix("model.")] += s.sum(0)
    finally:
        call.state.restore()  # attributes set by the forward pass hold invalid functorch tensors
    return sums


def loop_squares(call: ModelCall, batch: Batch, logits: Tensor, vectors: Tensor) -> Sums:
    """The same as `vmap_squares`, one sample at a time: the reference of every other engine.

    Args:
        call: The model and the parameters.
        batch: N samples.
        logits: [N, C], of the samples together.
        vectors: [N, S, C], in the logits' dtype.

    Returns:
        The sums, one per parameter.

    Raises:
        SamplesInteractError: A sample has other logits alone.
    """
    sums, half = zeros(call.params), is_half(logits, call.params)
    for n in range(n_samples(batch)):
        alone = call.sample_logits(batch, n)
        if not outputs_agree(alone, logits[n : n + 1], logits, half):
            raise SamplesInteractError(
                f"`model` gives a sample other logits alone than in a batch of {len(logits)}: "
                f"{INTERACT}"
            )
        add_gradient_squares(sums, call, alone, vectors[n])
    return sums


def add_gradient_squares(sums: Sums, call: ModelCall, logits: Tensor, vectors: Tensor) -> Sums:
    """Add sum_s (J^T v_s)^2 of one sample, from its logits [1, C] and vectors [S, C]."""
    if logits.requires_grad:
        for s, v in enumerate(vectors):
            grads = _gradients(call, logits, v[None], retain_graph=s < len(vectors) - 1)
            for name, grad in zip(call.params, grads, strict=True):
                if grad is not None:
                    dense = (grad.to_dense() if grad.is_sparse else grad).to(sums[name].dtype)
                    sums[name].addcmul_(dense, dense)
    return sums


def _gradients(
    call: ModelCall, logits: Tensor, v: Tensor, retain_graph: bool
) -> list[Tensor | None]:
    params = list(call.params.values())
    if not call.by_backward:
        return list(
            torch.autograd.grad(logits, params, v, retain_graph=retain_graph, allow_unused=True)
        )
    everything = [p for p in call.model.parameters() if p.requires_grad]
    kept = [(p, p.grad, p._post_accumulate_grad_hooks) for p in everything]
    try:
        for p in everything:
            p.grad = None
            p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        torch.autograd.backward(logits, v, retain_graph=retain_graph)
        return [p.grad for p in params]
    finally:
        for p, grad, hooks in kept:
            p.grad, p._post_accumulate_grad_hooks = grad, hooks


def zeros(params: dict[str, nn.Parameter]) -> Sums:
    """A zero sum for each parameter."""
    return {
        name: torch.zeros(p.shape, dtype=sum_dtype(p), device=p.device)
        for name, p in params.items()
    }


def _slices(N: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, N, step))

"""The two slower engines, for parameters without a layer rule: `vmap(grad)` and a sample loop."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ewc_plugin.batches import Batch, has_samples, has_values_beside_tensors, n_samples, take
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

    Raises:
        RuntimeError: Several samples have values that are no tensor: each would see those of all.
    """
    if len(vectors) > 1 and has_values_beside_tensors(batch):
        raise RuntimeError("samples have values that are no tensor")
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
    sums = zeros(call.params)
    for n in range(n_samples(batch)):
        alone = own_logits(call, batch, logits, n)
        add_gradient_squares(sums, call, alone, vectors[n])
    return sums


def own_logits(call: ModelCall, batch: Batch, logits: Tensor, n: int) -> Tensor:
    """The logits [1, C] of one sample alone, compared with those of its batch.

    Args:
        call: The model.
        batch: N samples.
        logits: [N, C], of the samples together.
        n: Which sample.

    Returns:
        Its logits.

    Raises:
        SamplesInteractError: They are others.
    """
    alone = call.sample_logits(batch, n)
    if not outputs_agree(alone, logits[n : n + 1], logits, is_half(logits, call.params)):
        raise SamplesInteractError(
            f"`model` gives a sample other logits alone than in a batch of {len(logits)}: "
            f"{INTERACT}"
        )
    return alone


def add_gradient_squares(sums: Sums, call: ModelCall, logits: Tensor, vectors: Tensor) -> None:
    """Add sum_s (J^T v_s)^2 of one sample, from its logits [1, C] and vectors [S, C].

    A parameter without an entry in `sums` gets one: fresh memory is written once.
    """

    def add(name: str, g: Tensor) -> None:
        if name in sums:
            sums[name].addcmul_(g, g)
        else:
            sums[name] = torch.mul(g, g, out=torch.empty(g.shape, dtype=g.dtype, device=g.device))

    each_gradient(call, logits, vectors, add)


def gradient_squares(call: ModelCall, logits: Tensor, vectors: Tensor) -> Sums:
    """The squares of one sample alone, 0 for a parameter that its logits do not depend on."""
    sums: Sums = {}
    add_gradient_squares(sums, call, logits, vectors)
    sums |= zeros({name: p for name, p in call.params.items() if name not in sums})
    return {name: sums[name] for name in call.params}  # a backward pass has another order


def each_gradient(
    call: ModelCall, logits: Tensor, vectors: Tensor, use: Callable[[str, Tensor], None]
) -> None:
    """Call `use(name, J^T v_s)` for each parameter that one sample's logits depend on.

    It is called during the backward pass, which drops each gradient afterwards: together they are
    as large as the model, and fresh memory takes longer than what is computed in it.

    Args:
        call: The model and the parameters.
        logits: [1, C].
        vectors: [S, C].
        use: Takes a parameter's name and gradient, dense and in the dtype of the sums.
    """

    def use_dense(name: str, g: Tensor) -> None:
        dense = g.to_dense() if g.is_sparse else g
        use(name, dense.to(sum_dtype(call.params[name])))

    def hook(name: str) -> Callable[[Tensor], Tensor]:
        def instead(g: Tensor) -> Tensor:
            use_dense(name, g)
            return g if g.is_sparse else g.new_zeros(()).expand_as(g)

        return instead

    if not logits.requires_grad:
        return
    hooks = [(p, p._backward_hooks) for p in call.params.values()]
    handles = []
    try:
        if not call.by_backward:
            handles = [p.register_hook(hook(name)) for name, p in call.params.items()]
        for s, v in enumerate(vectors):
            grads = gradients_of(call, logits, v[None], retain_graph=s < len(vectors) - 1)
            for name, g in zip(call.params, grads, strict=True):
                if g is not None and call.by_backward:
                    use_dense(name, g)
    finally:
        for handle in handles:
            handle.remove()
        for p, before in hooks:
            if before is None:
                p._backward_hooks = None


def check_backward_is_linear(call: ModelCall, batch: Batch, v: Tensor) -> None:
    """Raise if a hook or a custom function makes the backward pass of a sample nonlinear.

    With one score per sample, the squares are those of the gradient that training sees, whatever
    hooks do to it. Several vectors per sample are weighted scores: their squares add up to an
    expectation only if the backward pass is linear.

    Args:
        call: The model.
        batch: Samples, of which the first one is run.
        v: Two vectors [2, C] at its logits.

    Raises:
        ValueError: The gradient of v_0 + 2 v_1 is not that of v_0 plus twice that of v_1.
    """
    logits = call.sample_logits(batch, 0)
    if not logits.requires_grad:
        return
    combined = v[0] + 2 * v[1]
    rows = [
        gradients_of(call, logits, vector[None], retain_graph=vector is not combined)
        for vector in (v[0], v[1], combined)
    ]
    sizes = [typical(_largest([g]) for g in grads) for grads in rows]
    if max(sizes) == 0:
        return
    # A gradient that is zero in exact arithmetic is noise, as large as rounding errors elsewhere.
    noise = 1024 * torch.finfo(logits.dtype).eps * (sizes[0] + 2 * sizes[1])
    tolerance = 0.1 if is_half(logits, call.params) else 1e-3
    for name, first, second, both in zip(call.params, *rows, strict=True):
        if first is None or second is None or both is None or not both.numel():
            continue
        first, second, both = (g.to_dense() if g.is_sparse else g for g in (first, second, both))
        off = float((both - first - 2 * second).abs().max())
        if off > tolerance * _largest([first, second, both]) + noise:
            raise ValueError(
                f"The backward pass of `model` is not linear in the gradient at its outputs (seen "
                f"at `{name}`): a hook or a custom autograd function clips or normalises "
                "gradients. Several score vectors per sample then give no Fisher. Use fisher_type "
                "'predicted' or 'empirical', or 'sampled' with one draw, or remove the hook."
            )


def _largest(gradients: Iterable[Tensor | None]) -> float:
    """Return the largest absolute entry; 0 where there is none."""
    found = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    return max((float(g.abs().max()) for g in found if g.numel()), default=0.0)


def gradients_of(
    call: ModelCall, outputs: Tensor, v: Tensor | None, *, retain_graph: bool
) -> list[Tensor | None]:
    """J^T v of each parameter, by `backward()` where `autograd.grad` would see less.

    Args:
        call: The parameters, and whether it takes `backward()`.
        outputs: Of the model; or a loss.
        v: Of the same shape; None for a loss.
        retain_graph: Whether the graph is needed again.

    Returns:
        One per parameter; None where the outputs do not depend on it.
    """
    params = list(call.params.values())
    if not call.by_backward:
        return list(
            torch.autograd.grad(outputs, params, v, retain_graph=retain_graph, allow_unused=True)
        )
    everything = [p for p in call.model.parameters() if p.requires_grad]
    kept = [(p, p.grad, p._post_accumulate_grad_hooks) for p in everything]
    try:
        for p in everything:
            p.grad = None
            p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        torch.autograd.backward(outputs, v, retain_graph=retain_graph)
        return [p.grad for p in params]
    finally:
        for p, grad, hooks in kept:
            p.grad, p._post_accumulate_grad_hooks = grad, hooks


def typical(largest: Iterable[float]) -> float:
    """The upper quartile of the parameters' largest squares, without those that are zero.

    Unlike the largest of all, it says nothing of one column in other units, such as a time stamp.

    Args:
        largest: Of every parameter.

    Returns:
        0 where all are zero.
    """
    found = sorted(square for square in largest if square > 0)
    return found[3 * (len(found) - 1) // 4] if found else 0.0


def zeros(params: dict[str, nn.Parameter]) -> Sums:
    """A zero sum for each parameter."""
    return {
        name: torch.zeros(p.shape, dtype=sum_dtype(p), device=p.device)
        for name, p in params.items()
    }


def _slices(N: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, N, step))

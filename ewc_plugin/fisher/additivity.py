"""Whether the gradient of a batch is the sum of those that its samples have alone.

Logits may be a sample's own where gradients are not: `nn.Embedding(scale_grad_by_freq=True)`
divides them by the number of times that a word occurs in the batch, and a hook may clip them.
"""

import torch
from torch import Tensor

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.outputs import is_half
from ewc_plugin.fisher.per_sample import gradients_of, own_logits, typical, zeros
from ewc_plugin.fisher.rules.base import Sums

_TRIED = 8  # samples of a batch, half of them those with the largest scores
_TOGETHER = 1024  # with so many at most: in more, the few would drown in rounding
_TOGETHER_HALF = 32

# Largest norm of a difference, relative to the gradient's, and to a typical parameter's.
_TOLERANCES = {torch.float64: (1e-6, 1e-10), torch.float32: (0.05, 1e-4)}
_ELSEWHERE = (0.2, 1e-3)  # float32 on devices that may use TF32 or similar
_HALF = (0.25, 0.03)
_ROUNDINGS = 4  # in the gradient of a batch
_HALF_EPS = 2.0**-7


def obstacle(call: ModelCall) -> str:
    """Return why a batch may change a sample's gradients, as far as the model's parts show it.

    Args:
        call: The model.

    Returns:
        The reason, or "".
    """
    if call.hooked:
        return f"a hook on `{min(call.hooked)}` takes the gradient of all together"
    for name, module in call.model.named_modules():
        if getattr(module, "scale_grad_by_freq", False):
            return f"`{name}` has scale_grad_by_freq=True"
    return ""


def summed_gradients(
    call: ModelCall, logits: Tensor, v: Tensor, *, retain_graph: bool = False
) -> Sums:
    """sum_n J_n^T v_n of the parameters that the logits depend on."""
    if not logits.requires_grad:
        return {}
    found = gradients_of(call, logits, v, retain_graph=retain_graph)
    return {
        name: gradient.to_dense() if gradient.is_sparse else gradient
        for name, gradient in zip(call.params, found, strict=True)
        if gradient is not None
    }


def summed_alone(call: ModelCall, batch: Batch, logits: Tensor, v: Tensor, rows: Tensor) -> Sums:
    """The sum over some samples of a batch, each with a backward pass of its own."""
    total = zeros(call.params)
    for n in rows.tolist():
        alone = own_logits(call, batch, logits, n)
        for name, gradient in summed_gradients(call, alone, v[n : n + 1]).items():
            total[name] += gradient
    return total


def differing(
    call: ModelCall,
    batch: Batch,
    logits: Tensor,
    v: Tensor,
    rows: Tensor,
    together: Sums,
    generator: torch.Generator,
) -> list[str]:
    """Compare what a few samples add to the gradient of all with what they have alone.

    Args:
        call: The model.
        batch: N samples.
        logits: Theirs [N, C], with a graph, which is kept.
        v: [N, C].
        rows: Which samples have a v.
        together: Their gradient in one backward pass.
        generator: Draws samples.

    Returns:
        Names of the parameters where it is not the same.
    """

    def gradient_of(some: Tensor) -> Sums:
        masked = torch.zeros_like(v).index_copy_(0, some, v[some])
        return summed_gradients(call, logits, masked, retain_graph=True)

    if not all(bool(g.isfinite().all()) for g in together.values()):
        return []  # it is refused at the end
    half = is_half(logits, call.params)
    largest = v[rows].norm(dim=1).argsort(descending=True)[: _TRIED // 2].tolist()
    drawn = torch.randperm(len(rows), generator=generator, device="cpu").tolist()
    order = list(dict.fromkeys(largest + drawn))[: _TOGETHER_HALF if half else _TOGETHER]
    if len(order) < len(rows):
        together = gradient_of(rows[order])
    rest = gradient_of(rows[order[_TRIED:]]) if len(order) > _TRIED else {}
    alone = summed_alone(call, batch, logits, v, rows[order[:_TRIED]])
    relative, floor = _tolerances(logits, half)
    eps = _HALF_EPS if half else torch.finfo(logits.dtype).eps
    sizes, of_batch = _norms(alone), _norms(together)
    noise = floor * typical(sizes.values()) + _ROUNDINGS * eps * typical(of_batch.values())
    found = []
    for name, own in alone.items():
        allowed = relative * sizes[name] + noise + _ROUNDINGS * eps * of_batch.get(name, 0.0)
        off = own.neg()
        for gradients, sign in ((together, 1), (rest, -1)):
            if name in gradients:
                off.add_(gradients[name], alpha=sign)
        if not float(off.norm()) <= allowed:  # also where it is NaN
            found.append(name)
    return found


def _tolerances(logits: Tensor, half: bool) -> tuple[float, float]:
    if half:
        return _HALF
    if logits.dtype == torch.float32 and logits.device.type != "cpu":
        return _ELSEWHERE
    return _TOLERANCES.get(logits.dtype, _HALF)


def _norms(gradients: Sums) -> dict[str, float]:
    return {name: float(g.norm()) for name, g in gradients.items()}

"""The oracle: a loop over single samples in plain PyTorch. Imports nothing from ewc_plugin."""

import torch
from torch import Tensor, nn


def loop_fisher(model, x, y, kind, forward=None, labels=None):
    """1/N sum_n sum_c w_c (d log_softmax(logits_n)_c / d theta)^2, one autograd call per term.

    kind: "predicted", "empirical", "exact"; or "labels": the mean over the columns of
    labels [N, k]. x may be any tuple of tensors [N, ...] that `forward(model, parts)` takes.
    """
    forward = forward or (lambda model, parts: model(parts[0]))
    parts = x if isinstance(x, tuple) else (x,)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}
    N = len(parts[0])
    for n in range(N):
        logits = forward(model, tuple(part[n : n + 1] for part in parts))
        log_p = torch.log_softmax(logits, dim=1)[0]
        if kind == "predicted":
            terms = [(1.0, int(logits[0].argmax()))]
        elif kind == "empirical":
            terms = [(1.0, int(y[n]))]
        elif kind == "exact":
            terms = [(float(log_p[c].detach().exp()), c) for c in range(len(log_p))]
        else:
            terms = [(1.0 / labels.size(1), int(c)) for c in labels[n]]
        for weight, c in terms:
            if weight == 0.0:
                continue  # a masked class: log p is -inf or far below, its share is nothing
            grads = torch.autograd.grad(
                log_p[c], list(params.values()), retain_graph=True, allow_unused=True
            )
            for name, grad in zip(params, grads, strict=True):
                if grad is not None:
                    dense = grad.to_dense() if grad.is_sparse else grad
                    total[name] += weight * dense.double().square()
    return {name: t / N for name, t in total.items()}


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Max |got - expected| / max |expected|, the worst parameter."""
    assert list(got) == list(expected)
    worst = 0.0
    # A gradient that cancels to zero (a bias before a norm) is rounding noise, squared.
    floor = 1e-18 * max(e.abs().max().item() for e in expected.values())
    for name in expected:
        assert got[name].shape == expected[name].shape, name
        difference = (got[name].double() - expected[name]).abs().max().item()
        scale = max(expected[name].abs().max().item(), floor)
        worst = max(worst, difference / scale if scale else difference)
    return worst


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]

"""The oracle of every importance: each sample's gradient, by a loop. Imports no ewc_plugin."""

import torch


def sample_gradients(net, value, N):
    """Name -> [N, ...]: the gradient of value(n), a scalar that depends on sample n alone."""
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    rows = {name: [] for name in params}
    for n in range(N):
        grads = torch.autograd.grad(value(n), list(params.values()), allow_unused=True)
        for (name, p), grad in zip(params.items(), grads, strict=True):
            zero = torch.zeros_like(p)
            dense = zero if grad is None else grad.to_dense() if grad.is_sparse else grad
            rows[name].append(dense.double())
    return {name: torch.stack(found) for name, found in rows.items()}


def mean_square(gradients, N=None):
    """1/N sum_n g_n^2."""
    return {name: g.square().sum(0) / (N or len(g)) for name, g in gradients.items()}


def between_classes(gradients, labels):
    """sum_c (n_c / N) (mean of g over class c)^2, as the definition reads."""
    found = {}
    for name, g in gradients.items():
        total = torch.zeros_like(g[0])
        for c in labels.unique():
            of_class = g[labels == c]
            total += len(of_class) / len(g) * of_class.mean(0).square()
        found[name] = total
    return found


def within_classes(gradients, labels):
    """sum_c (n_c / N) variance of g within class c."""
    found = {}
    for name, g in gradients.items():
        total = torch.zeros_like(g[0])
        for c in labels.unique():
            of_class = g[labels == c]
            total += (of_class - of_class.mean(0)).square().sum(0) / len(g)
        found[name] = total
    return found

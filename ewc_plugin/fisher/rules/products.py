"""Sums over samples of squared per-sample products, by the faster of two equal formulas."""

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import device_kind

# Measured with matrices of 2^12 to 2^18 entries: a large product is squared while it is in the
# cache; small ones are batched into one call. A GPU needs few calls.
_LARGE = 2**15
_BUFFER_ENTRIES = {"cpu": 2**18, "other": 2**26}
# (sum_t g_t a_t)^2 = sum_tt' (g_t g_t')(a_t a_t'): up to so many pairs, one matrix product over
# all samples and pairs is faster than computing each sample's product.
MAX_PAIRS = 10


def n_pairs(T: int) -> int:
    """Unordered pairs of T positions, each with itself included."""
    return T * (T + 1) // 2


def pairs(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The unordered pairs of t's entries along its first axis: both indices, and how often."""
    first, second = torch.triu_indices(len(t), len(t), device=t.device)
    return first, second, torch.where(first == second, 1.0, 2.0).to(t.dtype)


def add_product_squares(g: Tensor, a: Tensor, into: Tensor) -> None:
    """Add sum_n (sum_t g_nt a_nt^T)^2 to `into` [O, I], for g [N, T, O] and a [N, T, I]."""
    if n_pairs(g.size(1)) <= MAX_PAIRS:
        add_pair_squares(g.transpose(0, 1), a.transpose(0, 1), into)
        return
    device = device_kind(into)
    if device == "cpu" and into.numel() >= _LARGE:
        one = torch.empty_like(into)
        for g_n, a_n in zip(g.transpose(1, 2).unbind(0), a.unbind(0), strict=True):
            torch.mm(g_n, a_n, out=one)
            into.addcmul_(one, one)
        return
    step = max(1, _BUFFER_ENTRIES[device] // into.numel())
    buffer = into.new_empty(min(step, len(g)), *into.shape)
    for start in range(0, len(g), step):
        g_part, a_part = g[start : start + step], a[start : start + step]
        products = torch.bmm(g_part.transpose(1, 2), a_part, out=buffer[: len(g_part)])
        into.add_(products.square_().sum(0))


def add_pair_squares(g: Tensor, a: Tensor, into: Tensor) -> None:
    """The same for g [T, N, O] and a [T, N, I], as one product over all pairs of positions."""
    if len(g) == 1:
        into.addmm_(g[0].square().T, a[0].square())
        return
    t, u, twice = pairs(g)
    into.addmm_(
        (g[t] * g[u]).mul_(twice[:, None, None]).flatten(0, 1).T, (a[t] * a[u]).flatten(0, 1)
    )

"""Parameters that are read more than once: contributions are summed per sample, then squared."""

from collections import Counter

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import JoinsCalls, Layout, Sums
from ewc_plugin.fisher.tracing.layer_calls import WATCHED_VECTORS, TracedCall, Watch

_ENTRIES = 2**20  # of per-sample gradients held at a time


class Shared:
    """Takes the gradients of one score vector at several calls, and adds their squares.

    A layer that is called k times, an embedding whose table is the last layer's too, and whatever
    is computed from parameters in a way through which squares can't be pulled back.
    """

    def __init__(self) -> None:
        self._received: list[tuple[TracedCall, Tensor, Layout]] = []
        self._n_watched = 0

    def receive(self, traced: TracedCall, g: Tensor, layout: Layout) -> None:
        """Keep a gradient g [N, K, ...] at the output of a call."""
        self._received.append((traced, g, layout))

    def add(self, N: int, into: Sums, watch: Watch | None = None) -> None:
        """Add the squares of what was received, after each score vector."""
        inputs = self._inputs(N)
        if watch is not None and self._n_watched < WATCHED_VECTORS:
            self._n_watched += 1
            _add(inputs, slice(watch.n, watch.n + 1), watch.squares)
        if not inputs or _add_joined(inputs, into):
            return
        weights = (p for t, _, _ in inputs for p in t.call.params.values() if p is not None)
        step = max(1, _ENTRIES // sum(p.numel() for p in weights))
        for start in range(0, N, step):
            _add(inputs, slice(start, start + step), into)

    def watch(self, N: int, watch: Watch) -> None:
        """Add the squares of the watched sample alone."""
        _add(self._inputs(N), slice(watch.n, watch.n + 1), watch.squares)

    def _inputs(self, N: int) -> list[tuple[TracedCall, Tensor, Tensor]]:
        received, self._received = self._received, []
        return [(t, t.prepared_input(layout, N, g.dtype), g) for t, g, layout in received]


def _add(inputs: list[tuple[TracedCall, Tensor, Tensor]], part: slice, into: Sums) -> None:
    """Add some samples' squares, their gradients summed over the calls."""
    total: Sums = {}
    for traced, a, g in inputs:
        for name, gradients in traced.per_sample(a[part], g[part]):
            total[name] = total[name] + gradients if name in total else gradients
    for name, gradients in total.items():
        squares = gradients.square().sum(0)
        into[name] = into[name].add_(squares) if name in into else squares


def _add_joined(inputs: list[tuple[TracedCall, Tensor, Tensor]], into: Sums) -> bool:
    """Add calls on the same parameters as one call on all their rows; whether that is possible."""
    first = inputs[0][0]
    rule, call = first.rule, first.call
    if not isinstance(rule, JoinsCalls) or not first.separable:
        return False
    if any(t.rule is not rule or t.call.names != call.names for t, _, _ in inputs):
        return False
    if any(t.call.options != call.options for t, _, _ in inputs):
        return False
    rows = [rule.rows(t.call, a, g) for t, a, g in inputs]
    a, g = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
    rule.add(call, a, g, first.sums(into))
    return True


def find_shared(calls: list[TracedCall]) -> list[Shared]:
    """Group the calls that share parameters or can't be squared alone; set all positions.

    Args:
        calls: Of one forward pass.

    Returns:
        What takes their gradients.
    """
    count: Counter[str] = Counter()
    for traced in calls:
        traced.position = count[traced.params[0]]
        count.update(set(traced.params))
    shared: list[Shared] = []
    for group in connected(calls):
        if len(group) > 1 or not group[0].separable:
            shared.append(Shared())
            for traced in group:
                traced.shared = shared[-1]
    return shared


def connected(calls: list[TracedCall]) -> list[list[TracedCall]]:
    """The calls in groups, between which no parameter is shared; each in order."""
    groups: list[tuple[set[str], list[int]]] = []
    for i, traced in enumerate(calls):
        names, members, others = set(traced.params), [i], []
        for group in groups:
            if names & group[0]:
                names |= group[0]
                members += group[1]
            else:
                others.append(group)
        groups = [*others, (names, members)]
    return [[calls[i] for i in sorted(members)] for _, members in groups]

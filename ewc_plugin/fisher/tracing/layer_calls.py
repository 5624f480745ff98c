"""A traced call of a layer function, and the tap that brings it the gradient at its output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import (
    LayerCall,
    LayerRule,
    Layout,
    Sums,
    TakesSeveral,
    TakesSquares,
)

WATCHED_VECTORS = 16  # of the watched sample, so that a thousand classes cost no thousand products


@dataclass
class Watch:
    """One sample of a chunk whose squares are also added up alone, for comparison with the loop.

    Attributes:
        n: Its place in the chunk.
        logits: Its logits [1, C], once they are known.
        vectors: Its score vectors [C], the first few.
        squares: Parameter name -> its squares.
        scale: The logits [N, C] of the chunk.
        unscale: What turns the gradients of `vectors` into those of the scores.
    """

    n: int
    logits: Tensor | None = None
    scale: Tensor | None = None
    unscale: float = 1.0
    vectors: list[Tensor] = field(default_factory=list)
    squares: Sums = field(default_factory=dict)

    def sees(self, v: Tensor) -> None:
        """Takes the watched sample's part of a score vector v [N, C]."""
        if len(self.vectors) < WATCHED_VECTORS:
            self.vectors.append(v[self.n].clone())


class OverwrittenError(Exception):
    """The input of a traced call was modified in place before its gradient arrived."""


@dataclass
class TracedCall:
    """One call of a layer function in a forward pass.

    It refers to no autograd graph: the graph's taps refer to it, and a cycle through both would
    never be collected.

    Attributes:
        rule: The rule of the function called.
        call: Its arguments; `call.a` is detached.
        out_shape: Shape of its output.
        version: Of `call.a`: an in-place change after the call would falsify the rule.
        squares: sum_s g_s^2 [N, K, ...] so far, where the rule takes squares.
    """

    rule: LayerRule
    call: LayerCall
    out_shape: torch.Size
    version: int
    squares: Tensor | None = None
    _block: list[Tensor] = field(default_factory=list)  # g [N, K, ...], where it takes several
    _prepared: Tensor | None = None  # the rule's own form of the input, for the next vector
    _watched: list[Tensor] = field(default_factory=list)  # g [1, K, ...] of the watched sample

    def fits(self, layout: Layout, N: int) -> bool:
        """Whether input and output hold N samples in this layout, and the input still is there."""
        shapes = (self.out_shape, self.call.a.shape)
        return self.call.a._version == self.version and all(
            len(shape) > layout.dim and shape[layout.dim] == N * layout.folded for shape in shapes
        )

    def add(
        self,
        g: Tensor,
        layout: Layout,
        N: int,
        into: Sums,
        *,
        count: int = 1,
        unscale: float = 1.0,
    ) -> None:
        """Adds the squares of one score vector's gradients g to `into`, or collects g for `finish`.

        Args:
            g: Gradient at the call's output.
            layout: Where its samples are.
            N: How many they are.
            into: Parameter name -> its sum.
            count: How many vectors there are.
            unscale: What g is multiplied by.
        """
        rule, dtype = self.rule, self.call.sum_dtype()
        g = layout.samples_first(g, N).to(dtype)
        if unscale != 1.0:
            g = g * unscale  # in the wide dtype, where nothing underflows
        if isinstance(rule, TakesSquares) and rule.takes_squares(self.call, g):
            self.squares = g.square() if self.squares is None else self.squares.addcmul_(g, g)
        elif isinstance(rule, TakesSeveral) and (size := rule.block_size(self.call, g, count)) > 1:
            self._block.append(g)
            if len(self._block) == size:
                self._add_block(layout, N, into)
        else:
            a = self._prepared
            if a is None:
                a = rule.prepare(self.call, self._input(layout, N, dtype))
                self._prepared = a if count > 1 else None
            rule.add(self.call, a, g, into)

    def watch(self, g: Tensor, layout: Layout, N: int, watch: Watch, unscale: float = 1.0) -> None:
        """Keeps the watched sample's part of a gradient, for `finish`."""
        if len(self._watched) < WATCHED_VECTORS:
            own = layout.samples_first(g, N)[watch.n : watch.n + 1]
            self._watched.append(own.to(self.call.sum_dtype(), copy=True) * unscale)

    def watch_squares(self) -> None:
        """Watches the squares of all vectors together instead of their gradients."""
        self._watched = []

    def fresh(self) -> "TracedCall":
        """The same call, with nothing collected."""
        return TracedCall(self.rule, self.call, self.out_shape, self.version)

    def finish(self, layout: Layout, N: int, into: Sums, watch: Watch | None = None) -> None:
        """Adds what was collected, after the last vector."""
        if watch is not None:
            self._add_watched(layout, N, watch)
        if self.squares is not None:
            assert isinstance(self.rule, TakesSquares)
            a = self._input(layout, N, self.squares.dtype)
            self.rule.add_squares(self.call, a, self.squares, into)
            self.squares = None
        if self._block:
            self._add_block(layout, N, into)
        self._prepared = None

    def _add_watched(self, layout: Layout, N: int, watch: Watch) -> None:
        dtype = self.call.sum_dtype()
        a = self._input(layout, N, dtype)[watch.n : watch.n + 1]
        for role, name in self.call.names.items():
            p = self.call.params[role]
            assert p is not None
            watch.squares[name] = torch.zeros_like(p.detach(), dtype=dtype)
        if not self._watched and self.squares is not None:  # of all vectors together
            assert isinstance(self.rule, TakesSquares)
            own = self.squares[watch.n : watch.n + 1]
            self.rule.add_squares(self.call, a, own, watch.squares)
            return
        prepared = self.rule.prepare(self.call, a)
        for g in self._watched:
            self.rule.add(self.call, prepared, g, watch.squares)
        self._watched = []

    def _add_block(self, layout: Layout, N: int, into: Sums) -> None:
        assert isinstance(self.rule, TakesSeveral)
        a = self._input(layout, N, self._block[0].dtype)
        self.rule.add_several(self.call, a, self._block, into)
        self._block = []

    def _input(self, layout: Layout, N: int, dtype: torch.dtype) -> Tensor:
        if self.call.a._version != self.version:
            raise OverwrittenError(", ".join(self.call.names.values()))
        a = layout.samples_first(self.call.a, N)
        return a.to(dtype) if a.is_floating_point() else a


OnGradient = Callable[[TracedCall, Tensor], None]


class Tap(torch.autograd.Function):
    """Identity; its backward passes the gradient on to `on_gradient`."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, anchor: Tensor, traced: TracedCall, on_gradient: OnGradient
    ) -> Tensor:
        """Return the output, connected to `anchor`: differentiating the anchor reaches this tap."""
        ctx.traced, ctx.on_gradient = traced, on_gradient
        # `.data` is neither the input nor a view of it: autograd lets both in-place operations on
        # the result pass, and the operation before never looks at its own output again.
        return out.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        """The gradient, once it was seen."""
        (g,) = grads
        ctx.on_gradient(ctx.traced, g)
        return (g if ctx.needs_input_grad[0] else None), None, None, None


@dataclass
class Trace:
    """What one forward pass recorded.

    Attributes:
        anchor: A scalar that every tap is connected to; differentiating it visits every tap.
        calls: The traced calls in order.
        inputs: The input of each of them, with its graph.
        of_registered_rules: Parameters of layers with a registered rule; they stay in the graph.
        untraceable: Parameters seen in a call that no rule can serve, each with the reason.
        picked_rows: Whether rows were picked by the data, as by a mask of tokens.
    """

    anchor: Tensor
    calls: list[TracedCall] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    of_registered_rules: set[str] = field(default_factory=set)
    untraceable: dict[str, str] = field(default_factory=dict)
    picked_rows: bool = False

    def pull_back(self, logits: Tensor, v: Tensor, *, retain_graph: bool) -> None:
        """Sends v [N, C] back from the logits; each traced call meets its gradient."""
        if self.calls and logits.requires_grad:
            torch.autograd.grad(
                logits, [self.anchor], v, retain_graph=retain_graph, allow_unused=True
            )


def has_custom_function(root: Tensor) -> bool:
    """Whether the graph of `root` has an autograd function written in Python, taps aside."""
    return any(
        isinstance(node, torch.autograd.function.BackwardCFunction) and not hasattr(node, "traced")
        for node in _nodes(root)
    )


def parameters_in_graph(root: Tensor) -> set[int]:
    """Ids of the leaves that the autograd graph of `root` reaches: uses that no tap stands for."""
    return {id(node.variable) for node in _nodes(root) if hasattr(node, "variable")}


def _nodes(root: Tensor) -> set[Any]:
    seen: set[Any] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(edge for edge, _ in node.next_functions)
    return seen

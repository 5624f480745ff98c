"""`TracedCall` stores a layer call; a `Tap` passes it the gradient at the call's output."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import (
    LayerCall,
    LayerRule,
    Layout,
    Sums,
    TakesSeveral,
    TakesSquares,
    sum_dtype,
)
from ewc_plugin.fisher.tracing.lineage import Source

WATCHED_VECTORS = 16  # of the watched sample, so that a thousand classes cost no thousand products

HOOKED = "a hook changes its gradient"  # which the loop alone calls, sample by sample


@dataclass
class Watch:
    """An audited sample of a chunk: its own squares are stored, to compare with the loop.

    Attributes:
        n: Its place in the chunk.
        logits: Its logits [1, C], once they are known.
        vectors: Its score vectors [C], the first few.
        squares: Parameter name -> its squares.
        scale: The logits [N, C] of the chunk.
        unscale: Factor that converts gradients of `vectors` to those of the scores.
    """

    n: int
    logits: Tensor | None = None
    scale: Tensor | None = None
    unscale: float = 1.0
    vectors: list[Tensor] = field(default_factory=list)
    squares: Sums = field(default_factory=dict)

    def sees(self, v: Tensor) -> None:
        """Store the watched sample's row of a score vector v [N, C]."""
        if len(self.vectors) < WATCHED_VECTORS:
            self.vectors.append(v[self.n].clone())


class OverwrittenError(Exception):
    """The input of a traced call was modified in place before its gradient arrived."""


class Receives(Protocol):
    """Protocol of an object that takes the gradients of several calls."""

    def receive(self, traced: "TracedCall", g: Tensor, layout: Layout) -> None:
        """Keep a gradient g [N, K, ...]."""


@dataclass
class TracedCall:
    """One call of a layer function in a forward pass.

    It refers to no autograd graph: the graph's taps refer to it, and a cycle through both would
    never be collected.

    Attributes:
        rule: The rule of the function called.
        call: Its arguments; `call.a` is detached.
        out_shape: Shape of its output.
        version: Version counter of `call.a`, to detect an in-place change after the call.
        sources: What the names of `call` stand for; a name without one is a parameter's.
        shared: Takes its gradients, where other calls read its parameters too.
        position: Of this call among those of its first parameter.
        squares: sum_s g_s^2 [N, K, ...] so far, where the rule takes squares.
    """

    rule: LayerRule
    call: LayerCall
    out_shape: torch.Size
    version: int
    sources: dict[str, Source] = field(default_factory=dict)
    shared: "Receives | None" = None
    position: int = 0
    squares: Tensor | None = None
    _of_sources: Sums = field(default_factory=dict)  # squares of those that are no parameters
    _block: list[Tensor] = field(default_factory=list)  # g [N, K, ...], where it takes several
    _prepared: Tensor | None = None  # the rule's own form of the input, for the next vector
    _watched: list[Tensor] = field(default_factory=list)  # g [1, K, ...] of the watched sample

    @property
    def params(self) -> list[str]:
        """Names of its trainable parameters, one for each way in which it reads them."""
        names: list[str] = []
        for name in self.call.names.values():
            names += self.sources[name].params if name in self.sources else (name,)
        return names

    @property
    def separable(self) -> bool:
        """Whether the squares of what it reads can be taken one by one."""
        selects = all(source.selects for source in self.sources.values())
        return selects and len(set(self.params)) == len(self.params)

    def fresh(self) -> "TracedCall":
        """A copy of this call without stored gradients."""
        return TracedCall(self.rule, self.call, self.out_shape, self.version, self.sources)

    def fits(self, layout: Layout, N: int) -> bool:
        """Whether input and output have N samples in this layout, and the input is still stored."""
        shapes = (self.out_shape, self.call.a.shape)
        return (
            self.call.a._version == self.version
            and all(
                len(shape) > layout.dim and shape[layout.dim] == N * layout.folded
                for shape in shapes
            )
            and self.rule.fits(self.call, layout)
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
        """Add the squares of one score vector's gradients g to `into`, or collect g for `finish`.

        Args:
            g: Gradient at the call's output.
            layout: Where its samples are.
            N: How many they are.
            into: Parameter name -> its sum.
            count: How many vectors there are.
            unscale: What g is multiplied by.
        """
        rule = self.rule
        g = self.samples_first(g, layout, N, unscale)
        if self.shared is not None:
            self.shared.receive(self, g, layout)
            return
        if isinstance(rule, TakesSquares) and rule.takes_squares(self.call, g):
            self.squares = g.square() if self.squares is None else self.squares.addcmul_(g, g)
        elif isinstance(rule, TakesSeveral) and (size := rule.block_size(self.call, g, count)) > 1:
            self._block.append(g)
            if len(self._block) == size:
                self._add_block(layout, N, into)
        else:
            a = self._prepared
            if a is None:
                a = self.prepared_input(layout, N, g.dtype)
                self._prepared = a if count > 1 else None
            rule.add(self.call, a, g, self.sums(into))

    def watch(self, g: Tensor, layout: Layout, N: int, watch: Watch, unscale: float = 1.0) -> None:
        """Keep the watched sample's part of a gradient, for `finish`."""
        self.call.sample_dim = layout.dim
        if self.shared is None and len(self._watched) < WATCHED_VECTORS:
            own = layout.samples_first(g, N)[watch.n : watch.n + 1]
            self._watched.append(own.to(self.call.sum_dtype(), copy=True) * unscale)

    def watch_squares(self) -> None:
        """Watches the squares of all vectors together instead of their gradients."""
        self._watched = []

    def finish(self, layout: Layout, N: int, into: Sums, watch: Watch | None = None) -> None:
        """Add the stored gradients' squares, after the last score vector."""
        if watch is not None:
            self._add_watched(layout, N, watch)
        if self.squares is not None:
            assert isinstance(self.rule, TakesSquares)
            a = self._input(layout, N, self.squares.dtype)
            self.rule.add_squares(self.call, a, self.squares, self.sums(into))
            self.squares = None
        if self._block:
            self._add_block(layout, N, into)
        self._prepared = None
        self._add_of_sources(into)

    def _add_of_sources(self, into: Sums) -> None:
        for name, squares in self._of_sources.items():
            self.sources[name].add_squares(squares, into)
        self._of_sources = {}

    def samples_first(self, g: Tensor, layout: Layout, N: int, unscale: float = 1.0) -> Tensor:
        """A gradient at its output as [N, K, ...], in the dtype of the sums."""
        self.call.sample_dim = layout.dim
        g = layout.samples_first(g, N).to(self.call.sum_dtype())
        return g * unscale if unscale != 1.0 else g  # in the wide dtype, where nothing underflows

    def prepared_input(self, layout: Layout, N: int, dtype: torch.dtype) -> Tensor:
        """Its input as the rule takes it, [N, K, ...]."""
        return self.rule.prepare(self.call, self._input(layout, N, dtype))

    def per_sample(self, a: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Gradients [N, ...] by parameter, from a prepared input and g [N, K, ...]."""
        for name, gradients in self.rule.per_sample(self.call, a, g).items():
            if name in self.sources:
                yield from self.sources[name].pull_back(gradients)
            else:
                yield name, gradients

    def sums(self, into: Sums) -> Sums:
        """The sums by the names that the rule knows."""
        if all(source.is_parameter for source in self.sources.values()):
            return into
        sums: Sums = {}
        for role, name in self.call.names.items():
            if self.sources[name].is_parameter:
                sums[name] = into[name]
            else:
                if name not in self._of_sources:
                    value = self.call.params[role]
                    assert value is not None
                    zeros = torch.zeros_like(value, dtype=sum_dtype(value), requires_grad=False)
                    self._of_sources[name] = zeros.contiguous()
                sums[name] = self._of_sources[name]
        return sums

    def _add_watched(self, layout: Layout, N: int, watch: Watch) -> None:
        for name, p in self._own_params():
            zero = torch.zeros_like(p.detach(), dtype=self.call.sum_dtype())
            watch.squares.setdefault(name, zero)
        if self.shared is not None:
            return
        a = self._input(layout, N, self.call.sum_dtype())[watch.n : watch.n + 1]
        own = self.fresh()
        into = own.sums(watch.squares)
        if not self._watched and self.squares is not None:  # of all vectors together
            assert isinstance(self.rule, TakesSquares)
            squares = self.squares[watch.n : watch.n + 1]
            self.rule.add_squares(self.call, a, squares, into)
        elif self._watched:
            prepared = self.rule.prepare(self.call, a)
            for g in self._watched:
                self.rule.add(self.call, prepared, g, into)
            self._watched = []
        own._add_of_sources(watch.squares)

    def _own_params(self) -> Iterator[tuple[str, Tensor]]:
        for role, name in self.call.names.items():
            p = self.call.params[role]
            assert p is not None
            yield from self.sources[name].params.items() if name in self.sources else ((name, p),)

    def _add_block(self, layout: Layout, N: int, into: Sums) -> None:
        assert isinstance(self.rule, TakesSeveral)
        a = self._input(layout, N, self._block[0].dtype)
        self.rule.add_several(self.call, a, self._block, self.sums(into))
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
        """Pass the gradient to `on_gradient`, then return it."""
        (g,) = grads
        ctx.on_gradient(ctx.traced, g)
        return (g if ctx.needs_input_grad[0] else None), None, None, None


@dataclass
class Trace:
    """The traced calls of one forward pass.

    Attributes:
        anchor: A scalar that every tap is connected to; differentiating it visits every tap.
        calls: The traced calls in order.
        inputs: The input of each of them, with its graph.
        of_registered_rules: Parameters of layers with a registered rule; they stay in the graph.
        shared: What takes the gradients of calls that read the same parameters; see `shared.py`.
        untraceable: Parameters seen in a call that no rule can serve, each with the reason.
    """

    anchor: Tensor
    calls: list[TracedCall] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    of_registered_rules: set[str] = field(default_factory=set)
    untraceable: dict[str, str] = field(default_factory=dict)
    shared: list[Any] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)  # id of a source -> its name

    def name_of(self, source: Source) -> str:
        """A parameter's name, or one for what is computed from parameters."""
        if source.is_parameter:
            return next(iter(source.params))
        return self._names.setdefault(id(source), f"{'+'.join(source.params)}#{len(self._names)}")

    def pull_back(self, logits: Tensor, v: Tensor, *, retain_graph: bool) -> None:
        """Backpropagate v [N, C] from the logits; each traced call receives its gradient."""
        if self.calls and logits.requires_grad:
            torch.autograd.grad(
                logits, [self.anchor], v, retain_graph=retain_graph, allow_unused=True
            )


def has_custom_function(root: Tensor) -> bool:
    """Whether the graph of `root` has a Python autograd function other than a tap."""
    return any(
        isinstance(node, torch.autograd.function.BackwardCFunction) and not hasattr(node, "traced")
        for node in _nodes(root)
    )


def parameters_in_graph(root: Tensor) -> set[int]:
    """Ids of the leaves of the autograd graph of `root`: parameters used outside traced calls."""
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

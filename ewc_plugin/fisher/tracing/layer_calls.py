"""A recorded call of a layer function, and the taps that bring it the gradient at its output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ewc_plugin.fisher.rules.base import LayerCall, LayerRule, Layout, Sums


class OverwrittenError(Exception):
    """The input of a recorded call was modified in place before its gradient arrived."""


@dataclass
class Record:
    """One recorded call and who receives the gradient at its output.

    Attributes:
        rule: The rule of the function called.
        call: Its arguments.
        out_shape: Shape of its output.
        version: Of `call.a`: an in-place change after the call would falsify the rule.
        receive: Takes (record, gradient).
        g2: sum_s g_s^2 [N, K, ...] where the rule pools, else None.
        held: Gradients [N, K, ...] that wait for others, where the rule takes several at once.
        prepared: What the rule makes of the input [N, K, ...], where more than one vector needs it.
    """

    rule: LayerRule
    call: LayerCall
    out_shape: torch.Size
    version: int
    receive: Callable[["Record", Tensor], None] | None
    g2: Tensor | None = None
    held: list[Tensor] = field(default_factory=list)
    prepared: Tensor | None = None

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
        """Adds the squares of one score vector's gradients g to `into`, or keeps what they need.

        Args:
            g: Gradient at the call's output.
            layout: Where its samples are.
            N: How many they are.
            into: Parameter name -> its sum.
            count: How many vectors there are.
            unscale: What g is multiplied by.
        """
        dtype = self.call.sum_dtype()
        g = layout.samples_first(g, N).to(dtype)
        if unscale != 1.0:
            g = g * unscale  # in the wide dtype, where nothing underflows
        if self.rule.pool is not None and self.rule.poolable(self.call, g):
            self.g2 = g.square() if self.g2 is None else self.g2.addcmul_(g, g)
        elif (at_once := self.rule.at_once(self.call, g, count)) > 1:
            self.held.append(g)
            if len(self.held) == at_once:
                self._add_held(layout, N, into)
        else:
            a = self.prepared
            if a is None:
                a = self._input(layout, N, dtype)
                if self.rule.prepare is not None:
                    a = self.rule.prepare(self.call, a)
                    self.prepared = a if count > 1 else None
            self.rule.add(self.call, a, g, into)

    def finish(self, layout: Layout, N: int, into: Sums) -> None:
        """Adds what was kept, after the last vector."""
        if self.g2 is not None and self.rule.pool is not None:
            self.rule.pool(self.call, self._input(layout, N, self.g2.dtype), self.g2, into)
            self.g2 = None
        if self.held:
            self._add_held(layout, N, into)
        self.prepared = None

    def _add_held(self, layout: Layout, N: int, into: Sums) -> None:
        assert self.rule.add_several is not None
        a = self._input(layout, N, self.held[0].dtype)
        self.rule.add_several(self.call, a, self.held, into)
        self.held = []

    def _input(self, layout: Layout, N: int, dtype: torch.dtype) -> Tensor:
        if self.call.a._version != self.version:
            raise OverwrittenError(", ".join(self.call.names.values()))
        a = layout.samples_first(self.call.a.detach(), N)
        return a.to(dtype) if a.is_floating_point() else a


class Tap(torch.autograd.Function):
    """Identity; its backward shows the gradient to a record."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, record: Record) -> Tensor:
        """The output, hung on the anchor."""
        ctx.record = record
        # `.data` is neither the input nor a view of it: autograd lets both in-place operations on
        # the result pass, and the operation before never looks at its own output again.
        return out.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient, once the record has seen it."""
        (g,) = grads
        ctx.record.receive(ctx.record, g)
        return (g if ctx.needs_input_grad[0] else None), None, None


@dataclass
class Trace:
    """What one forward pass recorded.

    Attributes:
        anchor: A scalar that every tap hangs on; differentiating it visits every tap.
        records: The calls in order.
        claimed: Parameters of layers with a registered rule, which stay in the graph.
        barred: Parameters seen in a call that no rule can serve, each with the reason.
    """

    anchor: Tensor
    records: list[Record] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)
    barred: dict[str, str] = field(default_factory=dict)

    def pull_back(self, logits: Tensor, v: Tensor, *, retain_graph: bool) -> None:
        """Sends v [N, C] back from the logits; each record receives its gradient."""
        if self.records and logits.requires_grad:
            torch.autograd.grad(
                logits, [self.anchor], v, retain_graph=retain_graph, allow_unused=True
            )


def parameters_in_graph(root: Tensor) -> set[int]:
    """Ids of the leaves that the autograd graph of `root` reaches: uses that no tap stands for."""
    seen: set[Any] = set()
    found: set[int] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(edge for edge, _ in node.next_functions)
    return found

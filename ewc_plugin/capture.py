"""Records the calls of layer functions on trainable parameters and the gradients behind them.

A function mode sees `F.linear` wherever it is called from: in a module, in a functional model, in
`nn.MultiheadAttention`, which never calls its `out_proj`. The parameters of a recorded call enter
it detached, so the backward pass computes no weight gradient, and a tap behind the call hands the
output's gradient to the rule. A tap's output is an alias of the layer's, which a later in-place
activation may overwrite.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ewc_plugin.rules import LAYER_RULES, RULES, layer_rule
from ewc_plugin.rules.base import LayerCall, LayerRule, Layout, Sums


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
    """

    rule: LayerRule
    call: LayerCall
    out_shape: torch.Size
    version: int
    receive: Callable[["Record", Tensor], None] | None
    g2: Tensor | None = None

    def fits(self, layout: Layout, N: int) -> bool:
        """Whether input and output hold N samples in this layout."""
        shapes = (self.out_shape, self.call.a.shape)
        return all(
            len(shape) > layout.dim and shape[layout.dim] == N * layout.folded for shape in shapes
        )

    def add(self, g: Tensor, layout: Layout, N: int, into: Sums, unscale: float = 1.0) -> None:
        """Adds the squares of one score vector's gradients g to `into`, or to the pool.

        Args:
            g: Gradient at the call's output.
            layout: Where its samples are.
            N: How many they are.
            into: Parameter name -> its sum.
            unscale: What g is multiplied by.
        """
        dtype = self.call.sum_dtype()
        g = layout.samples_first(g, N).to(dtype)
        if unscale != 1.0:
            g = g * unscale  # in the wide dtype, where nothing underflows
        if self.rule.pool is None or not self.rule.poolable(self.call, g):
            self.rule.add(self.call, self._input(layout, N, dtype), g, into)
        elif self.g2 is None:
            self.g2 = g.square()
        else:
            self.g2.addcmul_(g, g)

    def add_pool(self, layout: Layout, N: int, into: Sums) -> None:
        """Adds what the pool holds."""
        if self.g2 is not None and self.rule.pool is not None:
            self.rule.pool(self.call, self._input(layout, N, self.g2.dtype), self.g2, into)
            self.g2 = None

    def _input(self, layout: Layout, N: int, dtype: torch.dtype) -> Tensor:
        if self.call.a._version != self.version:
            raise OverwrittenError(", ".join(self.call.names.values()))
        a = layout.samples_first(self.call.a.detach(), N)
        return a.to(dtype) if a.is_floating_point() else a


class _Tap(torch.autograd.Function):
    """Identity; its backward shows the gradient to a record."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, record: Record) -> Tensor:
        ctx.record = record
        # `.data` is neither the input nor a view of it: autograd lets both in-place operations on
        # the result pass, and the operation before never looks at its own output again.
        return out.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
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


class Capture(TorchFunctionMode):
    """While entered, fills a `Trace` with the calls on the parameters in `names`.

    Without `receive` it records the calls and leaves them as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        names: dict[int, str],
        receive: Callable[[Record, Tensor], None] | None,
    ) -> None:
        super().__init__()
        self._model = model
        self._names = dict(names)  # id of a parameter -> its name
        self._receive = receive
        self._hooks: list[RemovableHandle] = []
        device = next(model.parameters()).device
        self.trace = Trace(torch.zeros((), device=device, requires_grad=True))

    def __enter__(self) -> "Capture":
        """Also hooks the layers that have a rule of their own; the functions in them are theirs."""
        for module in self._model.modules():
            if rule := LAYER_RULES.get(type(module)):
                names = {
                    role: self._names.pop(id(p))
                    for role, p in module.named_parameters()
                    if id(p) in self._names
                }
                if names:
                    hook = self._layer_hook(layer_rule(module, rule), names)
                    self._hooks.append(module.register_forward_hook(hook))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leaves the mode and removes the hooks."""
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _layer_hook(self, rule: LayerRule, names: dict[str, str]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if not (args and isinstance(args[0], Tensor) and isinstance(out, Tensor)):
                return out  # the parameters stay in the graph, so a slower engine serves them
            params: dict[str, Tensor | None] = dict(module.named_parameters())
            self.trace.claimed |= set(names.values())
            return self._record(rule, LayerCall(args[0], params, names=names), out)

        return hook

    def _record(self, rule: LayerRule, call: LayerCall, out: Tensor) -> Tensor:
        record = Record(rule, call, out.shape, call.a._version, self._receive)
        self.trace.records.append(record)
        if self._receive is None:
            return out
        tapped: Tensor = _Tap.apply(out, self.trace.anchor, record)
        return tapped

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`; where a rule knows it and it reads a named parameter, records it."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        rule = RULES.get(func)
        call = rule.bind(*args, **kwargs) if rule and rule.bind else None
        if rule is None or call is None:
            return func(*args, **kwargs)
        names = {
            role: self._names[id(p)] for role, p in call.params.items() if id(p) in self._names
        }
        if not names:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.trace.barred |= dict.fromkeys(names.values(), "called without gradients")
            return func(*args, **kwargs)
        call.names = names
        if self._receive is not None:
            served = {id(p) for p in call.params.values() if id(p) in self._names}
            args = [arg.detach() if id(arg) in served else arg for arg in args]
            kwargs = {k: arg.detach() if id(arg) in served else arg for k, arg in kwargs.items()}
        return self._record(rule, call, func(*args, **kwargs))


# A Python function that dispatches to modes runs its body with the mode off, so the mode would miss
# the F.linear calls in it. This is the same code with its dispatch switched off.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _refuse_batch_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    """Raises where batch normalisation would mix the samples of a batch."""
    if training or running_mean is None:
        raise ValueError(
            "`model` runs BatchNorm on batch statistics (training=True or no running statistics), "
            "so its samples interact and no per-sample Fisher exists. Keep the layer in eval mode "
            "with track_running_stats=True, or use fisher_type 'batched'."
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

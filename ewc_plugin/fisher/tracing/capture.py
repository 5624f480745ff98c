"""Trace calls of layer functions on trainable parameters, and the gradients at their outputs.

A function mode sees `F.linear` wherever it is called from: in a module, in a functional model, in
`nn.MultiheadAttention`, which never calls its `out_proj`. The parameters of a traced call enter it
detached, so the backward pass computes no weight gradient, and a tap behind the call hands the
output's gradient to the rule. A tap's output is an alias of the layer's, which a later in-place
activation may overwrite.

What a function reads may also be computed from parameters alone (`lineage.py`): it is detached in
the same way. A parameter that no layer function reads, but an elementwise one or `torch.cat`, is
expanded to the shape in which it meets the batch, with a tap behind the expansion.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ewc_plugin.contexts import ModelState
from ewc_plugin.fisher.rules.base import LayerCall, LayerRule
from ewc_plugin.fisher.rules.broadcast import ELEMENTWISE, Broadcast
from ewc_plugin.fisher.rules.registry import LAYER_RULES, RULES, RegisteredRule
from ewc_plugin.fisher.tracing.attention import attention, plain_call
from ewc_plugin.fisher.tracing.layer_calls import HOOKED, OnGradient, Tap, Trace, TracedCall
from ewc_plugin.fisher.tracing.lineage import Lineage, Source, tensors_in
from ewc_plugin.fisher.tracing.recurrent import RECURRENT, cell, unrolled
from ewc_plugin.fisher.tracing.recurrent import plain_call as layer_call
from ewc_plugin.fisher.tracing.row_order import RowOrder

_BROADCAST = Broadcast("broadcast")
_JOINING = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_MATMUL = {f for f in RULES if RULES[f].name == "matmul"}
_OPERATORS = ("add", "sub", "mul", "truediv", "div", "pow", "and", "or")
# Entries of a matrix that is written down once per sample.
_EXPANDED_ENTRIES = 2**14


@lru_cache(1024)
def changes_first(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", *(f"__i{op}__" for op in _OPERATORS))


_PICKED = "its rows per sample depend on the data"


class Capture(TorchFunctionMode):
    """Context that records calls on the parameters in `names` into a `Trace`.

    Without `on_gradient` it records the calls and leaves them as they are.
    """

    def __init__(
        self, model: ModelState, names: dict[int, str], on_gradient: OnGradient | None, N: int
    ) -> None:
        super().__init__()
        self._N = N
        self._model = model
        self._names = dict(names)  # id of a parameter -> its name
        self._on_gradient = on_gradient
        self._order: Tensor | None = None  # of what a recurrent layer reads
        self._hooks: list[RemovableHandle] = []
        self._lineage: Lineage  # made on entering, once the layers with a rule are known
        self._rows: RowOrder
        device = model.parameters[0].device
        self.trace = Trace(torch.zeros((), device=device, requires_grad=True))

    def __enter__(self) -> "Capture":
        """Also hooks the layers that have a registered rule, which covers the functions in them."""
        for module in self._model.modules:
            if isinstance(module, nn.RNNBase):
                self._hooks.append(
                    module.register_forward_pre_hook(self._keep_order, with_kwargs=True)
                )
            if squares := LAYER_RULES.get(type(module)):
                names = {
                    role: self._names.pop(id(p))
                    for role, p in module.named_parameters()
                    if id(p) in self._names
                }
                if names:
                    hook = self._layer_hook(RegisteredRule(module, squares), names)
                    self._hooks.append(module.register_forward_hook(hook))
        self._lineage = Lineage(self._model, self._names)
        self._rows = RowOrder(self._N, self._lineage.is_of_batch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode and remove the hooks."""
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Record inside of a function too, where torch switches the mode off."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _keep_order(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep what torch's function for packed sequences is not given."""
        self._order = self._rows.of_recurrent(args[0] if args else kwargs.get("input"))

    def _layer_hook(self, rule: LayerRule, names: dict[str, str]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if not (args and isinstance(args[0], Tensor) and isinstance(out, Tensor)):
                return out  # the parameters stay in the graph, so a slower engine serves them
            params: dict[str, Tensor | None] = dict(module.named_parameters())
            self.trace.of_registered_rules |= set(names.values())
            return self._record(rule, LayerCall(args[0], params, names=names), out)

        return hook

    def _record(
        self,
        rule: LayerRule,
        call: LayerCall,
        out: Tensor,
        sources: dict[str, Source] | None = None,
    ) -> Tensor:
        self.trace.inputs.append(call.a)
        call.a = call.a.detach()  # shares the version counter
        traced = TracedCall(rule, call, out.shape, call.a._version, sources or {})
        self.trace.calls.append(traced)
        if self._on_gradient is None:
            return out
        tapped: Tensor = Tap.apply(out, self.trace.anchor, traced, self._on_gradient)
        return tapped

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`; where it brings parameters together with the batch, record it."""
        kwargs = kwargs or {}
        found, foreign = self._lineage.read_by(func, args, kwargs)
        if found and func is Tensor.register_hook:
            self._give_up(found, HOOKED)
            return func(*args, **kwargs)
        if not found:
            out = func(*args, **kwargs)
            if foreign:
                self._rows.see(func, args, kwargs, out)
            else:
                self._lineage.learn_constant(func, args, out)
            return out
        if not torch.is_grad_enabled():
            if func in RULES:
                self._give_up(found, "called without gradients")
            return func(*args, **kwargs)
        if changes_first(func) and args and self._lineage.source(args[0]):
            return func(*args, **kwargs)  # what it writes to must stay what the model reads
        if not foreign:
            out = func(*args, **kwargs)
            if not tensors_in((out,)) or not any(source.unexpanded for source in found):
                self._lineage.learn(func, args, found, out)
                return out
        if any(s.unexpanded for s in found) and (func not in ELEMENTWISE or not foreign):
            args, kwargs = self._mapped(self._tapped_expansion, args, kwargs)
            found, foreign = self._lineage.read_by(func, args, kwargs)
        return self._meets_batch(func, args, kwargs) if found else func(*args, **kwargs)

    def _meets_batch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function of parameters and the batch."""
        read = [t for t in tensors_in((*args, *kwargs.values())) if self._lineage.is_of_batch(t)]
        if not self._rows.is_known(read, recurrent=func in RECURRENT):
            self._give_up(self._lineage.read_by(func, args, kwargs)[0], _PICKED)
            out = func(*args, **kwargs)
            self._rows.see(func, args, kwargs, out)
            return out
        self._rows.see(func, args, kwargs)
        if rule := RULES.get(func):
            call = rule.bind(*args, **kwargs)
            if call is not None and (sources := self._name(call)):
                if self._on_gradient is not None:
                    args, kwargs = self._without_parameters(func, call, args, kwargs)
                return self._record(rule, call, func(*args, **kwargs), sources)
        if func is F.multi_head_attention_forward and (plain := plain_call(args, kwargs)):
            with self._again():
                return attention(plain)
        if func in RECURRENT:
            return self._recurrent(func, args, kwargs)
        if func in _JOINING:
            args, kwargs = self._mapped(self._tapped_source, args, kwargs)
        elif func in ELEMENTWISE:
            args, kwargs = self._broadcast(func, args, kwargs)
        elif func in _MATMUL and not kwargs:
            args = self._expanded_matrix(*args)
        return func(*args, **kwargs)

    def _recurrent(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A recurrent layer or cell with its products recorded."""
        with self._again():
            out = cell(func, args, kwargs)
        if out is not None:
            return out
        layer = layer_call(func, args, kwargs, self._order)
        if layer is None:
            return func(*args, **kwargs)
        out = unrolled(func, layer, self._linear, self._recurrence)
        # What the loop is taken from goes through torch's own function.
        return func(*args, **kwargs) if self._on_gradient is None else out

    def _linear(self, *args: Any) -> Tensor:
        with self._again():
            return F.linear(*args)

    def _recurrence(
        self, weight: Tensor, bias: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], None]]:
        """Record W h + b before h is known: see `recurrent.py`."""
        call = RULES[F.linear].bind(like, weight, bias)
        assert call is not None
        added = like.new_zeros(()) if bias is None else bias
        sources = self._name(call)
        if not sources:
            return added.expand_as(like), weight, lambda h: None
        added = self._record(RULES[F.linear], call, added.detach().expand_as(like), sources)
        traced = self.trace.calls[-1]

        def record(h: Tensor) -> None:
            traced.call.a, traced.version = h, h._version

        return added, weight.detach(), record

    def _give_up(self, sources: list[Source], reason: str) -> None:
        names = [name for source in sources for name in source.params]
        self.trace.untraceable |= dict.fromkeys(names, reason)

    def _name(self, call: LayerCall) -> dict[str, Source]:
        """Set the names of a call's parameters; return their sources by these names."""
        sources: dict[str, Source] = {}
        for role, p in call.params.items():
            source = self._lineage.source(p)
            if source is not None:
                call.names[role] = self.trace.name_of(source)
                sources[call.names[role]] = source
        return sources

    def _without_parameters(
        self, func: Any, call: LayerCall, args: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, with the parameters detached."""
        served = {id(call.params[role]) for role in call.names}

        def passed(arg: Any) -> Any:
            if id(arg) in served:
                return arg.detach()
            if func is F.linear and arg is call.a and arg.dim() > 2:
                # Beside a weight that needs no gradient, torch would multiply a strided sequence
                # step by step.
                return arg.contiguous()
            return arg

        return [passed(arg) for arg in args], {k: passed(arg) for k, arg in kwargs.items()}

    def _mapped(
        self, function: Callable[[Any], Any], args: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, and those in lists and tuples, through a function."""

        def mapped(arg: Any) -> Any:
            if isinstance(arg, (list, tuple)):
                items = [mapped(item) for item in arg]
                return items if isinstance(arg, list) or hasattr(arg, "_fields") else tuple(items)
            return function(arg)

        return [mapped(arg) for arg in args], {key: mapped(arg) for key, arg in kwargs.items()}

    def _tapped_expansion(self, arg: Any) -> Any:
        source = self._lineage.source(arg)
        return arg if source is None or not source.unexpanded else self._tapped(source, arg)

    def _tapped_source(self, arg: Any) -> Any:
        source = self._lineage.source(arg)
        return arg if source is None else self._tapped(source, arg)

    def _broadcast(
        self, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of an elementwise function, its parameters in the shape of the result."""
        tensors = tensors_in((*args, *kwargs.values()))
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        dtypes = {t.dtype for t in tensors if t.dtype != torch.bool}

        def passed(arg: Any) -> Any:
            source = self._lineage.source(arg)
            # Expanded, a scalar would take part in type promotion.
            if source is None or (arg.dim() == 0 and len(dtypes) > 1):
                return arg
            return self._tapped(source, self._plain(source).expand(shape))

        return self._mapped(passed, args, kwargs)

    def _expanded_matrix(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a batched product, where the parameter is not the right one on rows."""
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        pair = []
        for t in (left, right):
            source = self._lineage.source(t)
            if source is not None and t.dim() > 1 and t.numel() <= _EXPANDED_ENTRIES:
                t = self._tapped(source, self._plain(source).expand(*batch, *t.shape[-2:]))
            pair.append(t)
        return pair[0], pair[1]

    def _plain(self, source: Source) -> Tensor:
        return (source.unexpanded or source).value

    def _tapped(self, source: Source, expanded: Tensor) -> Tensor:
        """A source, expanded to some shape, with a tap behind it."""
        source = source.unexpanded or source
        # Either is another tensor than the source, so it counts as coming from the batch.
        out = expanded.view_as(expanded) if self._on_gradient is None else expanded.detach()
        name = self.trace.name_of(source)
        call = LayerCall(out, {"value": source.value}, names={"value": name})
        return self._record(_BROADCAST, call, out, {name: source})

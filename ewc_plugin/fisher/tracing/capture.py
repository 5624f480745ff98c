"""Traces the calls of layer functions on trainable parameters and the gradients behind them.

A function mode sees `F.linear` wherever it is called from: in a module, in a functional model, in
`nn.MultiheadAttention`, which never calls its `out_proj`. The parameters of a traced call enter it
detached, so the backward pass computes no weight gradient, and a tap behind the call hands the
output's gradient to the rule. A tap's output is an alias of the layer's, which a later in-place
activation may overwrite.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ewc_plugin.fisher.rules.base import LayerCall, LayerRule
from ewc_plugin.fisher.rules.registry import LAYER_RULES, RULES, RegisteredRule
from ewc_plugin.fisher.tracing.attention import attention, plain_call
from ewc_plugin.fisher.tracing.layer_calls import OnGradient, Tap, Trace, TracedCall

# Functions that give a sample as many rows as its data say. A total that happens to fit does not
# show to which sample a row belongs.
_PICKING = {
    *(torch.nonzero, torch.argwhere, torch.masked_select, torch.repeat_interleave),
    *(Tensor.nonzero, Tensor.argwhere, Tensor.masked_select, Tensor.repeat_interleave),
}


def _picks_rows(func: Any, args: Any, N: int) -> bool:
    """Whether a call picks rows by the data; a mask [N] has a sample's row once or not at all."""
    if func in _PICKING:
        counts = args[1:2]
        repeats = func in (torch.repeat_interleave, Tensor.repeat_interleave)
        return not repeats or any(isinstance(c, Tensor) for c in counts)
    if func is torch.where:
        return len(args) == 1
    if func is not Tensor.__getitem__:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool]
    return any(mask.shape != (N,) for mask in masks)


class Capture(TorchFunctionMode):
    """While entered, fills a `Trace` with the calls on the parameters in `names`.

    Without `on_gradient` it records the calls and leaves them as they are.
    """

    def __init__(
        self, model: nn.Module, names: dict[int, str], on_gradient: OnGradient | None, N: int
    ) -> None:
        super().__init__()
        self._N = N  # samples in the batch
        self._model = model
        self._names = dict(names)  # id of a parameter -> its name
        self._on_gradient = on_gradient
        self._hooks: list[RemovableHandle] = []
        device = next(model.parameters()).device
        self.trace = Trace(torch.zeros((), device=device, requires_grad=True))

    def __enter__(self) -> "Capture":
        """Also hooks the layers that have a registered rule, which covers the functions in them."""
        for module in self._model.modules() if LAYER_RULES else ():
            if squares := LAYER_RULES.get(type(module)):
                names = {
                    role: self._names.pop(id(p))
                    for role, p in module.named_parameters()
                    if id(p) in self._names
                }
                if names:
                    hook = self._layer_hook(RegisteredRule(module, squares), names)
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
            self.trace.of_registered_rules |= set(names.values())
            return self._record(rule, LayerCall(args[0], params, names=names), out)

        return hook

    def _record(self, rule: LayerRule, call: LayerCall, out: Tensor) -> Tensor:
        self.trace.inputs.append(call.a)
        call.a = call.a.detach()  # shares the version counter
        traced = TracedCall(rule, call, out.shape, call.a._version)
        self.trace.calls.append(traced)
        if self._on_gradient is None:
            return out
        tapped: Tensor = Tap.apply(out, self.trace.anchor, traced, self._on_gradient)
        return tapped

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`; where a rule knows it and it reads a named parameter, records it."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None:
            if func is F.multi_head_attention_forward and (plain := plain_call(args, kwargs)):
                with self:
                    return attention(plain)
            self.trace.picked_rows |= _picks_rows(func, args, self._N)
            return func(*args, **kwargs)
        call = rule.bind(*args, **kwargs)
        if call is None or not self._names_parameters(call):
            return func(*args, **kwargs)
        if self._on_gradient is not None:
            args, kwargs = self._without_parameters(func, call, args, kwargs)
        return self._record(rule, call, func(*args, **kwargs))

    def _names_parameters(self, call: LayerCall) -> bool:
        """Sets the names of a call's parameters; False where it has none that a rule can serve."""
        names = {
            role: self._names[id(p)] for role, p in call.params.items() if id(p) in self._names
        }
        reason = "" if torch.is_grad_enabled() else "called without gradients"
        if self.trace.picked_rows:
            reason = "its rows per sample depend on the data"
        if names and reason:
            self.trace.untraceable |= dict.fromkeys(names.values(), reason)
            return False
        call.names = names
        return bool(names)

    def _without_parameters(
        self, func: Any, call: LayerCall, args: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, with the parameters detached."""
        served = {id(p) for p in call.params.values() if id(p) in self._names}

        def passed(arg: Any) -> Any:
            if id(arg) in served:
                return arg.detach()
            if func is F.linear and arg is call.a and arg.dim() > 2:
                # Beside a weight that needs no gradient, torch would multiply a strided sequence
                # step by step.
                return arg.contiguous()
            return arg

        return [passed(arg) for arg in args], {k: passed(arg) for k, arg in kwargs.items()}

"""Records the calls of layer functions on trainable parameters and the gradients behind them.

A function mode sees `F.linear` wherever it is called from: in a module, in a functional model, in
`nn.MultiheadAttention`, which never calls its `out_proj`. The parameters of a recorded call enter
it detached, so the backward pass computes no weight gradient, and a tap behind the call hands the
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
from ewc_plugin.fisher.rules.registry import LAYER_RULES, RULES, layer_rule
from ewc_plugin.fisher.tracing.attention import attention
from ewc_plugin.fisher.tracing.layer_calls import Record, Tap, Trace


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
        for module in self._model.modules() if LAYER_RULES else ():
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
        tapped: Tensor = Tap.apply(out, self.trace.anchor, record)
        return tapped

    def __torch_function__(
        self, func: Any, classes: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`; where a rule knows it and it reads a named parameter, records it."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None:
            if func is F.multi_head_attention_forward:
                with self:
                    return attention(*args, **kwargs)
            return func(*args, **kwargs)
        if func is F.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        call = rule.bind(*args, **kwargs) if rule.bind else None
        if call is None:
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

            def passed(arg: Any) -> Any:
                if id(arg) in served:
                    return arg.detach()
                if func is F.linear and arg is call.a and arg.dim() > 2:
                    # Beside a weight that needs no gradient, torch would multiply a strided
                    # sequence step by step.
                    return arg.contiguous()
                return arg

            args = [passed(arg) for arg in args]
            kwargs = {k: passed(arg) for k, arg in kwargs.items()}
        return self._record(rule, call, func(*args, **kwargs))


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

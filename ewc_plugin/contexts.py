"""Context managers that restore a model's state and the global random states."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_OWN_DICTS = ("_parameters", "_buffers", "_modules")
# Dicts of hooks are not saved: every module has a dozen of them.
_HOOKS = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)} - {
    *_OWN_DICTS
}


class ModelState:
    """A snapshot of what a forward pass may change: attributes, their lists and dicts, buffers.

    Args:
        model: Its state now is what `restore` puts back.
        parameters: Whether the values of the parameters are part of it.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = False) -> None:
        modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._attributes = [(vars(m), dict(vars(m))) for m in modules]
        values = [
            (name, v) for _, saved in self._attributes for name, v in saved.items() if _mutable(v)
        ]
        self._containers = [
            (v, v.copy()) for name, v in values if not isinstance(v, Tensor) and name not in _HOOKS
        ]
        tensors = [v for _, v in values if isinstance(v, Tensor)]
        tensors += [*model.buffers(), *(model.parameters() if parameters else ())]
        self._tensors = [(t, t.detach().clone()) for t in tensors if _readable(t)]
        self._versions = [t._version for t, _ in self._tensors]

    def restore(self, *, values: bool = False) -> None:
        """Put everything back.

        Args:
            values: Compare every tensor with its saved value, instead of its version counter, which
                batch normalisation does not raise.
        """
        for now, saved in self._attributes:
            if _same(now, saved):
                continue
            for name in [name for name in now if name not in saved]:
                del now[name]
            for name, value in saved.items():
                if now.get(name, self) is not value:
                    now[name] = value
        for container, content in self._containers:
            if not _same(container, content):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        for i, (tensor, value) in enumerate(self._tensors):
            changed = tensor._version != self._versions[i]
            if changed or (values and not torch.equal(tensor, value)):
                with torch.no_grad():
                    tensor.copy_(value)
                self._versions[i] = tensor._version


def _mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set) or (
        isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    )


def _readable(tensor: Tensor) -> bool:
    has_values = not nn.parameter.is_lazy(tensor)
    return has_values and not tensor.is_meta and not tensor.is_inference()


def _same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        values = map(is_, container.values(), content.values())
        return all(map(is_, container, content)) and all(values)
    if isinstance(container, list):
        return all(map(is_, container, content))
    return bool(container == content)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[ModelState]:
    """Put the model in eval mode, with gradients and uncompiled; restore all, also on error.

    Undone are every module's flag, its attributes, buffers and parameters (which a forward pass may
    clip, as an embedding's `max_norm` does), and the global random states of torch, NumPy and
    Python.

    Args:
        model: Any.

    Yields:
        The model's state in eval mode, to be put back before every forward pass.
    """
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    overridden = any(
        type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval for m in modules
    )
    with ExitStack() as stack:
        stack.enter_context(untouched_randomness())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if hasattr(torch.compiler, "set_stance"):  # a compiled layer would hide its calls
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if devices:  # cuDNN refuses the backward of recurrent layers in eval mode
            rnn = any(isinstance(module, nn.RNNBase) for module in modules)
            stack.enter_context(torch.backends.cudnn.flags(enabled=not rnn))
        # A layer that merges its weights in eval() does not get them back to the last bit.
        before = ModelState(model, parameters=True) if overridden else None
        state = None
        try:
            model.eval()
            state = ModelState(model, parameters=True)
            yield state
        finally:
            if state is not None:
                state.restore(values=True)
            if overridden:
                model.train(flags[0][1])  # an overridden `train` may have to undo what `eval` did
            for module, training in flags:
                module.training = training
            if before is not None:
                before.restore(values=True)


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Restore the global CPU random states at the end; a transform may advance them."""
    numpy = sys.modules.get("numpy")  # where it is not loaded, nobody has drawn from it
    python_state = random.getstate()
    numpy_state = numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)

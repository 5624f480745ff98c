"""Context managers that restore a model's state and the global random states."""

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from inspect import isroutine
from itertools import chain
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class ModelState:
    """A snapshot of what a forward pass may change.

    That is attributes, the lists and dicts in them, hooks among these, the attributes of objects
    that a module holds (not those of objects inside of these), buffers and parameters.

    Attributes:
        modules: All of them.
        parameters: All of them, each once.
        buffers: All of them, each once.

    Args:
        model: Its state now is what `restore` puts back, parameters included.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.parameters, self.buffers = list(model.parameters()), list(model.buffers())
        modules = [m for m in self.modules if not isinstance(m, torch.jit.ScriptModule)]
        self._attributes = _Dicts([vars(m) for m in modules])
        attributes = [v for saved in self._attributes.saved for v in saved.values()]
        held = {id(v): vars(v) for v in attributes if _is_held_object(v)}.values()
        inside = [t for entries in held for t in entries.values() if isinstance(t, Tensor)]
        containers, tensors = _contents([*attributes, *inside, *self.buffers, *self.parameters])
        self._dicts = _Dicts([*(v for v in containers if isinstance(v, dict)), *held])
        self._others = [(v, v.copy()) for v in containers if not isinstance(v, dict)]
        self._tensors = [(t, t.detach().clone()) for t in tensors if _readable(t)]
        self._versions = [t._version for t, _ in self._tensors]

    def restore(self, *, values: bool = False) -> None:
        """Put everything back.

        Args:
            values: Compare every tensor with its saved value, instead of its version counter, which
                batch normalisation does not raise.
        """
        for now, saved in self._attributes.changed():
            for name in [name for name in now if name not in saved]:
                del now[name]
            for name, value in saved.items():
                if now.get(name, self) is not value:
                    now[name] = value
        for container, entries in self._dicts.changed():
            container.clear()
            container.update(entries)
        for other, items in self._others:
            if not _same(other, items):
                other.clear()
                (other.update if isinstance(other, set) else other.extend)(items)
        for i, (tensor, value) in enumerate(self._tensors):
            written = tensor._version != self._versions[i]
            if written or (values and not torch.equal(tensor, value)):
                with torch.no_grad():
                    tensor.copy_(value)
                self._versions[i] = tensor._version


class _Dicts:
    """Dicts and their copies, compared all at once in C: there are thousands of entries."""

    def __init__(self, dicts: list[dict[Any, Any]]) -> None:
        self.empty = [each for each in dicts if not each]  # most: a module has a dozen of hooks'
        self.now = [each for each in dicts if each]
        self.saved = [each.copy() for each in self.now]

    def changed(self) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
        """Return each dict that has other keys or values than its copy, with the copy."""
        filled: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        if any(self.empty):
            filled = [(each, {}) for each in self.empty if each]
        if _same_dicts(self.now, self.saved):
            return filled
        pairs = zip(self.now, self.saved, strict=True)
        return filled + [(now, saved) for now, saved in pairs if not _same_dicts([now], [saved])]


def _same_dicts(dicts: list[dict[Any, Any]], others: list[dict[Any, Any]]) -> bool:
    if list(map(len, dicts)) != list(map(len, others)):
        return False
    keys = map(is_, chain.from_iterable(dicts), chain.from_iterable(others))
    of_one, of_other = (chain.from_iterable(map(dict.values, each)) for each in (dicts, others))
    return all(keys) and all(map(is_, of_one, of_other))


def _is_held_object(value: Any) -> bool:
    """Whether an attribute is an object that has attributes of its own, and is no code."""
    if isinstance(value, Tensor | nn.Module | type | ModuleType | Enum) or isroutine(value):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _readable(tensor: Tensor) -> bool:
    has_values = not nn.parameter.is_lazy(tensor)
    return has_values and not tensor.is_meta and not tensor.is_inference()


def _same(container: Any, content: Any) -> bool:
    if isinstance(container, set):
        return bool(container == content)
    return len(container) == len(content) and all(map(is_, container, content))


def _contents(values: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """The containers that can change and the tensors, among values and inside of them."""
    containers: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            tensors[id(value)] = value
        elif isinstance(value, list | dict | set | deque | tuple) and id(value) not in containers:
            containers[id(value)] = value
            waiting += value.values() if isinstance(value, dict) else value
    changing = [each for each in containers.values() if not isinstance(each, tuple)]
    return changing, list(tensors.values())


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
        before = ModelState(model) if overridden else None
        state = None
        try:
            model.eval()
            state = ModelState(model)
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

"""Context managers that restore a model's state and the global random states."""

import copyreg
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from inspect import isroutine
from itertools import chain
from operator import is_
from threading import Lock, RLock
from types import MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

_PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device}
_CONTAINERS = (list, dict, set, deque, tuple, OrderedDict)
_NOT_ENTERED = (nn.Module, type, ModuleType, Enum, Optimizer, DataLoader, Dataset, Sampler)
_LOCKS = (type(Lock()), type(RLock()))
_SMALL = 4096  # entries of a tensor or array that is compared before every forward pass


class ModelState:
    """A snapshot of what a forward pass may change.

    That is buffers, parameters, and attributes, with hooks, containers, objects and generators of
    random numbers in them, and what is inside of these (`_Held` says where that ends).

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
        held = _Held([*attributes, *self.buffers, *self.parameters])
        self._dicts, self._slots, self._randomness = _Dicts(held.dicts), held.slots, held.randomness
        self._others = [(v, v.copy()) for v in held.others]
        self._arrays = [(array, array.copy()) for array in held.arrays]
        self._tensors = [(t, t.detach().clone()) for t in held.tensors if _readable(t)]
        self._versions = [t._version for t, _ in self._tensors]
        small: dict[Any, dict[Tensor, Tensor]] = {}
        for t, value in self._tensors:
            if _is_small(t):
                small.setdefault((t.dtype, t.device), {})[t] = value.flatten()
        self._small = [(list(g), torch.cat(list(g.values()))) for g in small.values()]
        plain = [t for t, _ in self._tensors if _is_plain(t)]
        self._memory = {t.untyped_storage().data_ptr() for t in plain}

    def apart(self, output: Tensor) -> Tensor:
        """Return an output of the model, or its copy where `restore` may overwrite it."""
        shared = _is_plain(output) and output.untyped_storage().data_ptr() in self._memory
        return output.clone() if shared else output

    def restore(self, *, values: bool = False) -> None:
        """Put everything back.

        A tensor has changed where its version counter has, or, up to `_SMALL` entries, its values:
        batch normalisation and writes through `.data` do not raise the counter.

        Args:
            values: At the end: compare the values of larger tensors too, and put generators back,
                which would repeat their numbers between forward passes.
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
        for holder, slots in self._slots:
            for name in _slot_names(holder):
                if name in slots:
                    object.__setattr__(holder, name, slots[name])
                elif hasattr(holder, name):
                    object.__delattr__(holder, name)
        if values:
            for _, put_back, state in self._randomness:
                put_back(state)
        for array, value in self._arrays:
            if (values or array.size <= _SMALL) and array.tobytes() != value.tobytes():
                array[...] = value
        small = not values and self._small_have_changed()
        for i, (tensor, value) in enumerate(self._tensors):
            written = tensor._version != self._versions[i]
            compared = values or (small and _is_small(tensor))
            if written or (compared and not _equal(tensor, value)):
                with torch.no_grad():
                    tensor.copy_(value)
                self._versions[i] = tensor._version

    def random_states(self) -> list[Any]:
        """The states of generators that the model holds."""
        return [read() for read, _, _ in self._randomness]

    def _small_have_changed(self) -> bool:
        """Whether any value has, of all in one tensor: one comparison, one wait for a GPU."""
        with torch.no_grad():
            joined = [torch.cat([t.flatten() for t in tensors]) for tensors, _ in self._small]
        saved = [values for _, values in self._small]
        return not all(map(torch.equal, joined, saved))


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


def _is_plain(tensor: Tensor) -> bool:
    strided = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return strided and not tensor.is_quantized and not tensor.is_nested


def _is_small(tensor: Tensor) -> bool:
    return _is_plain(tensor) and tensor.numel() <= _SMALL


def _readable(tensor: Tensor) -> bool:
    has_values = not nn.parameter.is_lazy(tensor)
    return has_values and not tensor.is_meta and not tensor.is_inference()


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    if not (numpy and isinstance(value, numpy.ndarray)):
        return False
    return bool(value.flags.writeable and not value.dtype.hasobject)


def _equal(tensor: Tensor, value: Tensor) -> bool:
    if tensor.layout is not torch.strided:  # which `torch.equal` does not take
        return False
    return torch.equal(tensor, value)


def _same(container: Any, content: Any) -> bool:
    if isinstance(container, set):
        return bool(container == content)
    return len(container) == len(content) and all(map(is_, container, content))


class _Held:
    """Tensors, containers and generators that are reachable from values, each once.

    Modules, code, and what feeds or steps the model from outside are not entered, and neither is an
    object with a lock, which other threads may change. Of an object that holds a module, as a
    trainer does, attributes count and the containers in them, but not what these hold.
    """

    def __init__(self, values: list[Any]) -> None:
        self.tensors: list[Tensor] = []
        self.arrays: list[Any] = []  # of NumPy
        self.dicts: list[dict[Any, Any]] = []
        self.others: list[Any] = []  # lists, sets and deques
        self.slots: list[tuple[Any, dict[str, Any]]] = []
        self.randomness: list[tuple[Callable[[], Any], Callable[[Any], object], Any]] = []
        seen: set[int] = set()
        while values:
            value = values.pop()
            if type(value) in _PLAIN or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                self.tensors.append(value)
                continue
            if _is_array(value):
                self.arrays.append(value)
                continue
            if isinstance(value, _CONTAINERS):
                values += self._container(value)
                if type(value) in _CONTAINERS:
                    continue
            if (generator := _of_generator(value)) is not None:
                read, put_back = generator
                self.randomness.append((read, put_back, read()))
            elif not isinstance(value, _NOT_ENTERED) and not isroutine(value):
                values += self._object(value)

    def _container(self, value: Any) -> Iterable[Any]:
        if isinstance(value, dict):
            self.dicts.append(value)
            return value.values()
        if not isinstance(value, tuple):
            self.others.append(value)
        return list(value)

    def _object(self, value: Any) -> Iterable[Any]:
        names, attributes = _slot_names(value), getattr(value, "__dict__", None)
        slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
        attributes = attributes if isinstance(attributes, dict) else {}
        inside = [*attributes.values(), *slots.values()]
        if any(isinstance(each, _LOCKS) for each in inside):
            return []
        self.dicts.append(attributes)
        if names:
            self.slots.append((value, slots))
        if not any(isinstance(each, nn.Module) for each in inside):
            return inside
        for each in inside:
            if isinstance(each, _CONTAINERS):
                self._container(each)
        return [each for each in inside if isinstance(each, Tensor)]


def _slot_names(value: Any) -> list[str]:
    """Names of slots that no property of a subclass hides."""
    kind = type(value)
    names: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return [name for name in names if isinstance(getattr(kind, name, None), MemberDescriptorType)]


def _of_generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """Functions that return and set a generator's state; None of what is no generator."""
    if isinstance(value, torch.Generator) and value is not torch.default_generator:
        return value.get_state, value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.random.RandomState):
        return value.get_state, value.set_state
    if numpy and isinstance(value, numpy.random.Generator | numpy.random.BitGenerator):
        bits = getattr(value, "bit_generator", value)
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    return None


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

"""Leaves a model as it was found: every module's flag, and the global random state."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, gradients on, compiled parts eager; all undone, also on error."""
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        stack.enter_context(torch.enable_grad())
        if hasattr(torch.compiler, "set_stance"):  # a compiled layer would hide its calls
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if devices:  # cuDNN refuses the backward of recurrent layers in eval mode
            rnn = any(isinstance(module, nn.RNNBase) for module in model.modules())
            stack.enter_context(torch.backends.cudnn.flags(enabled=not rnn))
        try:
            model.eval()
            yield
        finally:
            if any(type(module).train is not nn.Module.train for module in model.modules()):
                model.train(flags[0][1])  # lets an override undo what its eval() did
            for module, training in flags:
                module.training = training


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """The CPU's global random states, put back; a transform may draw from any of them."""
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

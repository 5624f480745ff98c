"""`ModelCall`: a model, its forward function and its trainable parameters."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch, copied, join, n_samples, take
from ewc_plugin.contexts import ModelState
from ewc_plugin.fisher.outputs import checked_logits

Forward = Callable[[nn.Module, Batch], Any]
SingleSample = Literal["single", "pair", "copies"]
Context = AbstractContextManager[object]
_NOTHING: Context = nullcontext()


@dataclass(frozen=True)
class ModelCall:
    """A model, how to call it, and the parameters whose Fisher is computed.

    Attributes:
        model: In eval mode.
        forward: Maps (model, batch) to logits [N, C], or to an object that has them.
        params: The trainable parameters by name.
        state: What is put back before every forward pass, so that none depends on those before.
        single_sample: How a sample's own logits are computed: "single", in a batch of one; "pair",
            beside a copy of itself; "copies", in a batch as large as the loader's, of copies of
            itself.
        by_backward: Whether a custom autograd function is part of the graph: it may call
            `backward()` itself, which `autograd.grad` does not see.
        copies_input: Whether the model works in place on its input.
        draws: Whether a forward pass draws random numbers, if only for nothing.
    """

    model: nn.Module
    forward: Forward
    params: dict[str, nn.Parameter]
    state: ModelState
    single_sample: SingleSample = "single"
    by_backward: bool = False
    copies_input: bool = False
    draws: bool = False

    @property
    def hooked(self) -> frozenset[str]:
        """Names of the parameters with a hook on their gradient."""
        return frozenset(name for name, p in self.params.items() if p._backward_hooks)

    def logits(self, batch: Batch, capture: Context = _NOTHING) -> Tensor:
        """The logits [N, C] of a batch, checked; the forward pass runs in the context `capture`."""
        self.state.restore()
        return self.state.apart(self.functional(self.model, batch, capture))

    def sample_logits(self, batch: Batch, n: int, capture: Context = _NOTHING) -> Tensor:
        """The logits [1, C] of one sample of a batch, with no other sample beside it."""
        if self.single_sample == "copies":
            rows = torch.full((n_samples(batch),), n, device="cpu")
            return self.logits(take(batch, rows), capture)[n : n + 1]
        return self.logits(take(batch, slice(n, n + 1)), capture)

    def functional(self, model: nn.Module, batch: Batch, capture: Context = _NOTHING) -> Tensor:
        """Return the logits of `model`, called in the model's place, and restore no state."""
        batch = copied(batch) if self.copies_input else batch
        beside_a_copy = self.single_sample == "pair" and n_samples(batch) == 1
        if beside_a_copy:
            batch = join([batch, copied(batch)])
        with capture:  # nothing else: a function mode costs microseconds for each attribute read
            output = self.forward(model, batch)
        logits = checked_logits(output, batch, self.forward)
        return logits[:1] if beside_a_copy else logits

    def only(self, params: dict[str, nn.Parameter]) -> "ModelCall":
        """A copy of this `ModelCall` with only some of the parameters."""
        return replace(self, params=params)

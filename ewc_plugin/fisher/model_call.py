"""The model, how it is called and the parameters of its Fisher, as one value."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ewc_plugin.batches import Batch, copied
from ewc_plugin.fisher.logits import checked_logits

Forward = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class ModelCall:
    """What a Fisher is computed of.

    Attributes:
        model: In eval mode.
        forward: Maps (model, batch) to logits [N, C].
        params: The trainable parameters by name.
    """

    model: nn.Module
    forward: Forward
    params: dict[str, nn.Parameter]

    def logits(self, batch: Batch) -> Tensor:
        """The logits [N, C] of a batch, checked."""
        return checked_logits(self.forward(self.model, batch), batch)

    def on_copies(self) -> "ModelCall":
        """The same for a model that works on its input in place."""
        forward = self.forward
        return replace(self, forward=lambda model, batch: forward(model, copied(batch)))

    def only(self, params: dict[str, nn.Parameter]) -> "ModelCall":
        """The same for some of the parameters."""
        return replace(self, params=params)

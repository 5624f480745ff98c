"""Three samples, together and alone: what every choice of engine is checked against."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ewc_plugin.batches import Batch, copied, has_samples, n_entries, n_samples, take
from ewc_plugin.fisher.logits import check_finite, checked_logits
from ewc_plugin.fisher.per_sample import Forward, add_gradient_squares, vmap_squares, zeros
from ewc_plugin.fisher.tracing.capture import Capture
from ewc_plugin.fisher.tracing.layer_calls import Record, Trace

SAMPLES = 3
_SCORED = 2  # of them: one would not tell a sum of squares from the square of a sum

_CHUNK_ENTRIES = {"cpu": 2**22, "other": 2**23}  # of the layers' outputs in one forward pass
# Every layer call also costs a CPU tenths of a millisecond of Python per chunk. Where one vector
# goes back and frees the outputs on its way, many small calls are worth up to twice the entries.
_ENTRIES_PER_CALL = 2**19
_SMALLEST_CHUNK, _LARGEST_CHUNK = 16, 1024


class Trial:
    """Three samples, random vectors at their logits, and the loop's answer."""

    def __init__(
        self, model: nn.Module, forward: Forward, params: dict[str, nn.Parameter], batch: Batch
    ) -> None:
        self.model, self.forward, self.params = model, forward, params
        self.batch = take(batch, torch.arange(SAMPLES) % n_samples(batch))
        self.received: dict[int, Tensor] = {}  # id of a record -> the gradient it received
        self.logits, self.trace = self._run(self.batch, self._receive)
        half = torch.finfo(self.logits.dtype).bits < 32
        self.tolerance = 0.1 if half else 0.01
        check_finite(self.logits, 0)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(_SCORED, self.logits.size(1), generator=generator, dtype=torch.float64)
        # The last sample has no score: whatever lands in its rows still shows.
        self.v = F.pad(v.to(self.logits), (0, 0, 0, SAMPLES - _SCORED))
        self.reference = zeros(params)
        for n in reversed(range(_SCORED)):
            alone, self.trace_alone = self._run(take(self.batch, slice(n, n + 1)), None)
            self._check_independence(alone, self.logits[n : n + 1])
            add_gradient_squares(self.reference, params, alone, self.v[n : n + 1])

    def _run(
        self, batch: Batch, receive: Callable[[Record, Tensor], None] | None
    ) -> tuple[Tensor, Trace]:
        names = {id(p): name for name, p in self.params.items()}
        batch = copied(batch)  # the model may work on its input in place
        with Capture(self.model, names, receive) as capture:
            logits = checked_logits(self.model, self.forward, batch)
        leaves = [leaf for leaf in tree_leaves(batch) if has_samples(leaf)]
        self.overwrites_input = any(leaf._version for leaf in leaves)
        return logits, capture.trace

    def pull_back(self) -> None:
        """Sends the vectors back; each record's gradient is then in `received`."""
        self.trace.pull_back(self.logits, self.v, retain_graph=True)

    def _receive(self, record: Record, g: Tensor) -> None:
        self.received[id(record)] = g

    def fitting_chunk(self, one_vector: bool) -> int:
        """Samples whose recorded tensors fill the cache's neighbourhood, not the memory."""
        entries = n_entries(self.batch)
        entries += sum(record.out_shape.numel() for record in self.trace.records)
        weights = sum(p.numel() for p in self.params.values())
        # Each chunk also passes once over all sums: many weights want many samples.
        on_cpu = self.logits.device.type == "cpu"
        room = _CHUNK_ENTRIES["cpu" if on_cpu else "other"]
        if on_cpu and one_vector:
            room = min(2 * room, max(room, _ENTRIES_PER_CALL * len(self.trace.records)))
        fitting = max(room, 2 * weights) * SAMPLES // entries
        power_of_two = 1 << (fitting.bit_length() - 1) if fitting else 1
        return min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, power_of_two))

    def _check_independence(self, alone: Tensor, together: Tensor) -> None:
        """Raises where a sample's logits depend on its batch, or on chance."""
        if alone.shape == together.shape:
            masked = alone == together  # -inf
            difference = (alone - together).detach().masked_fill(masked, 0).abs()
            scale = together.detach().masked_fill(together == -torch.inf, 0).abs().max()
            if not bool((difference > self.tolerance * scale).any()):
                return
        raise ValueError(
            "`model` gives a sample other logits alone than in a batch of three: its samples "
            "interact or its forward is random, so no per-sample Fisher exists. Switch batch "
            "statistics and noise off, or use fisher_type 'batched'."
        )

    def close(self, got: Tensor, expected: Tensor) -> bool:
        """Whether squares agree but for rounding and a flipped ReLU."""
        low, high = got.sub_(expected).aminmax()  # `got` has served
        return bool(torch.maximum(-low, high) <= self.tolerance * expected.max())

    def vmap_failure(self, params: dict[str, nn.Parameter]) -> str:
        """Why vmap can't serve these parameters, or nothing."""
        try:
            sums = vmap_squares(self.model, self.forward, params, self.batch, self.v[:, None])
        except Exception as error:  # whatever a model's code raises under a transform
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if all(self.close(sums[name], self.reference[name]) for name in params):
            return ""
        return "its values differ from the loop's"

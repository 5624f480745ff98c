"""Audit: compare one sample's squares in a chunk with a loop over this sample alone."""

import time

import torch
from torch import Tensor

from ewc_plugin.batches import Batch, n_samples, take
from ewc_plugin.fisher.model_call import ModelCall
from ewc_plugin.fisher.outputs import is_half, outputs_agree
from ewc_plugin.fisher.per_sample import each_gradient, typical, vmap_squares, zeros
from ewc_plugin.fisher.plan import Served
from ewc_plugin.fisher.rules.base import Sums
from ewc_plugin.fisher.tracing.layer_calls import Watch

_SHARE = 0.01  # of the time of a pass
_BESIDE_OTHERS = 5  # samples of a chunk that are also run together in a smaller batch

# Largest relative difference of a sample's squares, summed over a tensor: a ReLU at zero that
# flips in another batch changes few of its entries. The other is a floor, relative to a typical
# parameter's largest square: a gradient that cancels is rounding.
_TOLERANCES = {torch.float64: (1e-6, 1e-20), torch.float32: (0.05, 1e-8)}
_HALF = (0.5, 1e-3)


class Auditor:
    """Chooses the chunks and samples to audit, within a fixed share of the time.

    Attributes:
        count: Number of samples audited.
    """

    def __init__(self) -> None:
        self.count = 0
        self._generator = torch.Generator().manual_seed(0)
        self._started = time.perf_counter()
        self._spent = self._last = 0.0

    def watch(self, N: int, *, must: bool) -> Watch | None:
        """Choose a sample of a chunk of N to audit, or None.

        Args:
            N: Samples in the chunk.
            must: Whether it is audited whatever that costs.

        Returns:
            Which one.
        """
        elapsed = time.perf_counter() - self._started
        if not must and self._spent + self._last > _SHARE * elapsed:
            return None
        n = torch.randint(N, (1,), generator=self._generator, device="cpu")
        return Watch(int(n))

    def outputs_hold(self, call: ModelCall, batch: Batch, watch: Watch, alone: Tensor) -> bool:
        """Whether a sample's logits are the same alone, in a small batch and in the chunk."""
        assert watch.logits is not None and watch.scale is not None
        half = is_half(watch.logits, call.params)
        if not outputs_agree(alone, watch.logits, watch.scale, half):
            return False
        N = n_samples(batch)
        if self.count or call.single_sample == "copies" or N <= _BESIDE_OTHERS:
            return True
        order = torch.randperm(N, generator=self._generator, device="cpu")
        some = order[:_BESIDE_OTHERS].sort().values
        few = call.logits(take(batch, some))
        return outputs_agree(few, watch.scale[some.to(watch.scale.device)], watch.scale, half)

    def differing(
        self,
        call: ModelCall,
        served: dict[str, Served],
        batch: Batch,
        watch: Watch,
        alone: Tensor,
    ) -> list[str]:
        """Names of the parameters whose squares in the chunk differ from the loop's."""
        assert watch.logits is not None
        vectors = torch.stack(watch.vectors)  # [S, C]
        got: Sums = {}
        by_vmap = {n: p for n, p in call.params.items() if served[n].engine == "vmap"}
        if by_vmap:
            one = take(batch, slice(watch.n, watch.n + 1))
            got = vmap_squares(call.only(by_vmap), one, vectors[None])
        for name, squares in watch.squares.items():
            got[name] = squares if watch.unscale == 1 else squares / watch.unscale**2
        by_rules = {n: p for n, p in call.params.items() if served[n].engine == "rules"}
        got |= zeros({n: p for n, p in by_rules.items() if n not in got})  # no call in this chunk
        total, largest = dict.fromkeys(got, 0.0), dict.fromkeys(call.params, 0.0)  # of the loop's

        def subtract(name: str, g: Tensor) -> None:
            if g.numel():
                peak = max(abs(float(t)) for t in g.aminmax())  # ten times faster than a norm
                largest[name] = max(largest[name], peak * peak)
                if name in got:
                    norm = float(torch.linalg.vector_norm(g))
                    total[name] += norm * norm
                    got[name].addcmul_(g, g, value=-1)

        each_gradient(call, alone, vectors, subtract)
        half = is_half(watch.logits, call.params)
        relative, floor = _HALF if half else _TOLERANCES.get(watch.logits.dtype, _HALF)
        off = {name: float(t.abs_().sum()) for name, t in got.items()}
        floor *= typical(largest.values())
        allowed = {
            # Squares below the smallest normal number have few digits, or none.
            n: relative * total[n]
            + floor * t.numel() ** 0.5
            + torch.finfo(t.dtype).tiny * t.numel()
            for n, t in got.items()
        }
        return [name for name in got if not off[name] <= allowed[name]]  # also where it is NaN

    def spend(self, seconds: float) -> None:
        """Record the time that an audit took."""
        self.count += 1
        self._last = seconds
        self._spent += seconds

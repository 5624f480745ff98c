"""The demonstration's Fisher: a loop over samples beside `EWC(model, dataset)`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandera.pandas as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_plugin.plain import EWC
from experiments.reporting.study_output import columns
from experiments.results.schemas import PROVENANCE

TIMES = (1, 10)  # as many samples as asked for, and ten times as many

FISHER = pa.DataFrameSchema(
    {
        **columns(str, "form"),
        **columns(int, "n_samples", "rounds", check=pa.Check.ge(1)),
        **columns(float, "loop_ms", "ours_ms", check=pa.Check.gt(0)),
        **columns(float, "ratio", "ratio_q25", "ratio_q75", check=pa.Check.gt(0)),
        **columns(float, "largest_difference", check=pa.Check.ge(0)),
        **PROVENANCE,
    },
    strict=True,
    name="fisher.csv",
)


def loop_fisher(model: nn.Module, samples: list[Tensor]) -> dict[str, Tensor]:
    """The PREDICTED Fisher by one backward pass per sample, as it is usually written."""
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for x in samples:
        model.zero_grad()
        logits = model(x).view(1, -1)
        loss = F.nll_loss(F.log_softmax(logits, dim=1), logits.argmax(1))
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            fisher[name] += p.grad.square() / len(samples)
    return fisher


def time_fisher(model: nn.Module, x: Tensor, samples: int, rounds: int) -> Iterator[dict[str, Any]]:
    """CPU time of the loop and of `EWC`, in turns.

    Args:
        model: Whose Fisher it is.
        x: Inputs [N, P] to draw from.
        samples: How many; and ten times as many.
        rounds: How often both are timed.

    Yields:
        A row per number of samples and form of them: a list, and one batch.
    """
    generator = torch.Generator().manual_seed(0)
    for times, form in product(TIMES, ("list of samples", "one batch")):
        chosen = list(x[torch.randperm(len(x), generator=generator)[: times * samples]])
        dataset = [torch.stack(chosen)] if form == "one batch" else chosen
        ours = EWC(model, dataset).fisher  # both once before the clock runs
        loop = loop_fisher(model, chosen)
        ways = (partial(loop_fisher, model, chosen), partial(EWC, model, dataset))
        pairs = np.array([[_cpu_ms(way) for way in ways] for _ in range(rounds)])  # [rounds, 2]
        low, ratio, high = np.quantile(pairs[:, 0] / pairs[:, 1], [0.25, 0.5, 0.75])
        yield {
            "form": form,
            "n_samples": len(chosen),
            "rounds": rounds,
            **dict(zip(("loop_ms", "ours_ms"), np.median(pairs, axis=0), strict=True)),
            **{"ratio": ratio, "ratio_q25": low, "ratio_q75": high},
            "largest_difference": max(
                float((ours[name] - f).abs().max() / f.abs().max()) for name, f in loop.items()
            ),
        }


def _cpu_ms(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)

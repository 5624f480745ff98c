"""Decides before the pass which engine serves which parameter.

A layer rule where the trial finds that it gives the sample loop's answer, else `vmap(grad)` where
that does, else the loop itself.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.matching import Served, match_rules
from ewc_plugin.fisher.per_sample import Forward
from ewc_plugin.fisher.probe import Trial

EngineName = Literal["auto", "rules", "vmap", "loop"]


@dataclass(frozen=True)
class Plan:
    """Who serves each parameter.

    Attributes:
        served: An entry per parameter, in order.
        chunk_size: Samples per forward pass.
        overwrites_input: Whether the model works in place on its input and so needs a copy.
    """

    served: dict[str, Served]
    chunk_size: int
    overwrites_input: bool


def make_plan(
    model: nn.Module,
    forward: Forward,
    params: dict[str, nn.Parameter],
    batch: Batch,
    engine: EngineName,
    chunk_size: int | None = None,
    one_vector: bool = False,
) -> Plan:
    """Who serves which parameter.

    Args:
        model: In eval mode.
        forward: Maps (model, batch) to logits.
        params: The trainable parameters.
        batch: Its first three samples are tried (repeated where there are fewer).
        engine: "auto", or one engine that must serve all.
        chunk_size: Samples per forward pass; chosen where it is None.
        one_vector: Whether one score vector per sample is known to go back through the graph.

    Returns:
        An entry per parameter, in order, and the number of samples per chunk.

    Raises:
        ValueError: The samples of a batch interact, or the forced engine can't serve a parameter.
    """
    trial = Trial(model, forward, params, batch)
    chunk_size = chunk_size or trial.fitting_chunk(one_vector)
    if engine == "loop":
        served = {name: Served("loop", "forced") for name in params}
        return Plan(served, chunk_size, trial.overwrites_input)
    plan: dict[str, Served] = {}
    reasons = dict.fromkeys(params, "forced")
    if engine != "vmap":
        plan, reasons = match_rules(trial)
    if engine == "rules" and reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"`engine` 'rules' can't serve every parameter ({listed}). Use 'auto'.")
    if reasons:
        failure = trial.vmap_failure({name: params[name] for name in reasons})
        if failure and engine == "vmap":
            raise ValueError(f"`engine` 'vmap' can't serve this model ({failure}). Use 'auto'.")
        for name, reason in reasons.items():
            if failure:
                plan[name] = Served("loop", f"{reason}; vmap: {failure}")
            else:
                plan[name] = Served("vmap", reason)
    served = {name: plan[name] for name in params}
    return Plan(served, chunk_size, trial.overwrites_input)

"""A run's state between two experiences in a file, from which it goes on to the last bit.

The file holds tensors and plain values alone. It is replaced by rename, as results are.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from avalanche.training.plugins import EWCPlugin
from avalanche.training.utils import ParamData

from ewc_plugin import DiagonalEWCPlugin
from experiments.data.sources import DataSource
from experiments.results.files import folder_lock, replace_file
from experiments.results.provenance import code_hash
from experiments.settings.run import RunSettings
from experiments.training.avalanche_ewc import BuiltinEWC
from experiments.training.methods import L2, MethodPlugins

State = dict[str, Any]
CHECKSUM_BYTES = 32  # of SHA-256, in front of the state


def can_be_stored(method: MethodPlugins) -> bool:
    """Whether a checkpoint has all that a method remembers; a subclass may remember more."""
    return all(type(plugin) in (DiagonalEWCPlugin, L2, BuiltinEWC) for plugin in method.every)


def write_checkpoint(
    path: Path,
    settings: RunSettings,
    source: DataSource,
    strategy: Any,
    progress: State,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Put the state of a run between two experiences on the disk.

    Args:
        path: Replaced if it is there.
        settings: Of the run.
        source: Its data.
        strategy: Its strategy.
        progress: Plain values that the run restores on resuming.
        say: Called with a line where the file can't be written, without which the run goes on.
    """
    state = {
        "of": _identity(settings, source),
        "progress": progress,
        "strategy": _strategy_state(strategy),
        "random": _random_state(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    content = file.getvalue()
    try:
        with folder_lock(path.parent):
            replace_file(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        reason = error.strerror or error
        say(f"{settings.run_id}: its checkpoint can't be written ({reason}); the run goes on.")


def read_checkpoint(
    path: Path,
    settings: RunSettings,
    source: DataSource,
    say: Callable[[str], None] = lambda line: None,
) -> State | None:
    """Read a run's checkpoint.

    Args:
        path: The file, if there is one.
        settings: Of the run.
        source: Its data.
        say: Called with a line where a file can't be used, so that the run starts anew.

    Returns:
        The state; None without a file, or if it is damaged or of other code, data or settings.
    """
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise OSError("it is no regular file")  # a named pipe would be waited for
        stored = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        say(f"{settings.run_id}: its checkpoint can't be read ({reason}); the run starts anew.")
        return None
    checksum, content = stored[:CHECKSUM_BYTES], stored[CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        say(f"{settings.run_id}: its checkpoint is damaged; the run starts anew.")
        return None
    try:
        state: State = torch.load(
            io.BytesIO(content), map_location=settings.device, weights_only=True
        )
        of = dict(state["of"])
        state = {name: state[name] for name in ("of", "progress", "strategy", "random")}
    except Exception:  # it was sealed by something else; torch raises errors of many types
        say(f"{settings.run_id}: its checkpoint is none of ours; the run starts anew.")
        return None
    mine = _identity(settings, source)
    if of != mine:
        other = [name for name, value in mine.items() if of.get(name) != value]
        say(f"{settings.run_id}: its checkpoint is of another {other[0]}; the run starts anew.")
        return None
    return state


def restore(state: State, strategy: Any, experiences: Sequence[Any]) -> State:
    """Bring a new strategy and the random numbers to where the run was.

    Args:
        state: Of `read_checkpoint`.
        strategy: As made for the same run, not used yet.
        experiences: All of the stream's, which give the model its heads.

    Returns:
        The run's own progress.
    """
    of_strategy = state["strategy"]
    model, optimizer = strategy.model, strategy.optimizer
    for experience in experiences:
        avalanche_model_adaptation(model, experience)
    model.to(strategy.device)
    model.load_state_dict(of_strategy["model"])
    strategy.make_optimizer(reset_optimizer_state=True)  # else the first `train` throws it away
    for name, parameter in model.named_parameters():
        if values := of_strategy["optimizer"].get(name):
            optimizer.state[parameter] = {
                key: value.cpu() if key == "step" else value for key, value in values.items()
            }
    vars(strategy.clock).update(of_strategy["clock"])
    for plugin, plugin_state in zip(_methods(strategy), of_strategy["methods"], strict=True):
        _restore_method(plugin, plugin_state)
    _restore_random(state["random"])
    progress: State = state["progress"]
    return progress


def _identity(settings: RunSettings, source: DataSource) -> State:
    return {
        "run_id": settings.run_id,
        "data": source.checksum,
        "torch": str(torch.__version__),
        "code": code_hash(),
    }


def _strategy_state(strategy: Any) -> State:
    optimizer = strategy.optimizer
    return {
        "model": strategy.model.state_dict(),
        # By name: the optimizer's order of parameters depends on when heads were added.
        "optimizer": {n: dict(optimizer.state.get(p, {})) for n, p in _parameters(strategy)},
        "clock": {k: v for k, v in vars(strategy.clock).items() if isinstance(v, int)},
        "methods": [_method_state(plugin) for plugin in _methods(strategy)],
    }


def _parameters(strategy: Any) -> list[tuple[str, Any]]:
    return list(strategy.model.named_parameters())


def _methods(strategy: Any) -> list[Any]:
    return [p for p in strategy.plugins if isinstance(p, (DiagonalEWCPlugin, EWCPlugin))]


def _method_state(plugin: Any) -> State:
    if isinstance(plugin, DiagonalEWCPlugin):
        return plugin.state_dict()
    return {
        name: {t: {k: p.data for k, p in stored.items()} for t, stored in kept.items()}
        for name, kept in (("anchors", plugin.saved_params), ("fishers", plugin.importances))
    }


def _restore_method(plugin: Any, state: State) -> None:
    if isinstance(plugin, DiagonalEWCPlugin):
        plugin.load_state_dict(state)
        return
    for kept, stored in (
        (plugin.saved_params, state["anchors"]),
        (plugin.importances, state["fishers"]),
    ):
        for t, tensors in stored.items():
            kept[t] = {
                k: ParamData(k, init_tensor=tensor, device=tensor.device)
                for k, tensor in tensors.items()
            }


def _random_state() -> State:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random(state: State) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])

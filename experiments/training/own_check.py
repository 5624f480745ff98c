"""Own benchmarks, models and methods are built and tried on two samples before anything trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from avalanche.models import avalanche_forward
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from torch import Tensor, nn
from torch.utils.data import default_collate

from experiments.data.sources import DataSource
from experiments.data.streams import Stream, shared_stream
from experiments.settings.own import OwnFunction, function_of
from experiments.settings.run import OWN, RunSettings
from experiments.training.methods import own_method
from experiments.training.networks import make_model


def check_own(cells: Sequence[RunSettings], source: DataSource) -> None:
    """Build what the user's own functions return, once for each of their combinations.

    Args:
        cells: The runs; those of the first seed are tried.
        source: The images, and the files of the functions.

    Raises:
        ValueError: Naming the function, what it must do and what it did.
    """
    tried = set()
    for cell in cells:
        if cell.seed == cells[0].seed and any(getattr(cell, f"{name}_sha256") for name in OWN):
            kind = (cell.stream, *(getattr(cell, name) for name in BUILT_FROM))
            if kind not in tried:
                tried.add(kind)
                _try(cell, source)


BUILT_FROM = (
    *("model", "model_sha256", "hidden_size", "hidden_layers", "dropout", "head"),
    *("method", "method_sha256", "ewc_lambda", "mode", "fisher_type", "loss_classes"),
)


def _try(cell: RunSettings, source: DataSource) -> None:
    torch.manual_seed(cell.seed)
    stream = shared_stream(cell, source)
    model = make_model(cell, stream, source.files)
    if cell.method_sha256:
        made = [own_method(cell, stream, source.files) for _ in range(2)]
        function = function_of("method", cell.method, cell.method_sha256, source.files)
        _check_new(function, *([*one.early, one.criterion] for one in made))
    logits = _logits(cell, source, stream, model)
    if not cell.model_sha256:
        return
    function = function_of("model", cell.model, cell.model_sha256, source.files)
    if not _are_logits(logits, stream.n_outputs):
        is_tensor = isinstance(logits, Tensor)
        got = f"{tuple(logits.shape)} {logits.dtype}" if is_tensor else type(logits).__name__
        rule = f"return logits [N, {stream.n_outputs} or more] for a batch of N"
        raise function.error(rule, f", got {got} for N = 2")
    if not any(p.requires_grad for p in model.parameters()):
        raise function.error("have a parameter with requires_grad=True, to be trained")
    again = make_model(cell, stream, source.files)
    _check_new(
        function, *([p for p in one.parameters() if p.requires_grad] for one in (model, again))
    )


def _check_new(function: OwnFunction, first: Iterable[Any], second: Iterable[Any]) -> None:
    """Raise if two calls of a function share an object: a run would begin with another's state."""
    known = {id(one) for one in first if one is not None}
    for other in second:
        if id(other) in known:
            rule = "make new plugins or parameters in each call, since each run begins anew"
            raise function.error(rule, f", got a {type(other).__name__} twice")


def _logits(cell: RunSettings, source: DataSource, stream: Stream, model: nn.Module) -> Any:
    """What the model gives for two samples of the stream, after it has got heads for all of it."""
    try:
        for experience in stream.test_stream:  # Avalanche's take no negative index
            avalanche_model_adaptation(model, experience)
        x, *_, task = default_collate([experience.dataset[0]] * 2)
        with torch.no_grad():
            return avalanche_forward(model.eval(), x, task)
    except Exception as error:  # the user's code may raise any
        if not cell.model_sha256:
            shape = f"samples of the shape {stream.shape} ({type(error).__name__}: {error})"
            raise ValueError(f"`model` must take {shape}, got {cell.model}.") from error
        function = function_of("model", cell.model, cell.model_sha256, source.files)
        raise function.error("take a batch of the stream", error) from error


def _are_logits(found: Any, n_outputs: int) -> bool:
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return False
    return found.ndim == 2 and found.shape[1] >= n_outputs

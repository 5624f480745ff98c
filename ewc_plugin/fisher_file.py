"""Save and load a Fisher with its metadata as a safetensors file (loading runs no code)."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ewc_plugin
from ewc_plugin.fisher.result import Fisher
from ewc_plugin.penalty.options import checked_device
from ewc_plugin.penalty.parameters import (
    by_canonical_name,
    canonical_parameters,
    check_has_values,
)

_FORMAT = "ewc-plugin fisher 1"


class SavedFisher(Fisher):
    """A `Fisher` out of a file.

    Attributes:
        anchor: The parameters at which the Fisher was computed, by name; None if not saved.
        about: The caller's own notes.
        versions: Of ewc_plugin and torch when it was saved.
        saved_at: When that was, in UTC.
    """

    anchor: dict[str, Tensor] | None
    about: dict[str, Any]
    versions: dict[str, str]
    saved_at: str


def save_fisher(
    path: str | os.PathLike[str],
    fisher: Mapping[str, Tensor],
    *,
    anchor: nn.Module | Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Save a Fisher and its metadata; the file is written completely or not at all.

    Args:
        path: Of the file, usually `*.safetensors`.
        fisher: By parameter name, as `diagonal_fisher` gives it.
        anchor: The model that it was computed on, or its parameters by name.
        about: Notes for whoever reads it: anything that JSON can hold.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: The folder of `path` does not exist.
        TypeError: `about` or `anchor` is of another type, or `about` cannot be written as JSON.
        ValueError: `fisher` has no entries, or one that is negative or not finite; or `anchor` has
            other names or shapes.
    """
    safetensors = _safetensors()
    tensors = _checked(fisher)
    if isinstance(anchor, nn.Module):
        tensors = by_canonical_name(anchor, tensors)
    metadata = {
        "format": _FORMAT,
        "parameters": _shapes_hash(tensors),
        "fisher": _hash(tensors),
        "fisher_type": json.dumps(getattr(fisher, "fisher_type", None)),
        "n_samples": json.dumps(getattr(fisher, "n_samples", None)),
        "versions": json.dumps({"ewc_plugin": ewc_plugin.__version__, "torch": torch.__version__}),
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "about": _as_json(about or {}),
    }
    entries = {f"fisher/{name}": tensor for name, tensor in tensors.items()}
    if anchor is not None:
        weights = _weights(anchor, tensors)
        metadata["weights"] = _hash(weights)
        entries |= {f"anchor/{name}": tensor for name, tensor in weights.items()}
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`path` is in the folder {target.parent}, which does not exist.")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        safetensors.save_file(entries, str(temporary), metadata)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_fisher(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    check_weights: bool | None = None,
    device: torch.device | str = "cpu",
) -> SavedFisher:
    """Load a Fisher; check it against its metadata and, if given, a model.

    `consolidate` takes the model's weights as the anchor, and F belongs to the weights that it was
    computed at. So the model's weights are compared with those in the file, if it was saved with
    `anchor`. By default a difference is a warning and not an error: in a resumed run, say, the
    model has been trained further.

    Args:
        path: Of a file of `save_fisher`.
        model: Must have the parameters that the Fisher is of, by name and shape.
        check_weights: If the model's weights are not those in the file, True is an error, None a
            warning, and False nothing. Without weights in the file, True is an error.
        device: Of the tensors.

    Returns:
        The Fisher, which `QuadraticPenalty.consolidate` and `DiagonalEWCPlugin.consolidate` take.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: The file is of another kind, damaged, or of another model; or `check_weights`
            without a model, or without weights in the file; or `device` cannot be used.
        TypeError: `model` or `check_weights` has another type.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module or None, got {model!r}.")
    if check_weights not in (True, False, None):
        raise TypeError(f"`check_weights` must be True, False or None, got {check_weights!r}.")
    if check_weights and model is None:
        raise ValueError("`check_weights=True` compares with a model; pass `model` too.")
    metadata, entries = _read(Path(path), str(checked_device("device", device)))
    fisher = {n.removeprefix("fisher/"): t for n, t in entries.items() if n.startswith("fisher/")}
    anchor = {n.removeprefix("anchor/"): t for n, t in entries.items() if n.startswith("anchor/")}
    recorded = {"parameters": _shapes_hash(fisher), "fisher": _hash(fisher)}
    if anchor:
        recorded["weights"] = _hash(anchor)
    if any(metadata.get(key) != value for key, value in recorded.items()):
        raise ValueError(f"`path` {path} is damaged: its tensors are not those that were saved.")
    try:
        notes = {key: json.loads(metadata[key]) for key in _NOTES}
        saved_at = metadata["saved_at"]
    except (KeyError, ValueError):
        raise ValueError(f"`path` {path} is damaged: its record cannot be read.") from None
    if model is not None:
        fisher, anchor = (by_canonical_name(model, tensors) for tensors in (fisher, anchor))
        _check_model(path, model, fisher)
        if check_weights is not False:
            _check_weights(path, model, anchor, must_be_equal=check_weights is True)
    loaded = SavedFisher(fisher, fisher_type=notes["fisher_type"], n_samples=notes["n_samples"])
    loaded.anchor, loaded.about = anchor or None, notes["about"]
    loaded.versions, loaded.saved_at = notes["versions"], saved_at
    return loaded


_MOST_NAMES = 3  # of a message
_NOTES = ("fisher_type", "n_samples", "versions", "about")


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError:
        raise ImportError(
            "A Fisher is saved and loaded with safetensors, which is not installed: run "
            "`pip install safetensors`."
        ) from None


def _read(path: Path, device: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    _safetensors()
    safetensors = import_module("safetensors")
    if not path.is_file():
        raise ValueError(f"`path` must be a file of `save_fisher`, and {path} is no file.")
    try:
        with safetensors.safe_open(str(path), framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == _FORMAT:
                return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`path` must be a file of `save_fisher`, and {path} cannot be read as one: {error}."
        ) from None
    raise ValueError(
        f"`path` must be a file of `save_fisher`, and {path} is a safetensors file of something "
        "else, or of a later version."
    )


def _as_json(about: object) -> str:
    if not isinstance(about, Mapping):
        raise TypeError(f"`about` must be a mapping, such as {{'task': 1}}, got {about!r}.")
    try:
        return json.dumps(dict(about))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`about` must hold what JSON can: strings, numbers, lists and mappings ({error})."
        ) from error


def _check_model(path: Any, model: nn.Module, fisher: dict[str, Tensor]) -> None:
    parameters = canonical_parameters(model)
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    differences = [
        *(f"the model has no {n!r}" for n in sorted(fisher.keys() - parameters.keys())),
        *(f"the file has no {n!r}" for n in sorted(trainable - fisher.keys())),
        *(
            f"{n!r} is {tuple(f.shape)} in the file, {tuple(parameters[n].shape)} in the model"
            for n, f in fisher.items()
            if n in parameters and f.shape != parameters[n].shape
        ),
    ]
    if differences:
        raise ValueError(f"`path` {path} is the Fisher of another model: {'; '.join(differences)}.")


def _check_weights(
    path: Any, model: nn.Module, anchor: dict[str, Tensor], *, must_be_equal: bool
) -> None:
    """Raise, or warn, if the model's weights are not those in the file."""
    if must_be_equal and not anchor:
        raise ValueError(f"`path` {path} has no weights; save it with `anchor=model`.")
    parameters = canonical_parameters(model)
    for name in anchor:
        check_has_values(f"The model's `{name}`", parameters[name])
    others = [
        repr(name)
        for name, weight in anchor.items()
        if not torch.equal(weight.to(parameters[name].device), parameters[name].detach())
    ]
    if not others:
        return
    names = ", ".join(others[:_MOST_NAMES]) + (", ..." if len(others) > _MOST_NAMES else "")
    message = (
        f"`path` {path} is the Fisher of other weights than the model's: {len(others)} of "
        f"{len(anchor)} parameters differ ({names})."
    )
    if must_be_equal:
        raise ValueError(message)
    warnings.warn(
        f"{message} `consolidate` would anchor the penalty at the model's. Those that the Fisher "
        "was computed at are `anchor` of what is returned; if others are meant, pass "
        "`check_weights=False`.",
        stacklevel=3,
    )


def _checked(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(fisher, Mapping) or not fisher or not all(isinstance(n, str) for n in fisher):
        raise ValueError("`fisher` must map parameter names to tensors, and not be empty.")
    for name, tensor in fisher.items():
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"`fisher[{name!r}]` must be a tensor of real numbers, got {kind}.")
        check_has_values(f"`fisher[{name!r}]`", tensor)
        if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            raise ValueError(f"`fisher[{name!r}]` must be a tensor, finite and >= 0.")
    return {name: _own(tensor) for name, tensor in fisher.items()}


def _weights(anchor: nn.Module | Mapping[str, Tensor], fisher: Any) -> dict[str, Tensor]:
    if not isinstance(anchor, nn.Module | Mapping):
        raise TypeError(
            f"`anchor` must be a model, or its parameters by name, got {type(anchor).__name__}."
        )
    weights = canonical_parameters(anchor) if isinstance(anchor, nn.Module) else anchor
    for name, tensor in fisher.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(
                f"`anchor` must have the parameters of `fisher`, and lacks {name!r} of shape "
                f"{tuple(tensor.shape)}."
            )
        if not isinstance(weights[name], Tensor):
            kind = type(weights[name]).__name__
            raise TypeError(f"`anchor[{name!r}]` must be a tensor, got {kind}.")
        check_has_values(f"`anchor[{name!r}]`", weights[name])
    return {name: _own(weights[name]) for name in fisher}


def _own(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor, as safetensors requires."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _shapes_hash(tensors: Mapping[str, Tensor]) -> str:
    shapes = sorted((name, list(tensor.shape)) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _hash(tensors: Mapping[str, Tensor]) -> str:
    own = {name: tensor.cpu() for name, tensor in tensors.items()}
    return hashlib.sha256(_safetensors().save(own)).hexdigest()

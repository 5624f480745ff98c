"""Split a batch into inputs, targets and task labels; find the logits in a model's output."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ewc_plugin.batches import Batch, as_pytree

_LABELS = ("labels", "label")
_TASK_LABELS = ("task_labels", "targets_task_labels")


class Unpacked(NamedTuple):
    """The parts of a batch.

    Attributes:
        inputs: The model's; a mapping is passed as keyword arguments.
        targets: [N, ...].
        task_labels: [N] int64, or None where the batch has none.
    """

    inputs: Any
    targets: Any
    task_labels: Any


def unpack(batch: Batch) -> Unpacked:
    """Split a batch into inputs, targets and task labels.

    Args:
        batch: (x, y), (x, y, ..., task labels), or a mapping with "labels" (or "label"), perhaps
            "task_labels" (or "targets_task_labels"), and the model's keyword arguments.

    Returns:
        Its parts.

    Raises:
        ValueError: It is neither.

    Example:
        >>> unpack({"input_ids": 1, "attention_mask": 2, "labels": 3}).inputs
        {'input_ids': 1, 'attention_mask': 2}
        >>> unpack(("x", "y", "t")).task_labels
        't'
    """
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        targets = _pop_first(inputs, _LABELS)
        return Unpacked(inputs, targets, _pop_first(inputs, _TASK_LABELS))
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return Unpacked(batch[0], batch[1], batch[-1] if len(batch) > 2 else None)
    raise ValueError(
        "A batch must be (x, y), (x, y, task labels) or a mapping with 'labels', got "
        f"{type(batch).__name__}. Override `unpack`."
    )


def beside_no_labels(batch: Batch) -> Batch:
    """Inputs alone, x or (x,), as (x, None); another batch as it is."""
    if isinstance(batch, Tensor):
        return batch, None
    alone = isinstance(batch, (tuple, list)) and len(batch) == 1
    return (batch[0], None) if alone else batch


def logits_of(output: Any) -> Any:
    """Return the logits in a model's output.

    Args:
        output: A tensor, or a mapping or an object with "logits".

    Returns:
        The logits, or `output` itself if it is none of these.

    Raises:
        ValueError: It is a tuple or a list, which does not say where its logits are.

    Example:
        >>> logits_of({"logits": "here", "hidden_states": "there"})
        'here'
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)):
        raise ValueError(
            f"The model returns a {type(output).__name__} of {len(output)} items, which does not "
            "say where its logits are. Give a `forward` that returns them: override the plugin's, "
            "or pass it to `diagonal_fisher` or in `fisher_options`."
        )
    return output


def with_logits(output: Any, logits: Tensor) -> Any:
    """Return a copy of a model's output with other logits in the place of its own."""
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed["logits"] = logits
    elif isinstance(output, Tensor):
        return logits
    else:
        changed = copy.copy(output)
        changed.logits = logits
    return changed


def labelled(y: Any, ignore_index: int) -> Tensor | None:
    """Return a mask of the samples whose label is not ignored; None if no mask is needed."""
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
        return None
    keep = y.long() != ignore_index  # in uint8, -100 equals 156
    return None if bool(keep.all()) else keep


def on_device(batch: Batch, device: torch.device | str) -> Batch:
    """A batch's tensors on `device`; any mapping in it becomes a dict."""
    return tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, as_pytree(batch)
    )


def _pop_first(items: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((items.pop(key) for key in keys if key in items), None)

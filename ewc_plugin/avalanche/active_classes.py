"""The mask of the classes that a sample can have: a head or the criterion may exclude some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from avalanche.models import MultiHeadClassifier
from torch import Tensor, nn


def active_classes(
    criterion: Any, model: nn.Module, task_labels: Callable[[], Any], C: int
) -> Tensor | None:
    """Return a mask of the classes that the Fisher's labels can take.

    Args:
        criterion: The strategy's; `MaskedCrossEntropy` names its classes.
        model: The model. Outputs of a head narrower than C are padded with zeros; these are masked.
        task_labels: Function that returns the task labels [N] or None; called only if heads differ.
        C: Number of logits.

    Returns:
        True for an active class: [C] or [N, C]; None where all are.
    """
    masks = [_of_criterion(criterion, C), _of_heads(model, task_labels, C)]
    known = [mask.to(next(model.parameters()).device) for mask in masks if mask is not None]
    if not known:
        return None
    return known[0] if len(known) == 1 else known[0] & known[1]


def _of_criterion(criterion: Any, C: int) -> Tensor | None:
    if not hasattr(criterion, "current_mask"):
        return None
    active = torch.zeros(C, dtype=torch.bool)
    active[criterion.current_mask(C)] = True
    return None if bool(active.all()) else active


def _of_heads(model: nn.Module, task_labels: Callable[[], Any], C: int) -> Tensor | None:
    heads = [m for m in model.modules() if isinstance(m, MultiHeadClassifier)]
    if not heads or any(head.max_class_label != C for head in heads):
        return None
    widths: dict[int, int] = {}  # of several heads whose outputs are combined, the widest
    for head in heads:
        for task, layer in head.classifiers.items():
            width = layer.classifier.out_features
            widths[int(task)] = max(width, widths.get(int(task), 0))
    if not widths or min(widths.values()) >= C or (t := task_labels()) is None:
        return None
    of_task = torch.full((max(widths) + 1,), C)
    for task, width in widths.items():
        of_task[task] = width
    return torch.arange(C, device=t.device) < of_task.to(t.device)[t][:, None]

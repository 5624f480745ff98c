"""The default inputs and targets of a model, and checks of its outputs and logits."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch, n_samples

_LABELS = ("labels", "label", "task_labels", "targets_task_labels")  # of a mapping, not inputs

# Largest difference of an output between two equal computations: relative to the size of its class,
# and to the largest output of all. Rounding depends on the batch: in float32 on a CPU it was 2e-7
# to 8e-6 of a class in convolutional, recurrent and attention networks, and 1.4e-5 in a chaotic one
# of 50 layers.
_TOLERANCES = {torch.float64: (1e-6, 1e-11), torch.float32: (2e-4, 4e-6)}
_ELSEWHERE = (1e-2, 1e-4)  # float32 on devices that may use TF32 or similar
_HALF = (0.1, 0.03)
# An output so far below its sample's largest is one of a masked class: its probability is zero in
# any precision, and its size says nothing of the others.
_MASKED_BELOW = 200.0


INTERACT = (
    "its samples interact or its forward is random, so no per-sample Fisher exists. Switch batch "
    "statistics and noise off, or use fisher_type 'batched'."
)


class SamplesInteractError(ValueError):
    """A sample's outputs depend on the other samples of its batch, or are random."""


def default_forward(model: nn.Module, batch: Batch) -> Any:
    """The outputs for a tensor, a tuple (x, ...), or a mapping of keyword arguments and labels.

    Args:
        model: Any.
        batch: Its inputs, and what else belongs to the samples.

    Returns:
        What the model returns.

    Raises:
        TypeError: The model does not take such inputs.
    """
    try:
        if isinstance(batch, Mapping):
            left_out = set(_LABELS)
            if _decoder_reads_labels(model, batch):
                left_out.remove("labels")
            return model(**{key: value for key, value in batch.items() if key not in left_out})
        return model(batch if isinstance(batch, Tensor) else batch[0])
    except TypeError as error:
        if not isinstance(batch, Mapping) and isinstance(batch[0], Tensor):
            raise  # the model's own
        raise TypeError(
            f"`model` does not take the inputs of {_described(batch)}: {error}. Pass `forward`, "
            "which maps (model, batch) to logits [N, C]."
        ) from error


def has_decoder(model: nn.Module) -> bool:
    """Whether a model has a decoder with inputs of its own, as those of `transformers` do."""
    return any(
        "decoder_input_ids" in _arguments(getattr(type(module), "forward", None))
        for module in model.modules()
    )


def _decoder_reads_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the decoder's inputs are the shifted labels, as in the training of the model."""
    labels = batch.get("labels")
    given = "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
    return not given and isinstance(labels, Tensor) and labels.dim() > 1 and has_decoder(model)


@lru_cache(256)
def _arguments(forward: Callable[..., Any] | None) -> frozenset[str]:
    if forward is None:  # a TorchScript module's is made by its instance
        return frozenset()
    try:
        return frozenset(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def found_targets(batch: Batch) -> Tensor | None:
    """The labels of (x, y, ...), or of a mapping with "labels" or "label"; None: it has none."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABELS[:2] if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def default_targets(batch: Batch) -> Tensor:
    """The labels of (x, y, ...), or of a mapping with "labels" or "label".

    Args:
        batch: The batch.

    Returns:
        The labels.

    Raises:
        ValueError: It has none.
    """
    found = found_targets(batch)
    if found is None:
        raise ValueError(
            "`batches` must yield (x, y, ...) or mappings with 'labels' where labels are needed, "
            f"got {_described(batch)}. Pass `targets`, which maps a batch to y [N] int64."
        )
    return found


def checked_logits(output: Any, batch: Batch, forward: object) -> Tensor:
    """Return the logits [N, C] in a model's output; raise if they cannot be logits.

    Args:
        output: The logits, or an object or mapping with "logits". Which item of a tuple they are is
            never guessed.
        batch: N samples.
        forward: The function that returned the output, for the error message.

    Returns:
        The logits, [N, C] or [N, ...].

    Raises:
        ValueError: Not a tensor with a row for each sample.
    """
    logits = output
    if isinstance(output, Mapping) and "logits" in output:
        logits = output["logits"]
    elif not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        logits = output.logits
    if forward is default_forward:
        who, remedy = "`model`", "Pass `forward`, which maps (model, batch) to them."
    else:
        who, remedy = "`forward`", "Pick them out of the model's output there."
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{who} must return logits [N, C], got {type(logits).__name__} for a batch of "
            f"{_described(batch)}. {remedy}"
        )
    N = n_samples(batch)
    if logits.dim() < 1 or len(logits) != N:
        raise ValueError(
            f"{who} must return logits [N, C], or [N, ...] where outputs are dense, got shape "
            f"{tuple(logits.shape)} for N = {N}. {remedy}"
        )
    return logits


def _described(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with {sorted(map(str, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(type(item).__name__ for item in batch)}"
    return f"a {type(batch).__name__}"


def check_finite(logits: Tensor, places: int | Tensor) -> None:
    """Refuses NaN, inf, and a sample without any finite logit; -inf masks a class.

    Args:
        logits: [N, C], or dense outputs [N, ...].
        places: Index of its first sample in the whole stream, or of each of them [N].

    Raises:
        ValueError: A logit is not finite.
    """
    if bool(logits.isfinite().all()):
        return
    rows = logits.flatten(1) if logits.dim() > 1 else logits[:, None]
    masked = rows == -torch.inf
    bad = (~rows.isfinite() & ~masked).any(1) | masked.all(1)
    if bool(bad.any()):
        n = int(bad.nonzero()[0])
        place = int(places[n]) if isinstance(places, Tensor) else places + n
        raise ValueError(
            f"`model` gave a logit that is not finite for sample {place} "
            "of `batches` (counted from 0, in the order they came). Did the training diverge?"
        )


def check_not_probabilities(logits: Tensor) -> None:
    """Raise if the outputs are probabilities: softmax would then be applied twice.

    Args:
        logits: [N, C].

    Raises:
        ValueError: Every row is non-negative and sums to one.
    """
    close = 1e-4 if torch.finfo(logits.dtype).bits >= 32 else 1e-2
    p = logits.detach()
    if p.size(1) < 2 or bool((p < 0).any()):
        return
    if bool(((p.sum(1) - 1).abs() < close).all()):
        raise ValueError(
            "`model` returns probabilities (non-negative, summing to one), where logits are "
            "expected: the Fisher would be that of the softmax of a softmax. Return what goes into "
            "the softmax, or pass forward=lambda model, batch: model(batch[0]).log()."
        )


def is_half(logits: Tensor, params: Mapping[str, Tensor]) -> bool:
    """Whether a forward pass with these parameters was computed in less than float32."""
    dtypes = {logits.dtype, *(p.dtype for p in params.values() if p.is_floating_point())}
    autocast = torch.is_autocast_enabled(logits.device.type)
    return autocast or any(torch.finfo(dtype).bits < 32 for dtype in dtypes)


def outputs_agree(got: Tensor, expected: Tensor, scale: Tensor, half: bool) -> bool:
    """Whether outputs are equal but for rounding, entry by entry.

    Args:
        got: [M, C].
        expected: [M, C].
        scale: Outputs [N, C] whose largest entries, class by class, are the measure.
        half: Whether they were computed in less than float32.

    Returns:
        False also where the shapes differ.
    """
    if got.shape != expected.shape:
        return False
    got, expected, scale = got.detach(), expected.detach(), scale.detach()
    difference = (got - expected).masked_fill(got == expected, 0).abs()  # -inf == -inf
    if not bool(difference.any()):
        return True
    relative, of_largest = _TOLERANCES.get(expected.dtype, _HALF)
    if half:
        relative, of_largest = _HALF
    elif expected.dtype == torch.float32 and expected.device.type != "cpu":
        relative, of_largest = _ELSEWHERE
    by_class, largest = _sizes(scale)
    masked = expected.abs().masked_fill(_counts(expected) | ~expected.isfinite(), 0)
    return bool((difference <= relative * (by_class + masked) + of_largest * largest).all())


def _counts(outputs: Tensor) -> Tensor:
    """Which outputs [N, ...] are finite, and of no masked class."""
    rows = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
    finite = rows.isfinite()
    largest = rows.masked_fill(~finite, -torch.inf).amax(1, keepdim=True)
    return (finite & (rows >= largest - _MASKED_BELOW)).view_as(outputs)


def _sizes(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The size of each class, and of the largest output.

    That of a class is its largest output, less what a sample's outputs have in common where that
    makes it smaller: softmax does not see it.

    Args:
        outputs: [N, ...].

    Returns:
        [...] and a scalar.
    """
    counts = _counts(outputs)
    sizes = outputs.masked_fill(~counts, 0)
    rows, counted = sizes.reshape(len(sizes), -1), counts.reshape(len(sizes), -1)
    n = counted.sum(1, keepdim=True)
    common = rows.sum(1, keepdim=True) / n.clamp(min=1)
    centred = (rows - common.masked_fill(n < 2, 0)).masked_fill(~counted, 0)
    by_class = torch.minimum(sizes.abs().amax(0).flatten(), centred.abs().amax(0))
    return by_class.view(outputs.shape[1:]), sizes.abs().amax()

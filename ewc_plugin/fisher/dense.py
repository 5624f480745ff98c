"""Score vectors of dense outputs: a softmax at every token of a sequence or pixel of an image.

The sample is the sequence or image: log p(y_n | x_n) = sum_t log p(y_nt | x_n) over the positions t
that count, so that F = 1/N sum_n (sum_t J_nt^T v_nt)^2 with a vector v_nt at each of them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.outputs import has_decoder
from ewc_plugin.fisher.scores import (
    AT_DATA_LABELS,
    FisherType,
    Scores,
    drawn_labels,
    label_scores,
    score_vectors,
)

_MOST_EXACT = 2**11  # vectors, each of which takes a backward pass


def find_class_dim(outputs: torch.Size, labels: torch.Size | None, class_dim: int | None) -> int:
    """The axis of the classes: the one whose removal gives the labels' shape.

    Args:
        outputs: [N, ...], with the classes along one axis.
        labels: [N, ...] without them; None where there are no labels.
        class_dim: The caller's own answer.

    Returns:
        An axis in [1, outputs.dim()).

    Raises:
        ValueError: No axis or more than one fits, or `class_dim` doesn't.

    Example:
        >>> find_class_dim(torch.Size([8, 5, 100]), torch.Size([8, 5]), None)
        2
    """
    axes = range(1, len(outputs))
    if class_dim is not None:
        axis = class_dim + len(outputs) if class_dim < 0 else class_dim
        if axis not in axes:
            raise ValueError(
                f"`class_dim` must be an axis of the outputs {tuple(outputs)} other than that of "
                f"the samples, got {class_dim}."
            )
        return axis
    if labels is None:
        raise ValueError(
            f"`class_dim` is needed: the outputs have shape {tuple(outputs)}, and there are no "
            "integer labels whose shape says which axis is that of the classes. Pass class_dim=-1 "
            "for [N, T, V], class_dim=1 for [N, C, H, W]."
        )
    fitting = [axis for axis in axes if outputs[:axis] + outputs[axis + 1 :] == labels]
    if len(fitting) != 1:
        found = f"axes {fitting} fit" if fitting else "no axis fits"
        raise ValueError(
            f"`class_dim` is needed: {found} outputs of shape {tuple(outputs)} and labels of shape "
            f"{tuple(labels)}. If the labels have other positions than the outputs, bring both "
            "together in `forward` and `targets`."
        )
    return fitting[0]


def attention_mask(batch: Batch, *, of_decoder: bool = False) -> Tensor | None:
    """The attention mask of a mapping, or of one that a batch (mapping, labels) begins with.

    Args:
        batch: Any.
        of_decoder: Whether the outputs are those of a decoder, whose mask is another one.

    Returns:
        0 at padding and 1 elsewhere; None where there is none.

    Raises:
        ValueError: It has other values; or the mask is the encoder's alone, and nothing tells the
            decoder's inputs.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Mapping):
        return None
    name = "decoder_attention_mask" if of_decoder else "attention_mask"
    mask = inputs.get(name)
    if not isinstance(mask, Tensor):
        known = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & inputs.keys()
        if of_decoder and not known and inputs is batch and "attention_mask" in inputs:
            raise ValueError(
                "`positions` is needed: `model` has an encoder and a decoder, 'attention_mask' is "
                "the encoder's, and the batch has neither 'labels' nor 'decoder_input_ids'. Pass "
                "positions=f, where f maps a batch to the outputs' positions that count, or to "
                "None where all do."
            )
        return None
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"{name!r} must be 0 at padding and 1 elsewhere, got {float(mask.min()):g} to "
            f"{float(mask.max()):g}. An additive mask, or the numbers of sequences packed into one "
            "row, do not say which positions have a score. Pass positions=f, where f maps a batch "
            "to them, or to None where every position counts."
        )
    return mask


def default_positions(model: nn.Module) -> Callable[[Batch], Tensor | None]:
    """Map a batch to the mask of the outputs of `model`: the decoder's where it has one."""
    of_decoder = has_decoder(model)
    return lambda batch: attention_mask(batch, of_decoder=of_decoder)


def counted_positions(
    shape: torch.Size, labels: Tensor | None, ignore_index: int, mask: Tensor | None
) -> Tensor | None:
    """Return a mask of the positions that have a score.

    Args:
        shape: Of the positions, [N, ...].
        labels: Of that shape, or None.
        ignore_index: The label of a position that has none.
        mask: Of that shape, or None; zero at a position that has none.

    Returns:
        Bool, of that shape; None: all.

    Raises:
        ValueError: The labels or the mask have another shape.
    """
    counted: Tensor | None = None
    for name, found in (("targets", labels), ("positions", mask)):
        if found is None:
            continue
        if found.shape != shape:
            raise ValueError(
                f"`{name}` must have the shape {tuple(shape)} of the outputs without their class "
                f"axis, got {tuple(found.shape)}. Pass {name}=f, where f maps a batch to them, or "
                "to None where every position counts; `positions` is the attention mask by "
                "default. Where a model puts positions of its own before the inputs, cut them off "
                "in `forward`."
            )
        part = found != (ignore_index if name == "targets" else 0)
        counted = part if counted is None else counted & part
    return counted


def dense_vectors(
    outputs: Tensor,
    class_dim: int,
    fisher_type: FisherType,
    counted: Tensor | None,
    labels: Tensor | None,
    *,
    n_draws: int,
    generator: torch.Generator,
) -> Scores:
    """The vectors at every position that counts, and zeros elsewhere.

    PREDICTED, EMPIRICAL, REVERSED: one vector per sample. SAMPLED: one per draw, in which every
    position draws its own label. EXACT: C - 1 for each position, since given x the labels of
    different positions are independent and their mixed terms have mean zero.

    Args:
        outputs: Logits [N, ...] with classes along `class_dim`.
        class_dim: In [1, outputs.dim()).
        fisher_type: Neither batched nor a class mean.
        counted: Bool, the shape of outputs without their class axis; None: all.
        labels: Of the same shape, for the types at the data's labels.
        n_draws: For SAMPLED.
        generator: For SAMPLED. Positions that count draw in order, so padding changes no label.

    Returns:
        The vectors, of the outputs' shape.

    Raises:
        ValueError: EXACT would take too many, or as `score_vectors`.
    """
    z = outputs.detach().movedim(class_dim, -1)  # [N, ..., C]
    every = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device)
    at = every if counted is None else counted
    rows = z[at]  # [R, C]

    def spread(v: Tensor) -> Tensor:
        full = v.new_zeros(z.shape)
        full[at] = v
        return full.movedim(-1, class_dim)

    n_samples = int(at.flatten(1).any(1).sum())
    if fisher_type is FisherType.SAMPLED:
        p = rows.to(torch.promote_types(rows.dtype, torch.float32)).softmax(1)
        drawn = drawn_labels(p, n_draws, generator)  # [R, n_draws]
        # Draws that agree at one position may differ at another, so none share a vector.
        return Scores(
            n_draws,
            lambda s: spread(label_scores(p, drawn[:, s].contiguous()) / n_draws**0.5),
            n_samples,
        )
    y = labels[at].long() if labels is not None and fisher_type in AT_DATA_LABELS else None
    of_rows = score_vectors(rows, fisher_type, targets=y)
    if fisher_type is FisherType.EXACT:
        return _one_position_each(of_rows, at, spread, n_samples)
    return Scores(1, lambda s: spread(of_rows.vector(0)), n_samples)


def _one_position_each(
    of_rows: Scores, counted: Tensor, spread: Callable[[Tensor], Tensor], n_samples: int
) -> Scores:
    """Each column of the rows' factors, at one position at a time."""
    position = torch.arange(counted[0].numel(), device=counted.device)
    position = position.view(counted.shape[1:]).expand_as(counted)[counted]  # [R]
    used = position.unique()
    count = of_rows.count * len(used)
    if count > _MOST_EXACT:
        raise ValueError(
            f"`fisher_type` 'exact' would take {count} backward passes: {of_rows.count} for each "
            f"of {len(used)} positions. Use 'sampled', whose mean over draws is the same, or "
            "'predicted'."
        )

    def vector(s: int) -> Tensor:
        column, t = divmod(s, len(used))
        return spread(of_rows.vector(column) * (position == used[t])[:, None])

    return Scores(count, vector, n_samples)

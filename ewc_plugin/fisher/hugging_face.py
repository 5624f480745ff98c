"""Labels and logits of the language models of Hugging Face's `transformers`.

Nothing is imported from there: a model takes a mapping as keyword arguments and returns an object
with `logits` [N, T, V].
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ewc_plugin.batches import Batch
from ewc_plugin.fisher.dense import attention_mask
from ewc_plugin.fisher.outputs import default_forward, has_decoder


def causal_lm() -> dict[str, Any]:
    """Options of `diagonal_fisher` for a causal language model: each token predicts the next.

    A batch is a mapping with "input_ids" [N, T], perhaps "attention_mask" and "labels", which are
    the token ids themselves by default, as `transformers` has them: not shifted, -100 where a token
    is not to be learned. The sample is the sequence, log p = sum_t log p(token_t+1 | tokens up to
    t). Position t has a score if its own token and the next one are no padding, and the next one's
    label is not -100. The loss of `transformers` also counts the first token after padding on the
    left, which is predicted from nothing.

    Returns:
        `forward`, `targets`, `class_dim` and `positions`: `diagonal_fisher(model, loader,
        **causal_lm())`, or `DiagonalEWCPlugin(..., fisher_options=causal_lm())`.

    Example:
        >>> sorted(causal_lm())
        ['class_dim', 'forward', 'positions', 'targets']
    """
    return {
        "forward": _all_but_last,
        "targets": _next_tokens,
        "class_dim": -1,
        "positions": _both_are_tokens,
    }


def masked_lm() -> dict[str, Any]:
    """Options of `diagonal_fisher` for a masked language model, or a label for each token.

    A batch is a mapping with "input_ids" [N, T], perhaps "attention_mask", and "labels" [N, T] with
    -100 at the tokens that are not to be predicted, as `DataCollatorForLanguageModeling` makes it.

    Returns:
        `forward`, `targets` and `class_dim`, as `causal_lm`.

    Example:
        >>> masked_lm()["class_dim"]
        -1
    """
    return {
        "forward": default_forward_logits,
        "targets": _labels,
        "class_dim": -1,
    }


def default_forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [N, T, V] of a mapping of keyword arguments."""
    output = default_forward(model, _mapping(batch))
    logits: Tensor = output["logits"] if isinstance(output, Mapping) else output.logits
    return logits


def _all_but_last(model: nn.Module, batch: Batch) -> Tensor:
    if has_decoder(model):
        raise ValueError(
            f"`causal_lm` is for models without an encoder: {type(model).__name__} predicts each "
            "label at its own position. Leave `causal_lm` out."
        )
    return default_forward_logits(model, batch)[:, :-1]


def _next_tokens(batch: Batch) -> Tensor:
    batch = _mapping(batch)
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    return labels[:, 1:]


def _both_are_tokens(batch: Batch) -> Tensor | None:
    mask = attention_mask(_mapping(batch))
    return None if mask is None else (mask[:, :-1] != 0) & (mask[:, 1:] != 0)


def _labels(batch: Batch) -> Tensor:
    batch = _mapping(batch)
    if "labels" not in batch:
        raise ValueError(
            "`masked_lm` needs batches with 'labels', -100 at the tokens that are not to be "
            "predicted; DataCollatorForLanguageModeling makes them."
        )
    labels: Tensor = batch["labels"]
    return labels


def _mapping(batch: Batch) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            "`batches` must be mappings with 'input_ids', as a tokenizer makes them, got "
            f"{type(batch).__name__}."
        )
    return batch


def check_labels_are_shifted(model: nn.Module) -> None:
    """Refuse a causal language model whose logits would meet labels that are not shifted.

    Args:
        model: With neither `forward` nor `targets` of the caller's.

    Raises:
        ValueError: It is a model of `transformers` that generates from what it has read.
    """
    config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
    if config is None or not callable(can_generate) or not can_generate():
        return
    if not getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} predicts each next token, and labels of `transformers` are "
            "not shifted: the score would be that of tokens which the model has read. Pass "
            "**causal_lm(), or `forward` and `targets` of your own."
        )

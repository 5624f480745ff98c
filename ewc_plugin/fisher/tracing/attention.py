"""`F.multi_head_attention_forward`, written so that a function mode sees its `F.linear` calls.

A Python function that dispatches to modes runs its body with the mode off, so a mode would miss the
linear layers in it. Calls with a feature that is rare go to torch's own function, and a slower
engine serves their parameters.
"""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
# A call with one of these is left to torch.
_RARE = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")


def plain_call(args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments by name; None if the call must go to torch's own function."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments if _is_plain(given.arguments) else None


def _is_plain(call: dict[str, Any]) -> bool:
    """Whether a call uses only the supported features, with valid arguments."""
    query, key, value = call["query"], call["key"], call["value"]
    if not query.dim() == key.dim() == 3:
        return False
    T, N, E = query.shape
    heads = N * call["num_heads"]
    return (
        key.size(1) == N
        and key.shape[:2] == value.shape[:2]
        and (call["use_separate_proj_weight"] or E == key.size(-1) == value.size(-1))
        and call["embed_dim_to_check"] == E
        and E % call["num_heads"] == 0
        and not (call["training"] and call["dropout_p"])
        and not (call["is_causal"] and call["attn_mask"] is None)
        and all(call[name] is None or call[name] is False for name in _RARE)
        and _mask_fits(call["attn_mask"], (T, len(key)), (heads, T, len(key)))
        and _mask_fits(call["key_padding_mask"], (N, len(key)))
    )


def _mask_fits(mask: Tensor | None, *shapes: tuple[int, ...]) -> bool:
    if mask is None:
        return True
    return mask.shape in shapes and (mask.dtype == torch.bool or mask.is_floating_point())


def attention(call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Compute what torch's function returns for a supported call.

    Args:
        call: Its arguments, from `plain_call`.

    Returns:
        The outputs [T, N, E], and the weights or None.
    """
    # Torch goes along time first, and moves each gradient three times on its way to the projection.
    # Here a sample's entries lie together, and its gradients are moved once.
    q, k, v = (
        part.unflatten(-1, (call["num_heads"], -1)).transpose(1, 2) for part in _projected(call)
    )  # [N, heads, T, E / heads]
    needs_weights = call["need_weights"]
    causal = call["is_causal"] and call["key_padding_mask"] is None and not needs_weights
    mask = None if causal else _mask(call, q)
    weights = None
    if needs_weights:
        scores = (q * math.sqrt(1.0 / q.size(-1))) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        heads = weights @ v
        if call["average_attn_weights"]:
            weights = weights.mean(1)
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    out = heads.transpose(1, 2).flatten(2)  # [N, T, E]
    out = F.linear(out, call["out_proj_weight"], call["out_proj_bias"])
    return out.transpose(0, 1), weights


def _projected(call: dict[str, Any]) -> tuple[Tensor, ...]:
    """Queries, keys and values [N, T, E]."""
    weight, bias = call["in_proj_weight"], call["in_proj_bias"]
    query, key, value = (call[name].transpose(0, 1) for name in ("query", "key", "value"))
    E = query.size(-1)
    if call["use_separate_proj_weight"]:
        weights = tuple(call[f"{letter}_proj_weight"] for letter in "qkv")
    elif call["query"] is call["key"] and call["key"] is call["value"]:
        # Q, K and V share one projection, so its gradient is computed once for all three.
        parts: tuple[Tensor, ...] = F.linear(query, weight, bias).split(E, dim=-1)
        return parts
    else:
        weights = weight.split(E)
    biases = (None,) * 3 if bias is None else bias.split(E)
    inputs = zip((query, key, value), weights, biases, strict=True)
    return tuple(F.linear(*arguments) for arguments in inputs)


def _mask(call: dict[str, Any], q: Tensor) -> Tensor | None:
    """Return the additive attention mask [N, heads, T, T']; -inf blocks a position."""
    N, heads = q.shape[:2]
    mask: Tensor | None = None
    if call["attn_mask"] is not None:
        mask = _floats(call["attn_mask"], q)
        mask = mask.view(N, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
    if call["key_padding_mask"] is not None:
        padding = _floats(call["key_padding_mask"], q)[:, None, None]  # [N, 1, 1, T']
        mask = padding if mask is None else mask + padding
    return mask


def _floats(mask: Tensor, q: Tensor) -> Tensor:
    """A mask in q's dtype; the entries where a boolean one is True are -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
    return mask

"""`F.multi_head_attention_forward` with its calls of `F.linear` in sight of a function mode.

A Python function that dispatches to modes runs its body with the mode off, so a mode would miss the
linear layers in it.
"""

import inspect
import types
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
# Whoever gives one of these is served by torch's own code.
_SPECIAL = (
    *("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "need_weights"),
    *("use_separate_proj_weight", "static_k", "static_v"),
)


def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The same from the same arguments: torch's own code, but for the call that is usual."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    if _is_self_attention(given.arguments):
        return _self_attention(given.arguments), None
    out: tuple[Tensor, Tensor | None] = _torch_attention(*args, **kwargs)
    return out


def _is_self_attention(call: dict[str, Any]) -> bool:
    """Whether a batch attends to itself, unmasked or causally, and no weights are asked for."""
    x = call["query"]
    return (
        x is call["key"]
        and x is call["value"]
        and x.dim() == 3
        and x.size(-1) == call["embed_dim_to_check"]
        and x.size(-1) % call["num_heads"] == 0
        and bool(call["is_causal"]) == (call["attn_mask"] is not None)
        and not (call["training"] and call["dropout_p"])
        and all(call[name] is None or call[name] is False for name in _SPECIAL)
    )


def _self_attention(call: dict[str, Any]) -> Tensor:
    # Torch goes along time first, and moves each gradient three times on its way to the projection.
    # Here a sample's entries lie together, and its gradients are moved once.
    x = call["query"].transpose(0, 1)  # [N, T, E]
    projected = F.linear(x, call["in_proj_weight"], call["in_proj_bias"])  # [N, T, 3 E]
    q, k, v = (
        part.unflatten(-1, (call["num_heads"], -1)).transpose(1, 2)
        for part in projected.split(x.size(-1), dim=-1)
    )
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=call["is_causal"])
    out = heads.transpose(1, 2).flatten(2)
    return F.linear(out, call["out_proj_weight"], call["out_proj_bias"]).transpose(0, 1)


def _in_projection_packed(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None
) -> Sequence[Tensor]:
    """Torch's, with one gradient for q, k and v: theirs are written side by side, not added up."""
    if not (q is k and k is v):
        packed: list[Tensor] = F._in_projection_packed(q, k, v, w, b)  # type: ignore[attr-defined]
        return packed
    projected: Tensor = F.linear(q, w, b).unflatten(-1, (3, q.size(-1)))
    return projected.movedim(-2, 0).contiguous().unbind(0)


# Torch's code with its dispatch to modes switched off.
_torch_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **F.multi_head_attention_forward.__globals__,
        "has_torch_function": lambda tensors: False,
        "_in_projection_packed": _in_projection_packed,
    },
    argdefs=F.multi_head_attention_forward.__defaults__,
)

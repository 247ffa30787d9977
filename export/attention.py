"""An attention function for transformers that traces to one ONNX ``Attention`` node (opset 23).

K and V keep their own number of heads (grouped-query attention is native to the operator), and scale and soft cap are
attributes.
"""

from __future__ import annotations

from typing import Any, cast

import torch

NAME = "bismooth"


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention: [batch, heads, sequence, head_dim] → [batch, sequence, heads, head_dim]."""
    output = torch.onnx.ops.attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, softcap=softcap or 0.0
    )
    return output[0].transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The boolean mask of transformers [batch, 1, q, kv], in which every position may also attend to itself.

    Real tokens attend to themselves anyway. A padding token on the left would otherwise attend to nothing, and the
    softmax of an empty row is NaN in some runtimes, which then reaches real tokens as 0 · NaN.

    The padding mask [batch, kv] is applied here: transformers would look it up by computed indices.
    """
    from transformers import masking_utils

    sdpa_mask = cast(Any, masking_utils).sdpa_mask
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: torch.Tensor = sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **options)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, :].to(torch.bool)
    queries = torch.arange(q_length, device=mask.device) + options.get("q_offset", 0)
    keys = torch.arange(kv_length, device=mask.device) + options.get("kv_offset", 0)
    return mask | (queries[:, None] == keys[None, :])


def register() -> str:
    """Make both known to transformers; returns the name to set as ``attn_implementation``."""
    import transformers
    from transformers import masking_utils

    cast(Any, transformers).AttentionInterface.register(NAME, attention_forward)
    cast(Any, masking_utils).AttentionMaskInterface.register(NAME, attention_mask)
    return NAME

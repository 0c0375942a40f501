"""Causal attention over a cache, in two parts joined by their log-sum-exp.

A chunk of n queries at the end of m keys sees the first m - n keys whole and its own n causally. One fused
kernel call for each part never builds a mask and never computes what the mask would hide; transformers'
chunked prefill does both.

Shape suffixes: B batch, H query heads, K key-value heads, G = H / K, N queries, M keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .kernel import flash, join, lower_triangle

ATTENTION_NAME = "ropewalk_causal"


def causal_attention(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, scale: float | None = None) -> Tensor:
    """Attention of the last N of M positions over all M, causal. Inference on the CPU.

    Returns:
        [B, H, N, D], equal to masked softmax attention up to rounding.
    """
    B, H, N, D = q_BHND.shape
    K, past = k_BKMD.shape[1], k_BKMD.shape[2] - N
    if N == 1:  # a decode step sees every key: the heads of a group are the kernel's queries
        out, _ = flash(q_BHND.reshape(B, K, H // K, D), k_BKMD, v_BKMD, scale, causal=False)
        return out.reshape(B, H, 1, D)
    scale = D**-0.5 if scale is None else scale
    out, lse = lower_triangle(q_BHND, k_BKMD[:, :, past:], v_BKMD[:, :, past:], scale)
    if past:
        grouped = q_BHND.reshape(B, K, H // K * N, D)  # [B, K, G * N, D]: keys are read once a group, not repeated
        past_out, past_lse = flash(grouped, k_BKMD[:, :, :past], v_BKMD[:, :, :past], scale, causal=False)
        out, _ = join(out, lse, past_out.reshape(B, H, N, D), past_lse.reshape(B, H, N))
    return out


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature of transformers' attention registry; query [B, H, N, D] -> [B, N, H, D]."""
    if attention_mask is None and not torch.is_grad_enabled():
        out = causal_attention(query, key, value, scaling)
    else:
        mask = causal_lower_right(query.shape[2], key.shape[2]) if attention_mask is None else attention_mask
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout if module.training else 0.0,
            scale=scaling,
            enable_gqa=True,
        )
    return out.transpose(1, 2).contiguous(), None


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, **kwargs: Any) -> Tensor | None:
    """None where plain causal attention is meant, else the mask that transformers' SDPA path would build."""
    padding = kwargs.get("attention_mask")
    plain = kwargs.get("mask_function") is causal_mask_function and (padding is None or bool(padding.all()))
    if plain and kwargs.get("kv_offset", 0) == 0 and int(q_offset) + q_length == kv_length:
        return None
    kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, q_offset, **kwargs)
    return mask


def register() -> str:
    """Make the attention known to transformers; returns the name to give `set_attn_implementation`."""
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
    return ATTENTION_NAME

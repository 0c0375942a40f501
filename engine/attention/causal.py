"""Causal attention over a cache, in two parts joined by their log-sum-exp.

A chunk of n queries at the end of m keys sees all of the first m - n keys, and its own n keys causally. Computed in
these two parts, it needs no mask, and hidden scores are not computed. transformers' chunked prefill builds the mask
and computes them.

Shape suffixes: B batch, H query heads, K key-value heads, N queries, M keys, D head dim, Dv that of the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .kernel import AttentionScore, attend, is_fused, join

ATTENTION_NAME = "ropewalk_causal"

_PAST_CHUNK = 1 << 15  # keys of the past that are read at a time
_PLAIN_QUERIES = 1024  # queries whose scores the plain kernel holds at a time


def causal_attention(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, score: AttentionScore) -> Tensor:
    """Causal attention of the last N of M positions over all M. For inference only.

    Returns:
        [B, H, N, Dv], equal to masked softmax attention up to rounding.
    """
    N, past = q_BHND.shape[2], k_BKMD.shape[2] - q_BHND.shape[2]
    if N == 1:  # a decode step sees every key
        return attend(q_BHND, k_BKMD, v_BKMD, score)[0]
    if N > _PLAIN_QUERIES and not is_fused(q_BHND, v_BKMD, score):
        stops = [min(start + _PLAIN_QUERIES, N) for start in range(0, N, _PLAIN_QUERIES)]
        rows = torch.split(q_BHND, _PLAIN_QUERIES, dim=2)
        seen = [(k_BKMD[:, :, : past + stop], v_BKMD[:, :, : past + stop]) for stop in stops]
        return torch.cat([causal_attention(q, k, v, score) for q, (k, v) in zip(rows, seen, strict=True)], 2)
    out, lse = attend(q_BHND, k_BKMD[:, :, past:], v_BKMD[:, :, past:], score, "lower")
    for start in range(0, past, _PAST_CHUNK):  # a narrower cache is widened in small pieces, to save memory
        keys = slice(start, min(start + _PAST_CHUNK, past))
        out, lse = join(out, lse, *attend(q_BHND, k_BKMD[:, :, keys], v_BKMD[:, :, keys], score))
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
    """Same signature and result as transformers' SDPA function; query [B, H, N, D] -> [B, N, H, D]."""
    score = AttentionScore(scale=query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and not torch.is_grad_enabled() and not _torch_is_faster(query, key, value, score):
        out = causal_attention(query, key, value, score)
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


def _torch_is_faster(query: Tensor, key: Tensor, value: Tensor, score: AttentionScore) -> bool:
    """True on a GPU for what our fused kernel does not take, if torch has one that needs no repeated keys for it."""
    return query.is_cuda and query.shape[1] == key.shape[1] and not is_fused(query, value, score)


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, **kwargs: Any) -> Tensor | None:
    """None for plain causal attention, else the mask that transformers builds for SDPA."""
    padding = kwargs.get("attention_mask")
    causal = kwargs.pop("allow_is_causal_skip", True) and kwargs.get("mask_function") is causal_mask_function
    plain = causal and (padding is None or bool(padding.all()))
    if plain and kwargs.get("kv_offset", 0) == 0 and int(q_offset) + q_length == kv_length:
        return None
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, q_offset, allow_is_causal_skip=False, **kwargs)
    return mask


def register() -> str:
    """Register this attention with transformers, and return its name for `set_attn_implementation`."""
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
    return ATTENTION_NAME

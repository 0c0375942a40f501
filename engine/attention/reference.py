"""The reference for banded attention: full score matrices for every band, then one softmax. Slow and simple.

The public code of Self-Extend, ReRoPE and Dual Chunk also computes two or three full matrices. The benchmark in
`evals/speed/map_cost.py` times a faster form of that, which a test compares with this reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...scaling.band import pair_positions
from ...scaling.rope import RopeSpec, Scaler
from .kernel import AttentionScore
from .rotation import Layout


def reference_attention(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    score: AttentionScore,
    layout: Layout,
    scaler: Scaler,
    rope: RopeSpec,
    length: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of the last N of M tokens, at positions M - N .. M - 1. Queries and keys are given un-rotated.

    Args:
        rope: geometry of a model without a scaling of its own.
        length: the fixed length of a scaler that depends on the length; None gives every query its own length.
        sinks_H: the model's own attention sinks, one logit a head.

    Returns:
        [B, H, N, Dv].
    """
    N, M = q_BHND.shape[2], k_BKMD.shape[2]
    group = q_BHND.shape[1] // k_BKMD.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k_BKMD, v_BKMD))
    i, j = torch.arange(M - N, M), torch.arange(M)
    scores = torch.full((*q_BHND.shape[:3], M), -torch.inf, dtype=q_BHND.dtype)
    lengths = [length if length is not None else scaler.growing_length(int(p), rope) for p in i]
    for step in sorted(set(lengths)):
        inv_freq, factor = scaler.frequencies(rope, step)
        in_step = torch.tensor([query_length == step for query_length in lengths])[:, None]
        for band in scaler.bands(rope, step):
            rotated_q = _rotate(q_BHND, layout, pair_positions(band.query, i), inv_freq, factor)
            rotated_k = _rotate(k, layout, pair_positions(band.key, j), inv_freq, factor)
            seen = in_step & (band.start(i)[:, None] <= j) & (j < band.stop(i)[:, None])
            scores = torch.where(seen, rotated_q @ rotated_k.transpose(-1, -2), scores)
    scores = scores * score.scale * scaler.logit_factor(i, rope)[:, None].to(scores.dtype)
    if score.softcap is not None:
        capped = score.softcap * torch.tanh(scores / score.softcap)
        scores = torch.where(scores.isinf(), scores, capped)
    if sinks_H is not None:
        sinks = sinks_H[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1].to(v.dtype) @ v
    return torch.softmax(scores, -1) @ v


def _rotate(x: Tensor, layout: Layout, positions: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
    """Multiplies the pairs, as complex numbers, by m e^(i position w)."""
    if not layout.dim:
        return x
    columns = torch.arange(layout.start, layout.start + layout.dim)
    real, imaginary = (columns[0::2], columns[1::2]) if layout.interleaved else columns.chunk(2)
    pairs = torch.complex(x[..., real].double(), x[..., imaginary].double())
    angle = positions * inv_freq
    pairs = pairs * torch.polar(torch.full_like(angle, factor), angle)
    out = x.clone()
    out[..., real], out[..., imaginary] = pairs.real.to(x.dtype), pairs.imag.to(x.dtype)
    return out

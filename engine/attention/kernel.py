"""Attention over one rectangle of keys, with the log-sum-exp that joins it to other rectangles.

Two kernels compute the same function. For inference it is torch's fused kernel, on the CPU, and on a GPU for 16-bit
numbers. In all other cases it is plain tensor operations, which support gradients, float64, soft-caps and dropout.
Scores and their softmax are float32 at least in both.

Shape suffixes: B batch, H query heads, K key-value heads, G = H / K, N queries, M keys, D head dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Sees = Literal["all", "lower", "upper"]
"""The keys of a rectangle that query n sees: all keys, keys 0 .. n ("lower"), or keys from n on ("upper")."""

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_DIM = 256  # largest head dim of torch's flash kernel on a GPU, a multiple of 8

_SMALLEST_TRIANGLE = 64
_PLAIN_KEYS = 2048  # fewest keys that the plain kernel takes at a time
_PLAIN_SCORES = 2**17  # scores of a head that it holds at a time, where few queries leave room for more keys


@dataclass(frozen=True, kw_only=True)
class AttentionScore:
    """How a dot product becomes a score.

    Args:
        scale: factor on the dot product, 1 / sqrt(D) in most models.
        softcap: c in c tanh(score / c), or None.
        dropout: the probability that a weight is dropped.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


def attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, score: AttentionScore, sees: Sees | Tensor = "all"
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys that it sees.

    Args:
        sees: "lower" and "upper" need as many queries as keys. A boolean tensor [N, M] is True for the keys that a
            query sees; a query may see none.

    Returns:
        The output [B, H, N, D], and the natural log-sum-exp of the scores [B, H, N]. For a query that sees no key, both
        are finite, and their weight in `join` is 0.
    """
    k_BKMD, v_BKMD = k_BKMD.to(q_BHND.dtype), v_BKMD.to(q_BHND.dtype)  # a cache may be narrower than the arithmetic
    if is_fused(q_BHND, v_BKMD, score) and not (q_BHND.is_cuda and isinstance(sees, Tensor)):
        return _attend_fused(q_BHND, k_BKMD, v_BKMD, score.scale, sees)
    most = max(_PLAIN_KEYS, _PLAIN_SCORES // q_BHND.shape[2])
    if sees == "all" and k_BKMD.shape[2] > most:
        joined = None
        for start in range(0, k_BKMD.shape[2], most):
            keys = slice(start, start + most)
            part = _attend_plain(q_BHND, k_BKMD[:, :, keys], v_BKMD[:, :, keys], score, sees)
            joined = part if joined is None else join(*joined, *part)
        assert joined is not None
        return joined
    return _attend_plain(q_BHND, k_BKMD, v_BKMD, score, sees)


def join(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from outputs [..., N, D] and log-sum-exps [..., N].

    This is exact: out = out_1 * sigmoid(lse_1 - lse_2) + out_2 * sigmoid(lse_2 - lse_1)
    """
    weight_2 = torch.sigmoid(lse_2 - lse_1).unsqueeze(-1)
    return torch.lerp(out_1, out_2, weight_2.to(out_1.dtype)), torch.logaddexp(lse_1, lse_2)


def is_fused(q: Tensor, v: Tensor, score: AttentionScore) -> bool:
    """True if torch's fused kernel computes this attention."""
    return (
        _takes(q)
        and q.shape[-1] == v.shape[-1]
        and score.softcap is None
        and not score.dropout
        and not torch.is_grad_enabled()
    )


def _takes(q: Tensor) -> bool:
    if not q.is_cuda:
        return q.device.type == "cpu" and q.dtype in FUSED_DTYPES
    fits = q.dtype in _FLASH_DTYPES and q.shape[-1] <= _FLASH_DIM and q.shape[-1] % 8 == 0
    return fits and _has_flash(q.device)


@functools.cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's fused kernel: the output [B, H, N, D] and the float32 log-sum-exp [B, H, N]."""
    if q.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return found[0], found[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        q, k, v, 0.0, causal, attn_mask=None, scale=scale
    )


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, sees: Sees | Tensor) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    K = k.shape[1]
    if sees == "all":  # the heads of a group become queries of one head, so that keys are not repeated
        out, lse = _flash(q.reshape(B, K, H // K * N, D), k, v, scale, causal=False)
        return out.reshape(B, H, N, D), lse.reshape(B, H, N)
    if isinstance(sees, Tensor):  # the bias is finite, so that a query without keys gives no NaN
        bias = torch.zeros(sees.shape, dtype=q.dtype).masked_fill_(~sees, torch.finfo(q.dtype).min / 4)
        bias = bias.repeat(H // K, 1)[None, None].expand(B, K, -1, -1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.reshape(B, K, H // K * N, D), k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        return out.reshape(B, H, N, D), lse.reshape(B, H, N)
    if sees == "lower":
        return _lower_triangle(q, k, v, scale)
    out, lse = _lower_triangle(q.flip(2), k.flip(2), v.flip(2), scale)  # reversed, an upper triangle is a lower one
    return out.flip(2), lse.flip(2)


def _lower_triangle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of N queries over N keys by the fused kernel: output [B, H, N, D], log-sum-exp [B, H, N].

    The CPU's kernel works in blocks of 512 keys and computes most of the hidden scores too. So a triangle is split into
    two triangles of half the size, which form a batch, and one square. The GPU's leaves hidden blocks out, and reads
    the keys of a group once.
    """
    if q.is_cuda:
        return _flash(q, k, v, scale, causal=True)
    B, H, N, _ = q.shape
    if N % 2 or N <= _SMALLEST_TRIANGLE:
        k, v = (t.repeat_interleave(H // k.shape[1], dim=1) for t in (k, v))
        return _flash(q, k, v, scale, causal=True)
    q_half, k_half, v_half = (t.reshape(B, t.shape[1], 2, N // 2, -1).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out, lse = _lower_triangle(q_half, k_half, v_half, scale)
    out = out.reshape(B, 2, H, N // 2, -1).transpose(1, 2).flatten(2, 3)
    lse = lse.reshape(B, 2, H, N // 2).transpose(1, 2).flatten(2, 3)
    rows, keys = slice(N // 2, None), slice(N // 2)
    part = _attend_fused(q[:, :, rows], k[:, :, keys], v[:, :, keys], scale, "all")
    out[:, :, rows], lse[:, :, rows] = join(out[:, :, rows], lse[:, :, rows], *part)
    return out, lse


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, score: AttentionScore, sees: Sees | Tensor) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    K = k.shape[1]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.reshape(B, K, H // K, N, D)
    scores = grouped.to(exact) * score.scale @ k.to(exact).unsqueeze(2).transpose(-1, -2)
    if score.softcap is not None:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    if sees != "all":
        seen = sees.to(q.device) if isinstance(sees, Tensor) else _triangle(N, sees, q.device)
        scores = scores.masked_fill(~seen, torch.finfo(exact).min / 4)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    if score.dropout:
        weights = torch.nn.functional.dropout(weights, score.dropout)
    out = weights.to(v.dtype) @ v.unsqueeze(2)
    return out.reshape(B, H, N, -1), lse.reshape(B, H, N)


def _triangle(size: int, sees: Literal["lower", "upper"], device: torch.device) -> Tensor:
    square = torch.ones(size, size, dtype=torch.bool, device=device)
    return square.tril() if sees == "lower" else square.triu()

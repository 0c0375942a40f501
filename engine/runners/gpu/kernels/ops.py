"""The operations of a decode step by Triton kernels."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from ....attention.rotation import Layout
from ..ops import Activation, CacheRows, StepBands, TokenTree
from . import attention, heads, layers

_NUMBERS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}

KernelError = TritonError
"""What Triton raises where a kernel does not compile, or the GPU has too little memory for it."""

_PROGRAMS_PER_PROCESSOR = 2  # of `attend`, that run at the same time
_FEWEST_SHARES = 16  # of a token's keys, so that one long row of many is not left to a few programs


class TritonOps:
    """`Ops` in Triton: on CUDA, and in Triton's interpreter on the CPU. Norms and sums are float32.

    The factors of matrix products have the dtype of queries, if keys have it, too, or int8; else float32.
    """

    def add_norm(
        self,
        x_NE: Tensor,
        delta_NE: Tensor | None,
        after_E: Tensor | None,
        before_E: Tensor | None,
        epsilon: float,
        dtype: torch.dtype,
    ) -> Tensor:
        N, E = x_NE.shape
        assert x_NE.is_contiguous() and x_NE.dtype == torch.float32
        out = torch.empty_like(x_NE, dtype=dtype)
        delta = None if delta_NE is None else delta_NE.contiguous()
        block = triton.next_power_of_2(E)
        warps = min(max(block // 512, 1), 16)
        layers.add_norm[(N,)](x_NE, delta, after_E, before_E, out, epsilon, E, block, num_warps=warps)
        return out

    def heads(
        self,
        qkv: Tensor,
        H: int,
        K: int,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        whole: bool,
        epsilon: float,
        key_angles: Tensor,
        layout: Layout | None,
        rows: CacheRows,
    ) -> Tensor:
        N, D = len(qkv), qkv.shape[1] // (H + 2 * K)
        query: Tensor = qkv[:, : H * D].unflatten(1, (H, D))
        first = H if query_norm is None else 0
        if query_norm is not None:
            query = torch.empty_like(query, memory_format=torch.contiguous_format)
        heads.heads[(N, H + 2 * K - first)](
            qkv,
            query_norm,
            key_norm,
            key_angles.contiguous(),
            rows.addresses.contiguous(),
            rows.slots.contiguous(),
            query,
            qkv.stride(0),
            epsilon,
            first,
            H,
            K,
            D,
            whole,
            *_rotation(layout),
            _NUMBERS[rows.dtype],
            *(triton.next_power_of_2(size) for size in (D, H * D, K * D)),
            num_warps=4 if whole else 1,
        )
        return query

    def attention(
        self,
        q_NHD: Tensor,
        rows: CacheRows,
        bands: StepBands,
        layout: Layout | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> Tensor:
        N, H, D = q_NHD.shape
        K = rows.layers[0].shape.heads
        products = q_NHD.dtype if rows.dtype in (q_NHD.dtype, torch.int8) else torch.float32
        if q_NHD.device.type == "cpu":  # the interpreter multiplies the bits of bfloat16 as integers
            products = torch.float32
        block = 64 if D <= 128 and products != torch.float32 else 32
        # a CUDA graph keeps the number of shares, whatever the lengths of later steps are; empty ones cost little
        shares = max(triton.cdiv(_PROGRAMS_PER_PROCESSOR * _processors(q_NHD.device), N * K), _FEWEST_SHARES)
        rotation = _rotation(layout)
        device, d_block = q_NHD.device, max(16, triton.next_power_of_2(D))
        mixed = torch.empty(N, H, shares, D, dtype=torch.float32, device=device)
        peaks, weights = torch.empty(2, N, H, shares, dtype=torch.float32, device=device)
        attention.attend[(shares, K, N)](
            q_NHD,
            rows.addresses.contiguous(),
            bands.queries.contiguous(),
            bands.edges.contiguous(),
            bands.scales.contiguous(),
            bands.shifts,
            None if tree is None else tree.ancestors.contiguous(),
            mixed,
            peaks,
            weights,
            q_NHD.stride(0),
            0 if tree is None else tree.start,
            0 if tree is None else tree.ancestors.shape[1],
            softcap,
            H,
            K,
            D,
            *rotation,
            len(bands.shifts),
            _NUMBERS[rows.dtype],
            _NUMBERS[products],
            max(16, triton.next_power_of_2(H // K)),
            d_block,
            max(16, triton.next_power_of_2(rotation[1] // 2)),
            block,
            3,
            block // 2,
            2,
            num_warps=4,
        )
        out = torch.empty(N, H * D, dtype=q_NHD.dtype, device=device)
        s_block, d_block = triton.next_power_of_2(shares), min(d_block, 64)
        attention.join[(N * H, triton.cdiv(D, d_block))](
            mixed, peaks, weights, out, shares, D, s_block, d_block, min(s_block, 64)
        )
        return out

    def int8_linear(self, x_NI: Tensor, weight_RI: Tensor, scale_R: Tensor) -> Tensor:
        N, rows = len(x_NI), len(weight_RI)
        out = x_NI.new_empty(N, rows)
        products = torch.float32 if x_NI.device.type == "cpu" else x_NI.dtype  # as in `attention`
        r_block = 16 if rows < 32 * _processors(x_NI.device) else 32
        layers.int8_linear[(triton.cdiv(rows, r_block),)](
            x_NI.contiguous(),
            weight_RI,
            scale_R,
            out,
            N,
            rows,
            weight_RI.shape[1],
            _NUMBERS[products],
            max(16, triton.next_power_of_2(N)),
            r_block,
            256 if products != torch.float32 else 128,
            4,
            num_warps=4,
        )
        return out

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        N, inner = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(N, inner)
        block = 512
        layers.gate[(N, triton.cdiv(inner, block))](
            gate_up.contiguous(), out, inner, activation == "silu", block, num_warps=2
        )
        return out


def _rotation(layout: Layout | None) -> tuple[int, int, bool]:
    return (0, 0, False) if layout is None else (layout.start, layout.dim, layout.interleaved)


@cache
def _processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; a CPU interprets the kernels as one of a few would run them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8

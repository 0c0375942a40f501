"""The runner of the engine for GPUs: single tokens by Triton kernels in a CUDA graph, chunks of a prompt in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....errors import UnsupportedModel
from ....scaling.rope import Scaler
from ...attention.kernel import AttentionScore
from ...attention.rows import KeyRun
from ...hf_model import dtype_name
from ...kv_cache import KVCache
from ...patches.float32 import exact_products, float32_arithmetic
from ...patches.probe import logits, probe_ids
from ...rotary_site import RotarySite
from ..chunk_attention import Attend, ChunkAttention
from ..decoder_runner import DecoderRunner, Rows, Tree
from ..family import decoder
from ..runner import RopeState
from .angles import StepAngles
from .decoder import DeviceDecoder
from .ops import Ops
from .step import DecodeStep, Replay

_CAPTURES = Callable[[Replay], Replay]

_MAX_DIFFERENCE = 1e-4
"""Of the logits of a chunk in float32: Euclidean norm, relative."""

_MAX_DIFFERENCE_OF_STEP = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Of the logits of a step, by the dtype of the weights. Products of bfloat16 in small random models give 0.04."""

_OF_INT8_CACHE = 0.05

_MOST_STEPS = 4
"""Scalers whose graphs are kept. Requests that run at the same time may have one each, and take turns every token."""


class GpuRunner(DecoderRunner):
    """Runs a decoder of one of the families in `family.py` on one GPU.

    Args:
        ops: the operations of a step.
        weights: "own", or "int8": 255 steps, with one step size for each row of a linear layer.
        cache: the dtype of keys and values; "auto" is the model's, and bfloat16 with int8 weights.
        captures: makes a step a graph (`step.capture`); None runs its operations one by one.

    Raises:
        UnsupportedModel: no family describes the model, its weights are on several devices, or the engine does not
            reproduce its logits.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        sites: list[RotarySite],
        ops: Ops,
        weights: Literal["own", "int8"] = "own",
        cache: str = "auto",
        captures: _CAPTURES | None = None,
    ) -> None:
        places = sorted({str(weight.device) for weight in hf.parameters()})
        if len(places) > 1:
            raise UnsupportedModel(f"the engine for GPUs needs all weights on one device, not on {', '.join(places)}")
        described = decoder(hf)
        if cache == "auto":
            cache = "bfloat16" if weights == "int8" else dtype_name(hf.dtype)
        super().__init__(hf, sites, described, getattr(torch, cache))
        self._weights = dtype_name(hf.dtype)
        self._device, self._ops, self._captures = hf.device, ops, captures
        self._layers = DeviceDecoder(described, ops, hf.parameters())
        self._steps: dict[RopeState, DecodeStep] = {}
        self.use(Scaler(), None)
        self._verify_chunk()
        if weights == "int8":
            self._layers.round_to_int8()
            self._weights = weights
        self._verify_step()

    @property
    def weights(self) -> str:
        """The dtype of the weights."""
        return self._weights

    @property
    def precision(self) -> str:
        """The dtypes of weights and cache, as a label for results."""
        cache = dtype_name(self._dtype)
        return self.weights if cache == self.weights else f"{self.weights}, {cache} cache"

    @property
    def how(self) -> str:
        """A short description of the runner."""
        graphs = " in CUDA graphs" if self._captures else ""
        return (
            f"steps by {type(self._ops).__name__}{graphs}, chunks in torch, on {self._device}; weights in "
            f"{self.weights}, cache in {dtype_name(self._dtype)}"
        )

    def use(self, scaler: Scaler, length: int | None) -> None:
        before = self._rotations
        super().use(scaler, length)
        if self._rotations is before:
            return
        step = self._steps.pop(self.rope_state, None)
        if step is None:
            exact = self.hf.dtype == torch.float64
            groups = [
                StepAngles(rotation, self._scale_of(place), self._device, exact=exact)
                for place, rotation in enumerate(self._rotations)
            ]
            step = DecodeStep(self._decoder, self._layers, self._ops, groups, self._rotation_of, self._captures)
        self._step = self._steps[self.rope_state] = step
        if len(self._steps) > _MOST_STEPS:
            del self._steps[next(iter(self._steps))]

    def _scale_of(self, rotation: int) -> float:
        """The factor on the scores of the layers with this rotation."""
        return self._decoder.layers[self._rotation_of.index(rotation)].scale

    def _verify_chunk(self) -> None:
        """Refuse a model whose logits after a chunk are not those of its own modules, both in float32 arithmetic."""
        ids, own = probe_ids(self.hf)[0].tolist(), self._dtype
        self._dtype = torch.promote_types(self.hf.dtype, torch.float32)
        with torch.inference_mode(), float32_arithmetic(self.hf):
            chunk = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids), self._dtype)
            self._check(chunk, logits(self.hf)[0], _MAX_DIFFERENCE)
        self._dtype = own

    def _verify_step(self) -> None:
        """Refuse a model whose logits in its own dtypes are not those in float32 arithmetic."""
        ids, exact = probe_ids(self.hf)[0].tolist(), torch.promote_types(self.hf.dtype, torch.float32)
        limit = max(_MAX_DIFFERENCE_OF_STEP[self.hf.dtype], _OF_INT8_CACHE if self._dtype == torch.int8 else 0)
        with torch.inference_mode(), exact_products():
            expected = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids), exact)
            for run in (self._prefill_chunk, self._probe_step):
                self._check(run(ids, self.new_cache(len(ids)), len(ids)), expected, limit)

    def _probe_step(self, ids: Sequence[int], cache: KVCache, logits_to_keep: int) -> Tensor:
        return self._decode_step([(ids, cache)], logits_to_keep)

    def _decode_step(self, rows: Rows, logits_to_keep: int, tree: Tree | None = None) -> Tensor:
        for ids, _ in rows:
            self.check(ids)
        if tree is None:
            positions = [cache.length + k for ids, cache in rows for k in range(len(ids))]
        else:
            positions = [tree[0] + len(path) - 1 for path in tree[1]]
        with self._on_its_device():
            logits = self._step.run(rows, positions, tree)
        for ids, cache in rows:
            cache.advance(len(ids))
        return logits[-logits_to_keep:]

    def _prefill_chunk(
        self, ids: Sequence[int], cache: KVCache, logits_to_keep: int, products: torch.dtype | None = None
    ) -> Tensor:
        start, count = cache.length, len(ids)
        run = KeyRun(None, 0, count, 0, start + count, 0)
        products = products or self.hf.dtype
        like = torch.empty(0, dtype=torch.promote_types(products, torch.float32), device=self._device)
        chunks = [ChunkAttention(rotation, run, like) for rotation in self._rotations]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, score: AttentionScore) -> Tensor:
            return chunks[self._rotation_of[index]].attend(q, k, v, cache.layers[index], score)

        self.check(ids)
        return self._run_chunk(ids, attend, logits_to_keep, products)

    def _run_chunk(
        self, ids: Sequence[int], attend: Attend, logits_to_keep: int, products: torch.dtype | None = None
    ) -> Tensor:
        d, count = self._decoder, len(ids)
        H, K, D = d.heads, d.key_heads, d.head_dim

        def mix(index: int, qkv: Tensor) -> Tensor:
            layer = d.layers[index]
            q, k, v = torch.split(qkv, [H * D, K * D, K * D], 1)
            if not d.norms_whole:
                q, k = q.view(count, H, D), k.view(count, K, D)
            q, k = (_rms(x, norm, d.epsilon) for x, norm in zip((q, k), layer.norms[4:], strict=True))
            q, k, v = (x.reshape(count, -1, D).transpose(0, 1)[None] for x in (q, k, v))
            mixed = attend(index, q, k, v, AttentionScore(scale=layer.scale, softcap=layer.softcap))
            return mixed[0].transpose(0, 1).reshape(count, H * D).to(qkv.dtype)

        batch = torch.tensor(ids, device=self._device)
        with self._on_its_device():
            x, delta = self._layers.run(batch, mix, products or self.hf.dtype)
            return self._layers.logits(x[-logits_to_keep:], delta[-logits_to_keep:])

    def _on_its_device(self) -> AbstractContextManager[object]:
        """Makes the device of the weights the current one, on which Triton starts its kernels."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def _rms(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """The RMS norm, computed in at least float32, in the dtype of `x`; `x` itself without weights."""
    if weight is None:
        return x
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.rms_norm(exact, weight.shape, weight.to(exact.dtype), epsilon).to(x.dtype)

"""vLLM's attention on the CPU, with a named scaler. Imported by vLLM only.

For models without a named scaler the classes are those of vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from ...errors import UnsupportedModel
from ..attention.kernel import AttentionScore
from ..attention.paged import PagedBatch
from ..attention.paged_rope import PagedRope
from .vllm_objects import batch_of, check_layer, is_named_config, layout_of, named_scaler


class RopewalkCPUBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend; for a model that names a scaler, with the classes of this file."""

    @staticmethod
    def get_impl_cls() -> type:
        """The class that computes attention."""
        named = is_named_config(get_current_vllm_config())
        return BandedAttention if named else CPUAttentionBackend.get_impl_cls()

    @staticmethod
    def get_builder_cls() -> type:
        """The class that describes a batch."""
        return BatchBuilder


class BatchBuilder(CPUAttentionBackend.get_builder_cls()):  # type: ignore[misc]
    """Makes the description of a batch that all layers share."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self._rope: PagedRope | None = None
        if not is_named_config(vllm_config):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        named = named_scaler(vllm_config)
        self._rope, self._page = PagedRope(named, layout_of(vllm_config, named)), kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The batch of a forward pass."""
        if self._rope is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return batch_of(self._rope, common_attn_metadata, self._page)


class BandedAttention(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer under a named scaler. `forward` also writes the keys and values of the batch."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        check_layer(
            sliding_window=sliding_window,
            sinks=sinks is not None,
            alibi=alibi_slopes is not None,
            attn_type=attn_type,
            cache_dtype=kv_cache_dtype,
            kv_shared=kv_sharing_target_layer_name is not None,
            others=[name for name, value in others.items() if value is not None],
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self._score = AttentionScore(scale=self.scale, softcap=logits_soft_cap or None)

    def do_kv_cache_update(self, *_: Any) -> None:
        """Nothing: `forward` writes the keys, because their angles belong to the batch."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedBatch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention into `output` [T, H, D]; the cache is [blocks, K, S, 2 D]."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedModel("a named scaler does not work with quantized outputs of attention")
        if attn_metadata is None:  # vLLM measures memory
            return output
        batch = attn_metadata
        blocks, heads, page, _ = kv_cache.shape
        pages = kv_cache.view(blocks, heads, 2, page, self.head_size)
        batch.write(key[: batch.tokens], value[: batch.tokens], pages)
        batch.attend(query[: batch.tokens], pages, self._score, output[: batch.tokens])
        return output

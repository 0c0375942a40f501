"""vLLM's attention on the CPU, with a named scaler. Imported by vLLM only.

For models without a named scaler the classes are those of vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from .vllm_objects import check_layer, is_named_config, layout_of, named_scaler, texts_of


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
        self._rope_of: Callable[[int | None], PagedRope] | None = None
        if not is_named_config(vllm_config):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        named, self._page = named_scaler(vllm_config), kv_cache_spec.block_size
        self._rope_of = functools.cache(functools.partial(PagedRope, named, layout_of(vllm_config, named)))

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The batch of a forward pass: a function from the window of a layer to the `PagedBatch` of such layers."""
        if self._rope_of is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        rope_of, texts, page = self._rope_of, texts_of(common_attn_metadata), self._page
        return functools.cache(lambda window: PagedBatch(rope_of(window), *texts, page))


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
            sinks=sinks is not None,
            alibi=alibi_slopes is not None,
            attn_type=attn_type,
            cache_dtype=kv_cache_dtype,
            kv_shared=kv_sharing_target_layer_name is not None,
            others=[name for name, value in others.items() if value is not None],
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self._window = sliding_window
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
        attn_metadata: Callable[[int | None], PagedBatch] | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention into `output` [T, H, D]; the cache is [blocks, K, S, 2 D]."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedModel("a named scaler does not work with quantized outputs of attention")
        if attn_metadata is None:  # vLLM measures memory
            return output
        batch = attn_metadata(self._window)
        blocks, heads, page, _ = kv_cache.shape
        pages = kv_cache.view(blocks, heads, 2, page, self.head_size)
        batch.write(key[: batch.tokens], value[: batch.tokens], pages)
        batch.attend(query[: batch.tokens], pages, self._score, output[: batch.tokens])
        return output

"""The rotary embedding of a model under a named scaler: it leaves queries and keys as they are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModel
from ...scaling.named_scaler import is_named
from .vllm_objects import check_config, check_version, layout_of, named_scaler

_MARK = "ropewalk"


class UnrotatedEmbedding(nn.Module):
    """Takes the place of vLLM's rotary embedding. Attention rotates queries and keys."""

    def forward(self, _positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The queries and keys, unchanged."""
        return query, key


def install() -> bool:
    """Replace vLLM's function that makes rotary embeddings, once in a process.

    Returns:
        False if it was replaced before.
    """
    from vllm.model_executor.layers import rotary_embedding

    if getattr(rotary_embedding.get_rope, _MARK, False):
        return False
    rotary_embedding.get_rope = _replacement(rotary_embedding.get_rope)
    return True


def _replacement(get_rope: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_rope)
    def replaced(
        head_size: int,
        max_position: int,
        is_neox_style: bool = True,
        rope_parameters: dict[str, Any] | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        if not is_named(rope_parameters):
            return get_rope(head_size, max_position, is_neox_style, rope_parameters, *args, **options)
        return unrotated(head_size, is_neox_style)

    setattr(replaced, _MARK, True)
    return replaced


def unrotated(head_size: int, is_neox_style: bool) -> UnrotatedEmbedding:
    """The rotary embedding of the model that vLLM is building.

    Raises:
        ConfigError, UnsupportedModel: vLLM, its options or the model are not among those that were verified.
    """
    import vllm
    from vllm.config import get_current_vllm_config

    check_version(vllm.__version__)
    config = get_current_vllm_config()
    check_config(config)
    named = named_scaler(config)
    layout = layout_of(config, named)
    if layout.dim > head_size or layout.interleaved == is_neox_style:
        raise UnsupportedModel(f"vLLM rotates the heads of this model in another way than {layout}")
    _log(named.scaler.brief, config.model_config.max_model_len)
    return UnrotatedEmbedding()


@functools.cache
def _log(scaler: str, length: int) -> None:
    """Say once what the plug-in does."""
    logging.getLogger("vllm.ropewalk").info("ropewalk: attention under %s, up to %d tokens", scaler, length)

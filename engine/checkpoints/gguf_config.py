"""The transformers config of a GGUF file: what transformers reads, and the rotary embedding, attention and end tokens,
which it does not read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedModel

if TYPE_CHECKING:
    from .gguf_file import GgufFile

__all__ = ["rope_parameters", "set_config", "write_config"]

_ATTENTION = (
    ("attention.sliding_window", "sliding_window", 0),
    ("attn_logit_softcapping", "attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", "final_logit_softcapping", 0.0),
)
"""Fields that change the attention: the name in a GGUF file, the name in a config, and the value for 'not used'."""

_LARGEST_GEMMA = {("gemma2", 46), ("gemma3", 62)}
"""Architecture and layers of the models of 27B. No field has the scale of attention, which llama.cpp derives so."""


def write_config(file: GgufFile, out: Path) -> None:
    """Write config.json and generation_config.json of a GGUF file into the folder `out`.

    Raises:
        UnsupportedModel: transformers cannot read the file, or a config cannot hold its rotary embedding or attention.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .gguf_file import read_by_transformers

    with read_by_transformers(file) as source:
        config = AutoConfig.from_pretrained(source["pretrained_model_name_or_path"], gguf_file=source["gguf_file"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    set_config(file, model)
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)


def set_config(file: GgufFile, model: Any) -> None:
    """Write what transformers does not read from a GGUF file into the configs of its model.

    Raises:
        UnsupportedModel: the config cannot hold the rotary embedding or the attention of the file.
    """
    from .gguf_tokenizer import end_ids

    _set_rope(file, model.config, rope_parameters(file) or {})
    _set_attention(file, model.config)
    for name in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    _set_end_ids(model, end_ids(file))


def _set_end_ids(model: Any, ids: list[int]) -> None:
    """Set the end tokens of a model to `ids`."""
    eos = ids if len(ids) > 1 else next(iter(ids), None)
    for config in (model.config.get_text_config(), model.generation_config):
        config.eos_token_id = eos


def rope_parameters(file: GgufFile) -> dict[str, Any] | None:
    """The `rope_parameters` for the rotary scaling of the file, which transformers does not read; None for none."""
    rope = file.rope
    if not rope.scaling and rope.divisors is None:
        return None
    from ...scaling import hf_write

    configured = file.configured
    if not configured.scaler.parts:
        return None
    parameters = hf_write.write(configured.rope, configured.scaler)
    if parameters["rope_type"] == "linear" and "original_context_length" in rope.scaling:
        parameters["original_max_position_embeddings"] = configured.rope.trained_length
    return parameters


def _set_rope(file: GgufFile, config: Any, scaling: dict[str, Any]) -> None:
    """Write the rotary embedding of the file into the config. For some families transformers does not read the base or
    the rotary dimension, and takes the default of another model.

    Args:
        scaling: the result of `rope_parameters`.

    Raises:
        UnsupportedModel: the config cannot hold the rotary embedding.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        if scaling:
            raise UnsupportedModel(
                f"{file.path}: its {scaling['rope_type']} scaling cannot be read, because the layers of this model "
                "have different rotary frequencies; load the original checkpoint"
            )
        return
    from ...scaling import hf

    rope, head_dim = file.rope, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope.dim != head_dim or "partial_rotary_factor" in parameters:
        parameters = {**parameters, "partial_rotary_factor": rope.dim / head_dim}
    config.rope_parameters = {**parameters, "rope_theta": rope.base, **scaling}
    read = hf.read(config)[None].rope
    if (read.dim, read.base) != (rope.dim, rope.base):
        raise UnsupportedModel(
            f"{file.path}: its rotary dimension is {rope.dim} of {head_dim} and its base {rope.base:g}, but the config "
            f"that transformers builds has {read.dim} and {read.base:g}; load the original checkpoint"
        )


def _set_attention(file: GgufFile, config: Any) -> None:
    """Write the other fields that change the attention into the config.

    Raises:
        UnsupportedModel: the config cannot hold a field.
    """
    for key, setting, unused in _ATTENTION:
        value = file.field(f"{{arch}}.{key}")
        if value in (None, unused) or (setting == "sliding_window" and value >= file.required("{arch}.context_length")):
            continue
        if not hasattr(config, setting):
            raise UnsupportedModel(
                f"{file.path}: its {file.arch}.{key} is {value}, and the {type(config).__name__} of transformers has "
                "no such setting; load the original checkpoint"
            )
        setattr(config, setting, value)
    if hasattr(config, "query_pre_attn_scalar"):  # transformers would take 256
        is_largest = (file.arch, config.num_hidden_layers) in _LARGEST_GEMMA
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        )

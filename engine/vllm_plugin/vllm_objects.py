"""What the plug-in reads of vLLM's objects, and the versions, models and options that it refuses as not verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import UnsupportedModel
from ...scaling.hf import is_local
from ...scaling.named_scaler import NamedScaler, is_named
from ..attention.rotation import Layout

VERIFIED = ("0.32.",)
"""The beginnings of the vLLM versions with which the plug-in was verified (`make interop`)."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What differs between the architectures that were verified. All of them rotate immediately before attention.

    Attributes:
        interleaved: rotary pairs are neighbours in a head.
        windows: some layers have a sliding window.
    """

    interleaved: bool = False
    windows: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(),
    "Qwen2ForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(),
    "GraniteForCausalLM": Architecture(),
    "Gemma2ForCausalLM": Architecture(windows=True),
    "Gemma3ForCausalLM": Architecture(windows=True),
}
"""The architectures that were verified (`make interop`)."""


def check_version(version: str) -> None:
    """Raise UnsupportedModel if the plug-in was not verified with this version of vLLM."""
    if not version.removeprefix("v").startswith(VERIFIED):
        raise UnsupportedModel(
            f"ropewalk's plug-in was verified with vLLM {', '.join(f'{one}x' for one in VERIFIED)}, and this is "
            f"{version}; install one of those, or export static frequencies, which need no plug-in"
        )


def is_named_config(vllm_config: Any) -> bool:
    """True if the model of vLLM's configuration names a scaler."""
    model = getattr(vllm_config, "model_config", None)
    return model is not None and is_named(getattr(model.hf_text_config, "rope_parameters", None))


def named_scaler(vllm_config: Any) -> NamedScaler:
    """The scaler that the model of vLLM's configuration names.

    Raises:
        ConfigError, UnsupportedModel: as for `NamedScaler.read`.
    """
    return NamedScaler.read(vllm_config.model_config.hf_config.to_dict())


def layout_of(vllm_config: Any, named: NamedScaler) -> Layout:
    """The places of the rotary pairs in the heads of the model."""
    architecture = architecture_of(vllm_config.model_config.hf_config)
    return Layout(start=0, dim=named.configured.rope.dim, interleaved=architecture.interleaved)


def architecture_of(config: Any) -> Architecture:
    """What is known about the model of a transformers config.

    Raises:
        UnsupportedModel: its architecture, or the windows of its layers, are not among those that were verified.
    """
    names, text = config.architectures or ["a model without a name"], config.get_text_config()
    architecture = ARCHITECTURES.get(names[0])
    layer_types = getattr(text, "layer_types", None)
    windows = [is_local(kind) for kind in layer_types or ()] or [getattr(text, "sliding_window", None) is not None]
    if architecture is None or len(names) > 1:
        verified, found = ", ".join(ARCHITECTURES), ", ".join(names)
    elif any(windows) and not architecture.windows:
        verified, found = f"{names[0]} without sliding windows", "them"
    elif all(windows):
        verified, found = "layers that see the whole text", "a window in every layer"
    else:
        return architecture
    raise UnsupportedModel(
        f"ropewalk's plug-in for vLLM was verified with {verified}, not with {found}; take static "
        "frequencies such as yarn:4, which vLLM reads itself, or ropewalk.patch"
    )


def check_config(vllm_config: Any) -> None:
    """Refuse models and options that were not verified.

    Args:
        vllm_config: vLLM's configuration of an engine.

    Raises:
        UnsupportedModel: names the model or the option.
    """
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    architecture_of(model.hf_config)
    device = getattr(getattr(vllm_config, "device_config", None), "device_type", "cpu")
    refused = {
        f"device {device}; it runs on the CPU": device != "cpu",
        "latent attention (MLA)": getattr(model, "use_mla", False),
        "the option disable_sliding_window": getattr(model, "disable_sliding_window", False),
        "decode context parallel": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallel": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        f"speculative decoding with {_draft(vllm_config)}": _draft(vllm_config) not in (None, "ngram"),
        f"a cache of {cache.cache_dtype}": "8" in str(cache.cache_dtype) or "4" in str(cache.cache_dtype),
    }
    refuse([reason for reason, applies in refused.items() if applies])


def check_layer(
    *,
    sinks: bool = False,
    alibi: bool = False,
    attn_type: str = "decoder",
    cache_dtype: str = "auto",
    kv_shared: bool = False,
    others: Sequence[str] = (),
) -> None:
    """Refuse attention layers that the plug-in does not compute.

    Raises:
        UnsupportedModel: names the property of the layer.
    """
    refused = {
        "attention sinks of the model": sinks,
        "a linear bias on distances (ALiBi)": alibi,
        f"attention of type {attn_type}": attn_type != "decoder",
        f"a cache of {cache_dtype}": cache_dtype not in ("auto", "bfloat16", "float16", "float32"),
        "layers that share a cache": kv_shared,
        f"the options {', '.join(others)} of attention": bool(others),
    }
    refuse([reason for reason, applies in refused.items() if applies])


def refuse(reasons: list[str]) -> None:
    """Raise UnsupportedModel if there are reasons."""
    if reasons:
        raise UnsupportedModel(
            f"ropewalk's plug-in for vLLM does not serve a named scaler with {'; '.join(reasons)}. Export static "
            "frequencies (such as yarn:4), which vLLM reads itself, or leave the option out"
        )


def _draft(vllm_config: Any) -> str | None:
    speculative = vllm_config.speculative_config
    return None if speculative is None else str(speculative.method)


def texts_of(metadata: Any) -> tuple[list[int], list[int], Tensor]:
    """The texts of a batch that vLLM's `CommonAttentionMetadata` describes: the first three arguments of `PagedBatch`
    after the rope.

    Raises:
        UnsupportedModel: attention of the batch is not causal.
    """
    if metadata.causal is not True:
        raise UnsupportedModel("a named scaler needs causal attention, and this batch is not causal")
    count = metadata.num_reqs
    starts, lengths = metadata.query_start_loc_cpu[: count + 1].tolist(), metadata.seq_lens[:count].tolist()
    return starts, lengths, metadata.block_table_tensor[:count]

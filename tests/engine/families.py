"""Small random models of every RoPE architecture in transformers, to hold the engine against.

    model = FAMILIES["gemma3_text"]()
    stretched = FAMILIES["gemma3_text"](rope_parameters=YARN)

One row a family: what its config needs beyond `SMALL`. The same name always gives the same weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

# Layer types whose attention reaches every token, in models that have RoPE parameters for each layer type.
WIDE = ("full_attention", "indexed_attention", "hybrid", "compress")

# What belongs to the architecture, whichever RoPE it is given.
KEPT = ("partial_rotary_factor", "llama_4_scaling_beta")

# Each config takes the fields that it declares.
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    # latent attention: 8 + 8 query and key dims, of which 8 turn, against 12 value dims
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 32,
    # state spaces and linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
}

HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
LAYER_INPUTS = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16}
HALF_TURNING = {**DEFAULT, "partial_rotary_factor": 0.5}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
PROPORTIONAL_WHEN_WIDE = {"rope_parameters": {"sliding_attention": DEFAULT, "full_attention": PROPORTIONAL}}
ALL_HEADS = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads

# model type: what its config needs beyond SMALL
TABLE: dict[str, dict[str, Any]] = {
    # one RoPE for all layers
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_shared_experts": 1},
    "bitnet": {},
    "cohere": {"logit_scale": 1.0},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96},
    },
    "diffllama": {},
    "doge": {},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "falcon": {"multi_query": True},
    "flex_olmo": {},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "granite": {"attention_multiplier": 0.2},
    "granitemoe": {"attention_multiplier": 0.2},
    "granitemoeshared": {"attention_multiplier": 0.2, "shared_intermediate_size": 32},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": DENSE_THEN_SPARSE,
    "hyperclovax": {},
    "jais2": {},
    "jetmoe": {"kv_channels": 16},
    "llama": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {
        "rotary_dim": 8,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "index_block_size": 16,
    },
    "ministral3": {"rope_parameters": {**DEFAULT, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "moshi": {"ffn_dim": 96},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    # layers that see a window, share RoPE with the others or have none
    "afmoe": {**HALF_SLIDING, "num_shared_experts": 1},
    "cohere2": {**HALF_SLIDING, "logit_scale": 1.0},
    "cohere2_moe": {**HALF_SLIDING, "logit_scale": 1.0},
    "cwm": HALF_SLIDING,
    "exaone4": HALF_SLIDING,
    "exaone_moe": {**HALF_SLIDING, **DENSE_THEN_SPARSE},
    "flint": HALF_SLIDING,
    "gemma2": {**HALF_SLIDING, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    "gpt_oss": HALF_SLIDING,
    "granite_swa": {**HALF_SLIDING, "layer_rope_theta": [1e4, 1e4], "attention_multiplier": 0.2},
    "granitemoe_swa": {**HALF_SLIDING, "layer_rope_theta": [1e4, 1e4], "attention_multiplier": 0.2},
    "kolibri1": HALF_SLIDING,
    "llama4_text": {"attention_chunk_size": 16, "no_rope_layers": [1, 0], "intermediate_size_mlp": 96},
    "ministral": HALF_SLIDING,
    "smollm3": {"no_rope_layers": [1, 0]},
    "vaultgemma": {**HALF_SLIDING, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    # RoPE parameters for each layer type
    "beam": {**HALF_SLIDING, **DENSE_THEN_SPARSE},
    "cohere_compass_text": {**HALF_SLIDING, "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": None}},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 32,
        "intermediate_size": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 16,
        "index_topk": 8,
        "partial_rotary_factor": 0.5,
    },
    "gemma3_text": {**HALF_SLIDING, "query_pre_attn_scalar": 24},
    "gemma3n_text": {**HALF_SLIDING, **LAYER_INPUTS, "num_kv_shared_layers": 0},
    "gemma4_text": {**HALF_SLIDING, **LAYER_INPUTS, **PROPORTIONAL_WHEN_WIDE, "global_head_dim": 32},
    "gemma4_unified_text": {**HALF_SLIDING, **PROPORTIONAL_WHEN_WIDE, "global_head_dim": 32},
    "laguna": {**HALF_SLIDING, **DENSE_THEN_SPARSE},
    "mellum": HALF_SLIDING,
    "mimo_v2_flash": {
        **HALF_SLIDING,
        "rope_parameters": {"full_attention": HALF_TURNING, "sliding_attention": HALF_TURNING},
    },
    "modernbert-decoder": HALF_SLIDING,
    "olmo3": HALF_SLIDING,
    # latent attention
    "axk1": {**ALL_HEADS, **DENSE_THEN_SPARSE},
    "axk2": {**ALL_HEADS, **DENSE_THEN_SPARSE},
    "deepseek_v2": {**ALL_HEADS, "first_k_dense_replace": 1},
    "deepseek_v3": {**ALL_HEADS, "first_k_dense_replace": 1},
    "deepseek_v32": {**ALL_HEADS, **DENSE_THEN_SPARSE},
    "dots3_note_text": {
        **ALL_HEADS,
        **DENSE_THEN_SPARSE,
        "layer_types": ["sliding_attention", "indexed_attention"],
        "sliding_window": 16,
        "shared_experts_intermediate_size": 32,
        "per_layer_config": {0: {"qk_nope_head_dim": 8}},
    },
    "glm4_moe_lite": {**ALL_HEADS, **DENSE_THEN_SPARSE},
    "glm_moe_dsa": {**ALL_HEADS, **DENSE_THEN_SPARSE},
    "hy_v4": {**ALL_HEADS, **DENSE_THEN_SPARSE},
    "longcat_flash": {
        **ALL_HEADS,
        "num_layers": 1,
        "head_dim": 8,
        "ffn_hidden_size": 96,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
    },
    "minicpm3": ALL_HEADS,
    "youtu": ALL_HEADS,
    # attention among convolutions, state spaces or linear attention
    "bailing_hybrid": {**ALL_HEADS, **HALF_LINEAR},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granitemoehybrid": {
        **HALF_LINEAR,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
        "attention_multiplier": 0.2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {
        **PROPORTIONAL_WHEN_WIDE,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    "minimax": HALF_LINEAR,
    "olmo_hybrid": HALF_LINEAR,
    "qwen3_5_text": HALF_LINEAR,
    "qwen3_5_moe_text": HALF_LINEAR,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "qwen3_next": HALF_LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    # sines and cosines from a table: no RoPE parameters to replace
    "codegen": {"rotary_dim": 8, "max_position_embeddings": 512},
    "gptj": {"rotary_dim": 8, "max_position_embeddings": 512},
}

# A second shape of a model type: name: (model type, as above)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-sliding": ("mistral", {"sliding_window": 16}),
    "qwen2-sliding": ("qwen2", {**HALF_SLIDING, "use_sliding_window": True}),
    "phi3-sliding": ("phi3", {"sliding_window": 16}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}

# Why transformers itself builds no YaRN model of these, so that there is nothing to compare with.
WITHOUT_YARN = {
    "codegen": "its config has no RoPE parameters",
    "gptj": "its config has no RoPE parameters",
    "gemma4_text": "YaRN covers the turning part of the head only, but its wide layers turn the whole head",
    "gemma4_unified_text": "YaRN covers the turning part of the head only, but its wide layers turn the whole head",
    "lfm3": "YaRN covers the turning part of the head only, but its wide layers turn the whole head",
    "phi3": "its config reads yarn as longrope",
    "phi3-sliding": "its config reads yarn as longrope",
    "phimoe": "its config demands the fields of longrope",
    "recurrent_gemma": "its config has no max_position_embeddings, which YaRN reads",
}


def build(
    model_type: str, row: Mapping[str, Any], *, rope_parameters: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A small model of `model_type`, in float32 and eval mode, its weights drawn from seed 0.

    Args:
        model_type: transformers' name of the architecture.
        row: config fields beyond SMALL.
        rope_parameters: in place of the config's own, for the same weights under another RoPE; where layer types
            have parameters each, in place of those that see everything. None: the row's, or plain RoPE at 1e4.

    Raises:
        ValueError: the architecture has no RoPE parameters to replace.
    """
    config_class = CONFIG_MAPPING[model_type]
    declared = {field.name for field in dataclasses.fields(config_class)} | config_class.attribute_map.keys()
    fields = {name: value for name, value in SMALL.items() if name in declared} | dict(row)
    own = getattr(_config(config_class, fields), "rope_parameters", None)
    if rope_parameters is not None and own is None:
        raise ValueError(f"{model_type} has no rope_parameters to replace by {rope_parameters}")
    if own is not None and (rope_parameters is not None or "rope_parameters" not in row):
        fields["rope_parameters"] = _replace(own, rope_parameters or DEFAULT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(config_class, fields)).eval()
        # With the usual std of 0.02 attention is uniform, and logits hardly notice positions: llama's move by 0.005
        # when all distances are tripled, and a wrong rotation would pass most tests. With 0.2 they move by 10.
        # Vectors get noise on top of what they are, because biases, gates and temperatures that start at zero hide
        # their own mistakes, and a norm of ones may be swapped with a rotation unseen.
        for weight in model.parameters():
            if weight.dim() >= 2:
                torch.nn.init.normal_(weight, std=0.2)
            else:
                weight.data += 0.2 * torch.randn_like(weight)
    return model


def _config(config_class: type[Any], fields: Mapping[str, Any]) -> Any:
    return config_class(**copy.deepcopy(dict(fields)))  # configs write into the dicts they are given


def _replace(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    if any(isinstance(value, Mapping) for value in own.values()):  # None marks layers without RoPE
        return {kind: value and _replace(value, new if kind in WIDE else DEFAULT) for kind, value in own.items()}
    return {name: own[name] for name in KEPT if name in own} | dict(new)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    name: partial(build, model_type, row)
    for name, (model_type, row) in ({name: (name, row) for name, row in TABLE.items()} | VARIANTS).items()
    if model_type in CONFIG_MAPPING  # older releases of transformers lack some
}

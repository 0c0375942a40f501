"""Tiny models of several families as GGUF files, in every format of blocks."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, LENGTH, IDS = 300, 128, torch.arange(100)[None]
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128, "num_attention_heads": 2}),  # transformers does not read the dimension
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 64, **SOFTCAPS}),
    "gemma3_text": ("gemma3", {"query_pre_attn_scalar": 64}),
}
"""Architecture in GGUF and config, by model_type of transformers."""

SCALES = {
    Format.Q4_0: (0,),
    Format.Q4_1: (0, 2),
    Format.Q5_0: (0,),
    Format.Q5_1: (0, 2),
    Format.Q8_0: (0,),
    Format.Q2_K: (80, 82),
    Format.Q4_K: (0, 2),
    Format.Q5_K: (0, 2),
    Format.Q6_K: (208,),
}
"""The bytes of a block at which a float16 scale begins."""


def random_blocks(kind, shape, seed=0):
    """Bytes of a matrix in a format of blocks: everything is random, and scales are small."""
    random, (weights, size) = np.random.default_rng(seed), gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8)
    for place in SCALES[kind]:
        scales = random.normal(scale=1e-2, size=blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def model_of(family, **settings):
    """A random model of a family."""
    _, own = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | own | settings))).eval()
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.1 + (weight.ndim == 1)
    return model


def write_family(path, family, kind, extra=None, **settings):
    """Write a model of a family with random blocks, and return `path`.

    Args:
        kind: the format of the matrices, or a function from a tensor's name in GGUF to one.
        extra: gets the writer before it is closed.
        settings: of the config.
    """
    model, (arch, _) = model_of(family, **settings), FAMILIES[family]
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SMALL["head_dim"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or SMALL["head_dim"])
    writer.add_vocab_size(VOCAB)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tokens = ["<pad>", "<bos>", "<eos>", "a", "b", "ab", *(f"<{n}>" for n in range(VOCAB - 6))]
    if arch.startswith("gemma"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(n) for n in range(VOCAB)])
        writer.add_token_types([3, 3, 3, *[1] * (VOCAB - 3)])
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b"])
    writer.add_token_list(tokens)
    for name, value in SOFTCAPS.items():
        if getattr(config, name, None):
            writer.add_float32(f"{arch}.{name}", value)
    if extra is not None:
        extra(writer)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for number, (hf_name, tensor) in enumerate(model.state_dict().items()):
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        chosen = kind(name) if callable(kind) else kind
        if tensor.ndim == 2 and chosen in SCALES:
            writer.add_tensor(name, random_blocks(chosen, tensor.shape, number), raw_dtype=chosen)
        elif tensor.ndim == 2 and chosen is not None:
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model):
    with torch.inference_mode():
        return model(IDS % VOCAB).logits

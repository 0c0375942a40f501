"""A tiny Llama as a GGUF file, written with gguf's own writer."""

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, DIM, INNER, VOCAB = 64, 4, 2, 16, 96, 300

UNUSED = [
    ("blk.0.attn_q.bias", (HEADS * DIM,)),
    ("blk.0.ffn_up.bias", (INNER,)),
    ("blk.0.attn_q_norm.weight", (DIM,)),
    ("blk.1.ffn_up.weight", (INNER, HIDDEN)),
    ("blk.0.ffn_up.weight.lora_a", (4, HIDDEN)),
    ("output.bias", (VOCAB,)),
    ("unheard.of", (3,)),
]
"""Names and shapes of tensors that a plain Llama does not use."""


def interleaved(weight, heads):
    """llama.cpp's order of the rows of q and k: the pairs (n, n + d/2) of a head become neighbours."""
    rows = [h * DIM + n + half for h in range(heads) for n in range(DIM // 2) for half in (0, DIM // 2)]
    return weight[rows]


def llama_tensors(seed=0):
    """A one-layer Llama under its Hugging Face names."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * DIM, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * DIM, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    }
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


def write_llama(path, *, extra=None, leave_out="", pre="smollm", arch="llama", quantized=False):
    """Write a tiny Llama as GGUF, and return `path`; `extra` gets the writer before it is closed."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_vocab_size(VOCAB)
    tokens = [*(chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]), "ĠĠ"]
    tokens += [*(f"<{n}>" for n in range(VOCAB - len(tokens) - 1)), "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["Ġ Ġ"])
    for name, tensor in llama_tensors().items():
        short = GGUF_NAMES[name.removesuffix(".weight")]
        if short == leave_out:
            continue
        if short.endswith("attn_q"):
            tensor = interleaved(tensor, HEADS)
        if short.endswith("attn_k"):
            tensor = interleaved(tensor, KV_HEADS)
        if quantized and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(short + ".weight", gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(short + ".weight", tensor)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

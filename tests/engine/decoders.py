"""Small random models of every family that the compiled kernels run, with all that a family may have, and the
ways to read a text by it."""

import itertools
from functools import partial

import torch
from families import DEFAULT, build
from serving import difference, logits
from torch import nn

import ropewalk as rw
from ropewalk.engine.rotary_site import rotary_sites
from ropewalk.engine.runners.cpu.runner import CompiledRunner

IDS = torch.arange(3, 143).mul(37).remainder(95)[None] + 1
WINDOW = 24
LONGROPE = {
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4 + [1.2] * 4,
        "long_factor": [2.0] * 4 + [4.0] * 4,
    },
}


def layer_types(*wide):
    return {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention" if n in wide else "sliding_attention" for n in range(4)],
        "sliding_window": WINDOW,
    }


THREE = {"num_hidden_layers": 3}
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}
BIASED = {"attention_bias": True}
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

STEP_LOG = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
    "max_position_embeddings": 256,
}

# name: (model type, config fields)
ROWS = {
    "llama": ("llama", {**THREE, **BIASED, "mlp_bias": True, **SIX_HEADS}),
    "llama-one-head": ("llama", {**THREE, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 80}),
    "llama-3.1": ("llama", {**THREE, "rope_parameters": LLAMA3, "max_position_embeddings": 256}),
    "llama-unused-window": ("llama", {**THREE, "sliding_window": WINDOW}),
    "mistral": ("mistral", {**THREE, "sliding_window": WINDOW}),
    "mistral-wide": ("mistral", {**THREE, "sliding_window": None, "tie_word_embeddings": True}),
    "ministral": ("ministral", layer_types(1)),
    "ministral3": ("ministral3", {**THREE, "rope_parameters": STEP_LOG, "max_position_embeddings": 256}),
    "qwen2": ("qwen2", {**layer_types(0, 2), "use_sliding_window": True, "max_window_layers": 2}),
    "qwen2-wide": ("qwen2", {**THREE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**layer_types(1, 3), **BIASED, "use_sliding_window": True, "max_window_layers": 2}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], **BIASED, "mlp_bias": True}),
    "smollm3-windows": ("smollm3", {**layer_types(1, 2), "no_rope_layers": [0, 0, 1, 1], "use_sliding_window": True}),
    "phi3": ("phi3", {**THREE, "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}),
    "phi3-windows": ("phi3", {**THREE, "sliding_window": WINDOW, **SIX_HEADS}),
    "olmo2": ("olmo2", {**THREE, **BIASED, **SIX_HEADS}),
    "gemma": ("gemma", {**THREE, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**layer_types(1, 2), **CAPPED}),
    "gemma3_text": ("gemma3_text", {**layer_types(2), **BIASED, "query_pre_attn_scalar": 24}),
}
DECODERS = {name: partial(build, *row) for name, row in ROWS.items()}


def compiled(hf, **options):
    """A runner whose products are float32 on every CPU, unless `options` has a precision."""
    return CompiledRunner(hf, rotary_sites(hf), **{"precision": "float32", **options})


@torch.inference_mode()
def in_chunks(runner, sizes, ids=None, cache=None):
    """All logits of a text that is read in chunks; their sizes repeat."""
    text = (IDS if ids is None else ids)[0].tolist()
    cache = runner.new_cache(7) if cache is None else cache
    chunks, at = [], 0
    for size in itertools.cycle(sizes):
        if at == len(text):
            return torch.cat(chunks)
        piece = text[at : at + size]
        chunks.append(runner.forward(piece, cache, len(piece)))
        at += len(piece)
    raise AssertionError("no sizes")


def read(hf, ids=IDS):
    """Logits of the whole text by transformers' modules."""
    return logits(hf, ids)[0]


def in_bfloat16(hf):
    """As a checkpoint is loaded: `hf.bfloat16()` would round its rotary frequencies too."""
    for weight in hf.parameters():
        weight.data = weight.data.bfloat16()
    return hf


def noisy(hf):
    """A bfloat16 model whose own products are wrong by a tenth, which is more than on any CPU."""
    noise = torch.manual_seed(0)

    def blur(_module, _args, out):
        if out.dtype == torch.float32:
            return out
        return out * (1 + 0.1 * torch.randn(out.shape, generator=noise, dtype=out.dtype))

    hf = in_bfloat16(hf)
    for module in hf.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(blur)
    return hf


def under(runner, hf, spec, length):
    """`runner` under a scaler, and the same model patched with it, for sequences of `length` tokens."""
    scaler = rw.scaling.parse(spec)
    runner.use(scaler, length)
    return rw.patch(hf, scaler, length=length if scaler.depends_on_length else None)


__all__ = [
    "DECODERS",
    "IDS",
    "LONGROPE",
    "WINDOW",
    "compiled",
    "difference",
    "in_bfloat16",
    "in_chunks",
    "noisy",
    "read",
    "under",
]


# for tests that compare several runners

TOLERANCE = 5e-5  # of the largest logit
LENGTH = IDS.shape[1]  # 140; models are trained at 64

SPECS = [
    "none",
    "linear:3",
    "ntk:4",
    "ntk-fixed:4",
    "dynamic-ntk",
    "dynamic-ntk:2",
    "dynamic-yarn",
    "yarn:4",
    "yarn:4|resonance",
    "llama3:4",
    "cope",
    "logn",
    "temperature:1.3",
    "yarn:4|logn",
    "rerope:20",
    "rerope:20|logn",
    "leaky-rerope:20,k=4",
    "self-extend:4,window=20",
    "dpe:5/1/2/8,window=20",
    "self-logistic:20,rate=0.2,capacity=6",
    "dual-chunk",
    "dual-chunk:chunk=24,window=5|temperature:1.1",
    "string:window=5",
    "jet-long:20",
    "sink-window:30",
    "sink-window:30,sinks=2|logn",
    "yarn:4|rerope:20|logn",
    "dynamic-ntk|dual-chunk|temperature:1.1",
    "dynamic-yarn|jet-long:20|logn",
    "resonance|self-extend:4,window=20|logn",
    "yarn:2@0|yarn:4@1-",
    "logn@1|yarn:4@0/2|resonance@2",
    "rerope:20@1|yarn:2@0|logn@1-",
    "self-extend:4,window=20@0|dual-chunk@1|sink-window:30@2",
    "dynamic-yarn@1-|jet-long:20@0",
]

LAYERED = ["ministral", "qwen2", "smollm3", "smollm3-windows", "gemma2", "gemma3_text"]

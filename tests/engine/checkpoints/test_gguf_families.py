"""GGUF files of other families than Llama: the converted config has the fields that transformers does not read."""

import gguf
import pytest
import torch
from gguf_models import write_family
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    NemotronConfig,
    Phi3Config,
    StableLmConfig,
    Starcoder2Config,
)

from ropewalk import UnsupportedModel
from ropewalk.engine.checkpoints.gguf_config import write_config
from ropewalk.engine.checkpoints.gguf_conversion import convert_gguf
from ropewalk.engine.checkpoints.gguf_file import GgufFile

VOCAB, LENGTH = 300, 128
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(100)[None]


def rope(theta=10_000.0, share=1.0):
    parameters = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": parameters if share == 1 else {**parameters, "partial_rotary_factor": share}}


def window(writer):
    writer.add_sliding_window(10)


FAMILIES = {
    "phi3": (Phi3Config(**SMALL, **rope(share=0.75)), 12, None),
    "phi3 with a window": (Phi3Config(**SMALL, **rope(), sliding_window=10), 16, window),
    "starcoder2": (Starcoder2Config(**SMALL, **rope(999_999.0)), 16, None),
    "stablelm": (StableLmConfig(**SMALL, use_qkv_bias=False, **rope(50_000.0, 0.5)), 8, None),
    "nemotron": (NemotronConfig(**SMALL, **rope(share=0.25)), 4, None),
}


@pytest.fixture
def write(tmp_path):
    def write(model, arch, dim, extra=None):
        path, config = tmp_path / "model.gguf", model.config
        names = gguf.get_tensor_name_map(next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 2)
        writer = gguf.GGUFWriter(path, arch)
        writer.add_context_length(LENGTH)
        writer.add_embedding_length(64)
        writer.add_block_count(2)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(4)
        writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
        writer.add_layer_norm_eps(1e-5)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(dim)
        writer.add_vocab_size(VOCAB)
        writer.add_pad_token_id(0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "ab", *(f"<{n}>" for n in range(VOCAB - 3))])
        writer.add_token_merges(["a b"])
        if extra:
            extra(writer)
        for hf_name, tensor in model.state_dict().items():
            if hf_name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            offset = (
                1 if arch == "nemotron" and hf_name.endswith("norm.weight") else 0
            )  # llama.cpp stores the weight plus 1
            writer.add_tensor(names.get_name(hf_name, try_suffixes=(".weight", ".bias")), (tensor + offset).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def model_of(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.3
    return model


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_logits_of_its_model(write, tmp_path, family):
    config, dim, extra = FAMILIES[family]
    model = model_of(config)
    expected = logits(model)
    out = convert_gguf(write(model, family.split()[0], dim, extra), tmp_path / "out")
    converted = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    assert (converted - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_field_that_the_config_cannot_hold_is_refused(write, tmp_path):
    model = model_of(LlamaConfig(**SMALL))
    with pytest.raises(UnsupportedModel, match=r"its llama\.attention\.sliding_window is 10, and the LlamaConfig"):
        convert_gguf(write(model, "llama", 16, window), tmp_path / "out")
    assert convert_gguf(write(model, "llama", 16, lambda writer: writer.add_sliding_window(LENGTH)), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "layers", "scalar"),
    [("gemma2", 2, 64), ("gemma2", 46, 128), ("gemma3_text", 2, 64), ("gemma3_text", 62, 128)],
)
def test_the_scale_of_gemmas_attention_is_that_of_llama_cpp(tmp_path, family, layers, scalar):
    """No field has it. It follows from the dimension of a head, and in the models of 27B from that of the model."""
    settings = {"num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 256}
    file = write_family(tmp_path / "gemma.gguf", family, gguf.GGMLQuantizationType.Q8_0, **settings)
    write_config(GgufFile(file), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).query_pre_attn_scalar == scalar

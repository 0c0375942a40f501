"""`load`: every kind of name, every kind of tokenizer, and refusals in one sentence."""

import concurrent.futures
import json
import shutil
import sys
import warnings

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GptOssConfig, LlamaConfig, LlamaForCausalLM

import ropewalk as rw
from ropewalk.engine.load import _choose_dtype

GREEDY = rw.SamplingParams(max_new_tokens=5, temperature=0)


def test_a_folder_loads_with_our_attention_and_its_own_dtype(tiny_folder):
    model = rw.load(tiny_folder, rope="yarn:2")
    assert model.hf.config._attn_implementation == "ropewalk_causal"
    assert model.hf.dtype == torch.float32
    assert not model.hf.training
    assert model.trained_length == 256
    assert str(model.rope) == "yarn:2"


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map_goes_through_accelerate(tiny_folder, device_map):
    model = rw.load(tiny_folder, device_map=device_map)
    assert model.generate("import ", GREEDY).token_ids == rw.load(tiny_folder).generate("import ", GREEDY).token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_on_the_disk_count_for_what_the_model_is(tiny_folder, dtype):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.norm": "disk"}
    places |= {f"model.layers.{n}": "cpu" if n < 2 else "disk" for n in range(4)}
    model = rw.load(tiny_folder, device_map=places, dtype=dtype, compile=False)
    whole = rw.load(tiny_folder, dtype=dtype, compile=False)
    assert (model.fingerprint, model.checkpoint_fingerprint) == (whole.fingerprint, whole.checkpoint_fingerprint)
    model.rope = whole.rope = "auto"
    assert model.generate("import ", GREEDY).token_ids == whole.generate("import ", GREEDY).token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_honoured_and_frequencies_stay_exact(tiny_folder, dtype):
    model = rw.load(tiny_folder, dtype=dtype)
    assert str(model.hf.dtype) == f"torch.{dtype}"
    assert model.hf.model.rotary_emb.inv_freq.dtype == torch.float32
    assert len(model.generate("import ", GREEDY).token_ids) == 5


def test_auto_dtype_avoids_bfloat16_where_the_cpu_has_none(monkeypatch):
    config = LlamaConfig(dtype="bfloat16")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("ropewalk.engine.load.cpu_has_bfloat16", lambda has=has: has)
        assert _choose_dtype("auto", config, on_cpu=True, widens=False) == expected
        assert _choose_dtype("auto", config, on_cpu=True, widens=True) == torch.bfloat16
    assert _choose_dtype("auto", config, on_cpu=False, widens=False) == torch.bfloat16
    assert _choose_dtype("float16", config, on_cpu=True, widens=False) == torch.float16
    half = LlamaConfig(dtype="float16")  # the kernels do not widen it
    assert _choose_dtype("auto", half, on_cpu=True, widens=True) == torch.float32


def test_a_sentencepiece_tokenizer_loads(tmp_path, tiny_folder):
    text = tmp_path / "corpus.txt"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dogs",
        "and",
        "runs",
        "through",
        "old",
        "forests",
    ]
    lines = [" ".join(words[i % 7 : i % 7 + 3 + i % 9]) for i in range(400)]
    text.write_text("\n".join(lines), encoding="utf-8")
    folder = tmp_path / "model"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = rw.load(folder)
    ids = model.tokenizer("the lazy fox", add_special_tokens=False).input_ids
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert ids == processor.encode("the lazy fox")
    assert len(model.generate("the quick", GREEDY).token_ids) <= 5


def save(config, folder, tiny_folder):
    """A folder with random weights and the tiny model's tokenizer."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder)
    return folder


def test_threads_load_whole_models_and_leave_the_process_as_it_was(tiny_folder):
    from transformers.utils import logging

    def state():
        return sys.stderr, logging.get_verbosity(), logging.is_progress_bar_enabled(), [*warnings.filters]

    before = state()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        models = [*pool.map(lambda _: rw.load(tiny_folder, compile=False), range(9))]
    assert {model.fingerprint for model in models} == {models[0].fingerprint}
    assert state() == before


WHOLE = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 2,
}


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(**WHOLE, num_local_experts=2, num_experts_per_tok=1),
        Gemma2Config(**WHOLE, attn_logit_softcapping=1.0, query_pre_attn_scalar=1),
    ],
    ids=["sinks", "softcap"],
)
@pytest.mark.parametrize("compile", [False, "auto"])
def test_what_sdpa_cannot_do_is_left_to_the_models_own_attention(tmp_path, tiny_folder, config, compile):
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in reference.named_parameters():
        weight.data = torch.full_like(weight, 4.0) if name.endswith("sinks") else weight * 10
    reference.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path)
    model = rw.load(tmp_path, dtype="float32", compile=compile)
    ids = list(range(5, 45))
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
        logits = model._runner.forward(ids, model.new_cache(50), 40)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_model_without_rope_is_refused_before_its_weights_are_read(tmp_path, tiny_folder):
    config = GPT2Config(vocab_size=1024, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    folder = save(config, tmp_path / "gpt2", tiny_folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(rw.UnsupportedModel, match=r"gpt2.*no rotary"):
        rw.load(folder)


def test_a_mistake_in_a_scaler_is_found_before_the_weights_are_read(tmp_path, tiny_folder):
    """Also where it takes the config to read the scaler."""
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(rw.ConfigError, match=r"Did you mean 'rerope'\?"):
        rw.load(tmp_path, rope="yarn:2|reropee:0.5x")
    with pytest.raises(rw.ConfigError, match=r"rerope: window: length '0\.3x' is 76\.8 tokens"):
        rw.load(tmp_path, rope="rerope:0.3x")


def test_mistakes_in_names_and_options(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(rw.AssetError, match="no such folder"):
        rw.load(tmp_path / "nothing")
    with pytest.raises(rw.AssetError, match=r"no config.json"):
        rw.load(tmp_path)
    with pytest.raises(rw.AssetError, match="the name of the model is empty"):
        rw.load("")
    with pytest.raises(rw.AssetError, match="no such file"):
        rw.load(tmp_path / "model.gguf")
    with pytest.raises(rw.AssetError, match=r"config.json is a file that is no .gguf; give the folder of a model"):
        rw.load(tiny_folder / "config.json")
    with pytest.raises(rw.AssetError, match=r"Did you mean 'smollm2-135m'\?"):
        rw.load("smollm2-135")
    with pytest.raises(
        rw.AssetError,
        match=r"'nobody/no-such-model' is not a built-in model .* hub has no copy of it; correct the name",
    ):
        rw.load("nobody/no-such-model")
    with pytest.raises(rw.ConfigError, match=r"Did you mean 'float16'\?"):
        rw.load(tiny_folder, dtype="flaot16")
    with pytest.raises(rw.ConfigError, match="max_length 0"):
        rw.load(tiny_folder, max_length=0)
    with pytest.raises(rw.ConfigError, match=r"Did you mean 'yarn'\?"):
        rw.load("never looked at", rope="yran:2")


@pytest.mark.parametrize(
    "device_map", ["cuda:99", "gpu", {"model": "cpu", "lm_head": "cuda:99"}], ids=["missing", "unknown", "one of two"]
)
def test_a_device_that_torch_cannot_use_is_named_before_the_weights(tiny_folder, device_map, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights"))
    with pytest.raises(rw.ConfigError, match=r"device_map .*: torch .* cannot use the device '(cuda:99|gpu)' here"):
        rw.load(tiny_folder, device_map=device_map)


@pytest.mark.model
@pytest.mark.slow
def test_the_embedded_model_scores_as_transformers_does(monkeypatch):
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 128)
    model = rw.load("smollm2-135m", dtype="float32")
    from ropewalk.engine.checkpoints import assets
    from ropewalk.engine.checkpoints.gguf_conversion import converted_gguf

    reference = AutoModelForCausalLM.from_pretrained(
        converted_gguf(assets.fetch_files("smollm2-135m")), dtype=torch.float32
    ).eval()
    score = model.score("It was the best of times, it was the worst of times, it was the age of wisdom. " * 12)
    ids = torch.tensor([score.token_ids])
    with torch.inference_mode():
        logprobs = reference(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    assert len(expected) > 128  # more than one chunk
    assert (score.logprobs - expected).abs().max() < 1e-4
    assert model.generate("The capital of France is", GREEDY).text.startswith(" Paris")

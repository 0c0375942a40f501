"""The weights of a GGUF file in a transformers model, packed or expanded, are those that transformers reads."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from gguf_models import FAMILIES, SCALES, logits, random_blocks, write_family
from prepared import python
from tiny_gguf import HIDDEN, UNUSED, write_llama
from transformers import AutoModelForCausalLM

import ropewalk as rw
from ropewalk import AssetError, UnsupportedModel
from ropewalk.engine.checkpoints import assets
from ropewalk.engine.checkpoints.checkpoint import read_weights
from ropewalk.engine.checkpoints.config import find_config
from ropewalk.engine.checkpoints.gguf_conversion import converted_gguf, file_behind
from ropewalk.engine.checkpoints.gguf_weights import scales_are_finite
from ropewalk.engine.hf_model import checkpoint_fingerprint, fingerprint, stored_dtype, weight_bytes, weight_count
from ropewalk.engine.packed import PackedLinear, PackedWeight, packed_weights, unpacked

PLAIN = [Format.F32, Format.F16, Format.BF16]
PACKED = [*PLAIN, *sorted(SCALES.keys() - {Format.Q2_K})]
MIXED = {"token_embd": Format.Q6_K, "attn_q": Format.Q5_1, "attn_v": Format.F16, "ffn_down": Format.F32}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    if "model" not in request.keywords:
        monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    """A function that writes a model of a family, with the arguments of `write_family`."""
    return lambda *arguments, **settings: write_family(tmp_path / "model.gguf", *arguments, **settings)


def packed(path):
    return read_weights(*find_config(str(path)), keep_blocks=True, dtype=torch.float32)


def expanded(path, dtype=torch.float32):
    return read_weights(*find_config(str(path)), dtype=dtype)


def converted(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(converted_gguf(path), dtype=dtype).eval()


def mixed(name):
    return next((kind for part, kind in MIXED.items() if part in name), Format.Q4_K)


def check_same_model(model, expected):
    assert logits(expected).abs().max() > 0.1
    assert torch.equal(logits(model), logits(expected))
    assert model.config.to_diff_dict() == expected.config.to_diff_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert not model.training and model.name_or_path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_its_converted_model(write, family):
    path = write(family, Format.Q4_0)
    expected = converted(path)
    for model in (packed(path), expanded(path)):
        check_same_model(model, expected)
    matrices = {name for name, weight in expected.named_parameters() if weight.ndim == 2}
    assert packed_weights(packed(path)).keys() == matrices


@pytest.mark.parametrize("kind", [*PACKED, mixed], ids=[*(kind.name for kind in PACKED), "mixed"])
def test_every_format_gives_the_logits_of_its_converted_model(write, kind):
    path = write("llama", kind)
    for model in (packed(path), expanded(path)):
        check_same_model(model, converted(path))
    assert all(type(module) is not torch.nn.Linear for module in packed(path).modules())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_expanded_weights_are_those_of_the_converted_folder_in_16_bits(write, family):
    path = write(family, Format.Q8_0)
    model, expected = expanded(path, torch.bfloat16), converted(path, torch.bfloat16)
    tensors = ([*each.named_parameters(), *each.named_buffers()] for each in (model, expected))
    for (name, tensor), (other, expected_tensor) in zip(*tensors, strict=True):
        assert name == other and tensor.dtype == expected_tensor.dtype and torch.equal(tensor, expected_tensor), name


def test_a_tied_output_is_the_embedding_and_an_untied_one_is_not(write):
    model = packed(write("llama", Format.Q4_0))
    assert not torch.equal(model.lm_head.packed.data, model.model.embed_tokens.packed.data)
    path = write("llama", Format.Q4_0, tie_word_embeddings=True)
    model, plain = packed(path), expanded(path)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    for each in (model, plain):
        check_same_model(each, converted(path))


def test_blocks_stay_in_the_file_and_only_queries_and_keys_are_copied(write):
    path = write("llama", Format.Q8_0)
    model, before = packed(path), path.read_bytes()
    changed = bytearray(before)
    at = before.index(model.model.layers[0].mlp.up_proj.packed.data.numpy().tobytes()[:34])
    changed[at] ^= 1
    path.write_bytes(bytes(changed))  # in place: the mapping shows it
    assert model.model.layers[0].mlp.up_proj.packed.data[0, 0] == changed[at]


def test_a_model_with_names_of_mistral_is_the_same_model(write):
    plain, named = write("llama", Format.Q4_0), []
    expected = logits(packed(plain))
    model = packed(write("llama", Format.Q4_0, lambda writer: named.append(writer.add_name("mistral"))))
    assert named and model.config.model_type == "mistral" and torch.equal(logits(model), expected)


# What packed weights are to the rest


def test_counts_and_fingerprints_of_packed_weights(write):
    path = write("llama", mixed)
    model, plain = packed(path), expanded(path)
    assert weight_count(model) == weight_count(plain) == plain.num_parameters()
    assert checkpoint_fingerprint(model) == checkpoint_fingerprint(plain) == checkpoint_fingerprint(converted(path))
    assert stored_dtype(plain) == "float32" and stored_dtype(model) == "Q4_K + F32 + Q5_1 + Q6_K + F16"
    assert fingerprint(model, stored_dtype(model)) != fingerprint(plain, stored_dtype(plain))
    assert weight_bytes(model) < path.stat().st_size < weight_bytes(plain) < 4 * weight_count(plain) + 10_000
    assert model.dtype == torch.float32 and model.device.type == "cpu"


def test_files_that_differ_have_different_fingerprints(write):
    path = write("llama", Format.Q4_0)
    first = fingerprint(packed(path), "Q4_0"), checkpoint_fingerprint(packed(path))
    tensor = next(tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "blk.1.ffn_up.weight")
    tensor.data[:] = random_blocks(Format.Q4_0, (512, 256), seed=77)
    second = fingerprint(packed(path), "Q4_0"), checkpoint_fingerprint(packed(path))
    assert first[0] != second[0] and first[1] != second[1]


def test_load_keeps_blocks_under_auto_and_expands_them_else(write):
    path = write("llama", Format.Q4_0)
    model, plain = rw.load(path), rw.load(path, dtype="float32")
    assert packed_weights(model.hf) and not packed_weights(plain.hf)
    assert not packed_weights(rw.load(path, compile=False).hf)
    assert model.checkpoint_fingerprint == plain.checkpoint_fingerprint and model.fingerprint != plain.fingerprint
    assert model.describe().splitlines()[0] == plain.describe().splitlines()[0]
    assert model.vocabulary_size == plain.vocabulary_size == 300
    again = rw.load(model.hf, tokenizer=model.tokenizer)
    again.score_ids([1, 2, 3])
    model.hf.lm_head = PackedLinear(PackedWeight(model.hf.lm_head.packed.data[:], Format.Q4_0))
    with pytest.raises(rw.PatchError, match="have changed since it was loaded"):
        again.score_ids([1, 2, 3])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_models_are_exported_with_their_numbers(write, tmp_path, family):
    path = write(family, Format.Q4_0, tie_word_embeddings=family == "llama")
    model = rw.load(path, rope="yarn:4")
    rw.export(model, tmp_path / "loaded")
    rw.export(str(path), tmp_path / "named", rope="yarn:4")
    expected = dict(converted(path).named_parameters())
    for name in ("loaded", "named"):
        written = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert written.config.rope_parameters["rope_type"] == "yarn"
        for weight, tensor in written.named_parameters():
            assert torch.equal(tensor, expected[weight]), weight
    assert packed_weights(model.hf), "the model itself did not change"


def test_a_packed_model_that_was_changed_is_not_exported(write, tmp_path):
    model = rw.load(write("llama", Format.Q4_0))
    model.hf.model.norm.register_forward_hook(lambda *args: 2 * args[-1])
    with pytest.raises(UnsupportedModel, match=r"model\.norm"):
        rw.export(model, tmp_path / "out")


def test_every_packed_module_has_the_plain_one_that_it_replaced(write):
    for family in FAMILIES:
        path = write(family, Format.Q8_0)
        plain, expected = unpacked(packed(path)), expanded(path)
        assert [type(module) for module in plain.modules()] == [type(module) for module in expected.modules()]
        assert torch.equal(logits(plain), logits(expected))
        assert [name for name, _ in plain.named_parameters()] == [name for name, _ in expected.named_parameters()]


# What is not read here, or refused


def test_other_architectures_are_converted_and_say_so(tmp_path, capsys, write, monkeypatch):
    path = write("qwen2", Format.Q8_0)
    monkeypatch.setattr("ropewalk.engine.checkpoints.gguf_weights.ARCHITECTURES", {"llama"})
    for _ in range(2):
        folder, config = find_config(str(path))
        assert (tmp_path / folder / "model.safetensors").exists()
    assert capsys.readouterr().err == (
        "model.gguf: its weights are stored once more, as float32, because the blocks of a qwen2 model cannot be used "
        "as they are\n"
    )
    assert not packed_weights(read_weights(folder, config, keep_blocks=True, dtype=torch.float32))


def test_a_format_without_kernels_is_expanded_and_says_so(write, capsys):
    path = write("llama", lambda name: Format.Q2_K if "ffn_up" in name else Format.Q4_K)
    model = packed(path)
    assert not packed_weights(model)
    assert "expanded to float32, because the compiled kernels do not know the format Q2_K\n" in capsys.readouterr().err
    check_same_model(model, converted(path))


def test_an_explicit_device_or_option_reads_the_converted_folder(write):
    source, config = find_config(str(write("llama", Format.Q4_0)))
    model = read_weights(source, config, keep_blocks=True, dtype=torch.float32, device_map="auto")
    assert not packed_weights(model) and "gguf-float32" in model.name_or_path


def test_nothing_large_is_written(write, cache):
    path = write("llama", Format.Q4_0)
    rw.load(path)
    rw.load(path, dtype="bfloat16")
    rw.load(path, dtype="int8")
    folders = [folder for folder in cache.iterdir() if folder.is_dir() and folder.name != "kernels"]
    assert [folder.name.startswith("gguf-model-") for folder in folders] == [True]
    assert not list(folders[0].rglob("*.safetensors"))


def test_a_path_is_followed_from_the_cache_alone(write, tmp_path):
    path = write("llama", Format.Q4_0)
    folder, config = find_config(str(path))
    assert file_behind(tmp_path / folder) == path
    moved = (tmp_path / folder).rename(tmp_path / "elsewhere")
    assert file_behind(moved) is None
    with pytest.raises(AssetError, match=r"has no model\.safetensors"):
        read_weights(str(moved), config)


@pytest.mark.parametrize("read", [packed, expanded])
def test_a_number_that_is_not_finite_is_refused(write, read):
    path = write("llama", Format.Q4_K)
    tensor = next(tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "blk.1.ffn_up.weight")
    tensor.data[77, 3] = 0x7C  # dmin becomes infinite or NaN
    with pytest.raises(AssetError, match=r"its weight 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity"):
        read(path)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_scale_of_a_block_is_looked_at(kind, value):
    data = random_blocks(kind, (30, 512))
    assert kind not in PACKED or scales_are_finite(PackedWeight(torch.tensor(data), kind))
    for place in SCALES[kind]:
        changed = data.copy()
        changed.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])[47, place : place + 2] = np.float16([value]).view(np.uint8)
        assert not np.isfinite(gguf.dequantize(changed, kind)).all(), "this is a scale"
        assert kind not in PACKED or not scales_are_finite(PackedWeight(torch.tensor(changed), kind))


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_number_without_a_scale_is_looked_at(kind, value):
    numbers = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    for expected in (True, False):
        packed = PackedWeight(torch.tensor(gguf.quantize(numbers, kind).view(np.uint8)), kind)
        assert scales_are_finite(packed) == expected
        numbers[2, 17] = value


@pytest.mark.parametrize("read", [packed, expanded])
def test_a_missing_tensor_is_refused(tmp_path, read):
    path = write_llama(tmp_path / "tiny.gguf", leave_out="blk.0.ffn_up", quantized=True)
    with pytest.raises(UnsupportedModel, match=r"1 tensors of the model are not in the file.*up_proj"):
        read(path)


@pytest.mark.parametrize(
    ("name", "shape"), [*UNUSED, ("blk.0.attn_q.weight.lora_a", (4, HIDDEN)), ("blk.0.attn_q.scale", (1,))]
)
def test_a_tensor_that_the_model_does_not_use_is_refused(tmp_path, name, shape):
    path = write_llama(
        tmp_path / "tiny.gguf", extra=lambda writer: writer.add_tensor(name, np.ones(shape, np.float32)), quantized=True
    )
    with pytest.raises(UnsupportedModel, match=rf"some are not used \({name}\)"):
        packed(path)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    def extra(writer):
        writer.add_tensor("blk.0.ffn_norm.weight", np.ones(HIDDEN + 1, np.float32))

    path = write_llama(tmp_path / "tiny.gguf", extra=extra, leave_out="blk.0.ffn_norm")
    with pytest.raises(UnsupportedModel, match=r"post_attention_layernorm.* has the shape \[65\], and its fields"):
        packed(path)


# The real model

LOADED = """
import re, sys
import ropewalk as rw
def peak():  # in MB; the resource module would count the parent's memory
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
model = rw.load("smollm2-135m", dtype=sys.argv[1])
print(peak())
"""


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
def test_loading_the_built_in_model_takes_little_memory(tmp_path):
    assets.fetch("smollm2-135m")
    (tmp_path / "script.py").write_text(LOADED)
    peaks = {}
    for dtype in ("auto", "float32"):
        peaks[dtype] = int(python(tmp_path / "script.py", dtype).stdout)
    assert peaks["auto"] + 300 < peaks["float32"], peaks  # 97 MB of blocks are 538 MB in float32


@pytest.mark.model
def test_the_built_in_model_is_that_of_transformers():
    path = assets.fetch_files("smollm2-135m")
    model, expected = packed(path), converted(path)
    check_same_model(model, expected)
    assert checkpoint_fingerprint(model) == checkpoint_fingerprint(expected)
    assert stored_dtype(model) == "Q4_1 + Q8_0"

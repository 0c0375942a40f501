"""The export to llama.cpp and Ollama: GGUF files under a scaler."""

import json
import struct

import gguf
import pytest
import torch
from exported import TRAINED, patched, relative_difference, stock
from static_specs import STATIC

import ropewalk as rw
from ropewalk.engine.checkpoints.gguf_conversion import convert_gguf
from ropewalk.engine.checkpoints.gguf_file import GgufFile
from ropewalk.engine.exports.gguf_write import write_gguf
from ropewalk.scaling import hf
from ropewalk.scaling.spec import parse


def test_a_file_that_holds_no_language_model_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "clip")
    writer.add_uint32("clip.vision.block_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(rw.UnsupportedModel, match=r"no field 'clip\.|no field '\{arch\}"):
        rw.export(tmp_path / "other.gguf", tmp_path / "out.gguf", target="llama.cpp")


def test_a_gguf_file_needs_a_folder_and_room(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(rw.AssetError, match=r"file/x\.gguf: cannot be written \((File exists|Not a directory)\)"):
        rw.export(tiny_folder, tmp_path / "file" / "x.gguf", target="llama.cpp")
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("ropewalk.engine.storage.shutil.disk_usage", lambda _: usage)
    with pytest.raises(rw.AssetError, match=r"x\.gguf needs \d+ MB of disk space in .*, which has 1 MB free"):
        rw.export(tiny_folder, tmp_path / "x.gguf", target="llama.cpp")


@pytest.mark.parametrize("spec", STATIC)
def test_a_gguf_file_holds_the_frequencies(tiny_folder, tmp_path, spec):
    done = rw.export(tiny_folder, tmp_path / "out.gguf", rope=spec, target="llama.cpp", dtype="f32")
    back = GgufFile(done.path).configured
    expected = parse(spec, TRAINED).frequencies(
        hf.read(json.loads((tiny_folder / "config.json").read_text()))[None].rope
    )
    frequencies = back.scaler.frequencies(back.rope)
    torch.testing.assert_close(frequencies.inv_freq, expected.inv_freq, rtol=1e-6, atol=1e-30)
    assert frequencies.attention_factor == pytest.approx(expected.attention_factor, rel=1e-6)
    assert back.max_length == done.length


def test_an_exported_gguf_file_is_the_scaled_model(plain, tiny_folder, tmp_path):
    rw.export(tiny_folder, tmp_path / "out.gguf", rope="ntk-mixed:4", target="llama.cpp", dtype="f32")
    folder = convert_gguf(tmp_path / "out.gguf", tmp_path / "back")
    assert relative_difference(stock(folder), patched(plain, "ntk-mixed:4")) < 1e-4


def test_another_gguf_file_keeps_its_quantized_weights_and_fields(tiny_folder, tmp_path):
    first = write_gguf(tiny_folder, tmp_path / "first.gguf", "q8_0")
    second = rw.export(first, tmp_path / "second.gguf", rope="mrrope:4", target="llama.cpp").path
    third = rw.export(second, tmp_path / "third.gguf", target="llama.cpp", length=100).path
    original, scaled, shortened = (GgufFile(path) for path in (first, second, third))
    assert {*scaled.tensors} == {*shortened.tensors} == {*original.tensors, "rope_freqs.weight"}
    for name, tensor in original.tensors.items():
        for file in (scaled, shortened):
            assert file.tensors[name].tensor_type == tensor.tensor_type
            assert (file.tensors[name].data == tensor.data).all(), name
    changed = {"llama.context_length", "GGUF.kv_count", "GGUF.tensor_count"}
    for name in {*original.reader.fields} - changed:
        assert original.field(name) == scaled.field(name), name
    assert scaled.field("llama.context_length") == 1024 and shortened.field("llama.context_length") == 100
    frequencies = [file.configured.scaler.frequencies(file.configured.rope).inv_freq for file in (scaled, shortened)]
    assert torch.equal(*frequencies), "the file's own scaling is kept where none is asked for"


def test_empty_arrays_of_a_gguf_file_are_left_out(tiny_folder, tmp_path):
    first = write_gguf(tiny_folder, tmp_path / "first.gguf").read_bytes()
    count = int.from_bytes(first[16:24], "little") + 1
    name = b"some.list"  # gguf would not write it; 64 bytes in all, so that the tensors stay aligned
    name += b"." * (64 - 8 - len(name) - 16)
    empty = len(name).to_bytes(8, "little") + name + struct.pack("<IIQ", 9, 8, 0)
    (tmp_path / "more.gguf").write_bytes(first[:16] + count.to_bytes(8, "little") + empty + first[24:])
    assert GgufFile(tmp_path / "more.gguf").field(name.decode()) == []
    done = rw.export(tmp_path / "more.gguf", tmp_path / "out.gguf", rope="ntk:4", target="llama.cpp")
    assert GgufFile(done.path).field(name.decode()) is None


def test_an_architecture_without_divisors_takes_scalers_that_need_none(tiny_folder, tmp_path):
    path = write_gguf(tiny_folder, tmp_path / "llama.gguf", "f32")
    file = GgufFile(path)
    writer = gguf.GGUFWriter(tmp_path / "qwen2.gguf", "qwen2")
    writer.add_float32("qwen2.rope.scale_linear", 2.0)
    for name in ("context_length", "embedding_length", "attention.head_count", "rope.freq_base"):
        value = file.field(f"llama.{name}")
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
        writer.add_key_value(f"qwen2.{name}", value, kind)
    writer.add_tensor("token_embd.weight", file.tensors["token_embd.weight"].data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for spec in ("linear:4", "ntk:4", "yarn:4"):
        done = rw.export(tmp_path / "qwen2.gguf", tmp_path / f"{spec[:3]}.gguf", rope=spec, target="llama.cpp")
        assert done.length == 4 * TRAINED
        assert GgufFile(done.path).field("qwen2.rope.scale_linear") is None, "it would slow the positions as well"
    with pytest.raises(rw.UnsupportedModel, match=r"is a qwen2 model, and llama\.cpp is not known to read divisors"):
        rw.export(tmp_path / "qwen2.gguf", tmp_path / "no.gguf", rope="mrrope:4", target="llama.cpp")


def test_ollama_gets_a_modelfile(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "Tiny", rope="yarn:4", target="ollama", dtype="q8_0")
    assert (done.path / "Modelfile").read_text() == "FROM ./model.gguf\nPARAMETER num_ctx 1024\n"
    assert GgufFile(done.path / "model.gguf").configured.scaler == parse("yarn:4")
    assert done.command.startswith("ollama create tiny -f ")

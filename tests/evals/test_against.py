"""The engines of `speed --against`: each is the same model, and forgets and goes on as it should."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from gguf_models import write_family
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig

import ropewalk as rw
from ropewalk.engine.checkpoints.assets import fetch_files
from ropewalk.engine.checkpoints.checkpoint import read_config
from ropewalk.engine.checkpoints.gguf_conversion import converted_gguf
from ropewalk.engine.checkpoints.gguf_file import GgufFile
from ropewalk.engine.checkpoints.source import resolve
from ropewalk.engine.exports.gguf_write import write_gguf
from ropewalk.evals.speed.against import Memory, Traffic, engine_specs, parse_against
from ropewalk.evals.speed.engine import ENGINES, EngineSpec, open_engine
from ropewalk.evals.speed.worker import ProcessWorker

IDS = [5, 9, 300, 41, 77, 1000, 8, 8, 512, 3, 640, 21]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
TEXTS = ["def f(x):\n    return 1234 + x  # it's 1990\n\n  naïve", "a  12 345x\t\n\n b'LL", "日本語 and 😀 12,000.5%"]


def spec(kind, source, dtype="float32", **changes):
    settings = {"context": 64, "room": 16, "threads": 1} | changes
    return EngineSpec(kind=kind, dtype=dtype, source=str(source), **settings)


def reference(folder, ids=IDS):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def check_engine(engine, expected, tolerance):
    """Prefill, steps, rewinding, and another text behind the first."""
    assert np.abs(engine.prefill(IDS[:8]) - expected[7]).max() < tolerance
    for _ in range(2):
        engine.rewind(8)
        for index in range(8, 12):
            row = engine.step(IDS[index])
            assert row.dtype == np.float32
            assert np.abs(row - expected[index]).max() < tolerance
    engine.rewind(5)
    assert np.abs(engine.step(IDS[5]) - expected[5]).max() < tolerance
    assert np.abs(engine.prefill(IDS[:3]) - expected[2]).max() < tolerance


@pytest.mark.parametrize("kind", ["ropewalk", "hf"])
def test_ropewalk_and_transformers_are_the_model(tiny_folder, kind):
    engine = open_engine(spec(kind, tiny_folder))
    check_engine(engine, reference(tiny_folder), 1e-4)
    assert (engine.dtype, engine.cache_dtype) == ("float32", "float32")
    assert engine.versions["torch"] == torch.__version__


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_ropewalk_tells_what_it_runs_in(tiny_folder, dtype):
    engine = open_engine(spec("ropewalk", tiny_folder, dtype))
    cache = "bfloat16"  # int8 weights keep it too
    assert (engine.dtype, engine.cache_dtype) == (dtype, cache)
    assert np.abs(engine.prefill(IDS) - reference(tiny_folder)[-1]).max() < 0.5


def test_ropewalk_has_one_cache_at_a_time(tiny_folder, monkeypatch):
    engine = open_engine(spec("ropewalk", tiny_folder))
    before, new_cache = weakref.ref(engine._cache), engine._model.new_cache

    def checked(capacity):
        assert before() is None, "two caches would count as peak memory"
        return new_cache(capacity)

    monkeypatch.setattr(engine._model, "new_cache", checked)
    engine.prefill(IDS)


def test_ropewalk_says_in_its_name_that_transformers_modules_run_it(tiny_folder, prepared_processes):
    with ProcessWorker(spec("ropewalk", tiny_folder, "bfloat16")) as worker:
        assert worker.name == "ropewalk bfloat16"
    with ProcessWorker(spec("ropewalk", tiny_folder, "float16")) as worker:
        assert worker.name == "ropewalk float16 (by transformers' modules)"
        assert "not the compiled kernels: compiled kernels run on the CPU in float32" in worker.versions["network"]


def test_llama_cpp_is_the_model(tiny_folder, tmp_path, llama_cpp):
    file = write_gguf(tiny_folder, tmp_path / "tiny.gguf", "f32")
    check_engine(open_engine(spec("llama.cpp", file, "f32")), reference(tiny_folder), 0.01)  # its cache is float16


def test_llama_cpp_reads_prompts_of_several_batches(tiny_folder, tmp_path, llama_cpp):
    file = write_gguf(tiny_folder, tmp_path / "tiny.gguf", "f32")
    ids = np.random.default_rng(0).integers(1, 1024, 1100).tolist()
    row = open_engine(spec("llama.cpp", file, "f32", context=1100)).prefill(ids)
    assert np.abs(row - reference(tiny_folder, ids)[-1]).max() < 0.02


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_llama_cpp_scales_positions_as_transformers_does(tiny_folder, tmp_path, llama_cpp, rope):
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_parameters": {"rope_theta": 500_000.0, **rope}, "max_position_embeddings": 65_536}
    (folder / "config.json").write_text(json.dumps(config))
    ids = np.random.default_rng(0).integers(1, 1024, 200).tolist()
    expected = reference(folder, ids)[-1]
    assert np.abs(expected - reference(tiny_folder, ids)[-1]).max() > 0.2, "the scaling does nothing here"
    file = write_gguf(folder, tmp_path / "scaled.gguf", "f32")
    row = open_engine(spec("llama.cpp", file, "f32", context=200)).prefill(ids)
    assert np.abs(row - expected).max() < 0.02


def tokenizer_steps(kind):
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": kind != "llama-bpe"}
    if kind == "gpt-2":
        return last
    first = {"type": "Digits", "individual_digits": True}
    if kind == "llama-bpe":
        pattern = {"Regex": SPLIT + r"|\s+(?!\S)|\s+"}
        first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, last]}


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe"])
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tiny_folder, tmp_path, llama_cpp, kind):
    folder = tmp_path / "split"
    shutil.copytree(tiny_folder, folder)
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    described["pre_tokenizer"] = tokenizer_steps(kind)
    described["model"]["ignore_merges"] = kind == "llama-bpe"
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    file = write_gguf(folder, tmp_path / "split.gguf", "f16")
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=True) == tokenizer(text).input_ids


@pytest.mark.model
@pytest.mark.slow
def test_llama_cpp_is_smollm2(tmp_path, llama_cpp):
    folder = resolve("smollm2-135m")
    file = write_gguf(folder, tmp_path / "smollm2.gguf", "f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("".join(TEXTS)).input_ids
    row = open_engine(spec("llama.cpp", file, "f32", context=len(ids))).prefill(ids)
    expected = reference(converted_gguf(fetch_files("smollm2-135m")), ids)[-1]
    assert np.abs(row - expected).max() < 0.05
    assert row.argmax() == expected.argmax()


def test_a_file_that_llama_cpp_cannot_load(tmp_path, llama_cpp):
    (tmp_path / "text.gguf").write_text("not a GGUF file, but long enough to hold a header\n" * 9)
    with pytest.raises(rw.RopewalkError, match=r"llama\.cpp cannot load .*text\.gguf \(.*magic"):
        open_engine(spec("llama.cpp", tmp_path / "text.gguf", "f16"))


def test_a_process_is_the_engine_and_can_die(tiny_folder, prepared_processes):
    with ProcessWorker(spec("hf", tiny_folder)) as worker:
        assert (worker.name, worker.dtype) == ("hf float32", "float32")
        expected = reference(tiny_folder)
        read = worker.prefill(IDS[:8])
        assert np.abs(read.logits - expected[7]).max() < 1e-4
        decoded = worker.decode(8, IDS[8:])
        assert decoded.chosen == expected[8:].argmax(-1).tolist()
        assert np.abs(decoded.logits - expected[11]).max() < 1e-4
        assert read.seconds > 0
        assert worker.peak_memory_mb() > 50
        worker._process.kill()
        with pytest.raises(rw.RopewalkError, match=r"hf float32 died while reading 2 tokens \(exit code -9\)"):
            worker.prefill([1, 2])


def test_an_engine_that_does_not_load_says_why(tmp_path, prepared_processes):
    with pytest.raises(rw.AssetError, match="no config"):
        ProcessWorker(spec("ropewalk", tmp_path, "auto"))
    with pytest.raises(rw.RopewalkError, match=r"config.json cannot be used \(ValueError: Unrecognized model"):
        ProcessWorker(spec("hf", tmp_path))


def test_the_usual_peers(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def named(engines, *, bfloat16, dtype="auto"):
        monkeypatch.setattr("ropewalk.engine.load.cpu_has_bfloat16", lambda: bfloat16)
        return [e.name for e in engine_specs(str(tiny_folder), engines, dtype=dtype, context=8, room=1, threads=1)]

    usual = [("hf", None), ("llama.cpp", None)]
    llama = ["llama.cpp bf16", "llama.cpp q8_0"]
    assert named(usual, bfloat16=True) == ["ropewalk auto", "hf bfloat16", *llama]
    assert named(usual, bfloat16=False) == ["ropewalk auto", "hf bfloat16", "hf float32", *llama]
    assert named([("hf", None)], bfloat16=True, dtype="float16") == ["ropewalk float16", "hf bfloat16", "hf float16"]
    assert named([("hf", "float32"), ("hf", None)], bfloat16=False)[1:] == ["hf float32", "hf bfloat16"]


def test_llama_cpp_runs_the_gguf_file_that_ropewalk_runs(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = write_gguf(tiny_folder, tmp_path / "tiny.gguf", "q8_0")

    def found(engines, dtype="auto"):
        specs = engine_specs(str(file), engines, dtype=dtype, context=8, room=1, threads=1)
        return {each.name: each.source for each in specs[1:]}

    assert found([("llama.cpp", None)]) == {"llama.cpp Q8_0": str(file)}
    assert open_engine(spec("ropewalk", file, "auto")).dtype == "Q8_0"
    for others in (found([("llama.cpp", "bf16")]), found([("llama.cpp", None)], dtype="bfloat16")):
        assert "llama.cpp bf16" in others and str(file) not in others.values()
    assert list(found([("hf", "float32"), ("llama.cpp", None)])) == ["hf float32", "llama.cpp Q8_0"]


def test_engines_on_one_gguf_file_agree(tiny_folder, tmp_path, llama_cpp):
    file = write_gguf(tiny_folder, tmp_path / "tiny.gguf", "q8_0")
    ours, theirs = (open_engine(spec(kind, file, "auto")).prefill(IDS) for kind in ("ropewalk", "llama.cpp"))
    assert np.abs(ours - reference(tiny_folder)[-1]).max() > 1e-4, "nothing was rounded"
    assert np.abs(ours - theirs).max() < 0.3  # llama.cpp rounds activations to 8 bits


def test_against_is_read_strictly(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert parse_against("hf, llama.cpp:q8_0") == [("hf", None), ("llama.cpp", "q8_0")]
    with pytest.raises(rw.ConfigError, match=r"unknown engine 'llamacpp'\. Did you mean 'llama\.cpp'"):
        parse_against("hf,llamacpp")
    with pytest.raises(rw.ConfigError, match=r"unknown dtype 'q8' of llama\.cpp\. Did you mean 'q8_0'"):
        parse_against("llama.cpp:q8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(rw.ConfigError, match=r"llama\.cpp is not installed; pip install 'ropewalk\[llama-cpp\]'"):
        parse_against("llama.cpp")
    assert parse_against("hf:float16") == [("hf", "float16")]
    assert set(ENGINES) == {"ropewalk", "hf", "llama.cpp"}


def test_what_a_step_reads(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder)
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 2 * 128
    weights = 1024 * 128 + 4 * layer + 128  # the embedding is the output matrix
    cached = 2 * 4 * 2 * 32
    traffic = Traffic(config)
    assert traffic.step_bytes("float32", "float32", 100) == 4 * (weights + 100 * cached)
    assert traffic.step_bytes("bf16", "float16", 100) == 2 * (weights + 100 * cached)
    assert traffic.step_bytes("f32", "float16", 100) == 4 * weights + 2 * 100 * cached
    assert traffic.step_bytes("q8_0", "float16", 0) == weights * 34 / 32
    assert traffic.step_bytes("int8", "bfloat16", 100) == weights + 2 * 100 * cached
    untied = LlamaConfig(**config.to_dict() | {"tie_word_embeddings": False})
    assert Traffic(untied).weights == weights, "one row of the embedding is next to nothing"
    assert Traffic(MistralConfig(num_hidden_layers=1)).weights > 0


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_step_reads_of_a_gguf_file(tmp_path, monkeypatch, tied):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))

    def kind(name):
        return Format.Q6_K if "output" in name or "embd" in name else Format.Q4_0

    file = write_family(tmp_path / "tiny.gguf", "llama", kind, tie_word_embeddings=tied)
    engine = open_engine(spec("ropewalk", file, "auto"))
    assert engine.dtype == GgufFile(file).formats == "Q4_0 + Q6_K"
    config = read_config(resolve(str(file)))
    unused = set() if tied else {"token_embd.weight"}
    expected = sum(int(each.n_bytes) for each in GgufFile(file).reader.tensors if each.name not in unused)
    assert Traffic(config, file).step_bytes(engine.dtype, "bfloat16", 0) == expected


def test_memory_gives_something():
    assert 1e8 < Memory().bandwidth(1) < 1e13

"""transformers' modules on a GPU: no operation mixes devices, and the host rarely waits. The GPU is a pretended one."""

import pytest
import torch
from live import greedy
from on_cuda import LONG, PATHS, check_a_token_waits_once, next_bytes, on_gpu, session
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk as rw
from ropewalk.engine.model import Model
from ropewalk.scaling import METHODS

SPECS = [
    "none",
    "cope",
    "yarn:4|resonance",
    "dynamic-ntk",
    "dynamic-yarn",
    "logn",
    "infoscale",
    "step-log:length=64",
    "temperature:1.2",
    "rerope:64",
    "leaky-rerope:64,k=8",
    "self-extend:group=4,window=64",
    "dpe:groups=4/2,window=64",
    "self-logistic:window=64",
    "dual-chunk",
    "string:shift=100,window=32",
    "jet-long:near=64",
    "sink-window:sinks=4,window=64",
    "rerope:64|logn|yarn:2",
    "self-extend:group=4,window=8",  # its window is a narrow band, with a mask
]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def on_both(tiny_folder, tokenizer, cuda):
    """Makes the tiny model twice: on the CPU, and on the pretend device."""

    def make(rope=None, dtype=torch.float32):
        with cuda.aside():
            hf = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype).eval()
            here = Model(hf, tokenizer, name="tiny", rope=rope, max_length=4096)
        return here, Model(on_gpu(tiny_folder, dtype), tokenizer, name="tiny", rope=rope, max_length=4096)

    return make


def test_every_scaler_is_listed_but_those_that_set_fixed_frequencies():
    """The patch has one way to set them, whatever computed them."""
    listed = {part.partition(":")[0] for spec in SPECS for part in spec.split("|")}
    left_out = [METHODS[name] for name in METHODS if name not in listed | {"longrope"}]
    assert {(method.facet, method.depends_on_length) for method in left_out} == {("frequencies", False)}


@pytest.mark.parametrize("spec", SPECS)
def test_scaler(spec, on_both, cuda, monkeypatch):
    check_a_token_waits_once(*on_both(spec), cuda, monkeypatch)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_path(path, on_both, cuda):
    here, there = on_both()
    with cuda.aside():
        expected = path(here)
    assert path(there) == (pytest.approx(expected, abs=1e-5) if path is next_bytes else expected)


@pytest.mark.parametrize("rope", ["rerope:64", "auto"])
def test_session_under_a_map(rope, on_both, cuda):
    here, there = on_both(rope)
    with cuda.aside():
        expected = session(here)
    assert session(there) == expected


def test_a_session_is_saved_and_loaded(on_both, tmp_path):
    texts = []
    for model in on_both("rerope:64"):
        session = model.session()
        session.append(LONG)
        session.save(tmp_path / "session")
        loaded = model.session(tmp_path / "session")
        kinds = {type(layer.keys) for layer in loaded._cached.cache.layers}
        assert kinds == {type(layer.keys) for layer in session._cached.cache.layers}
        texts.append(loaded.generate("\ndef ", greedy(4)).text)
    assert texts[0] == texts[1]


def test_keys_that_do_not_fit_are_refused_before_the_text_is_read(on_both, cuda, monkeypatch):
    _, there = on_both()
    needed = there.bytes_per_token * (len(there.tokenizer.encode(LONG)) + 4)
    cuda.free = needed - 1
    monkeypatch.setattr(there._runner, "forward", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(rw.ContextOverflow, match=r"of GPU memory that are free; take at most \d+ tokens.*device_map="):
        there.generate(LONG, greedy(4, continuation="off"))
    cuda.free = needed
    monkeypatch.undo()


def test_what_a_session_holds_needs_no_room(on_both, cuda):
    _, there = on_both()
    session = there.session()
    session.append(LONG)
    cuda.free = there.bytes_per_token * 40
    assert session.generate("x", greedy(4)).text
    with pytest.raises(rw.ContextOverflow, match="GPU memory"):
        session.generate("x", greedy(400))


def test_a_gpu_reads_larger_chunks(on_both, cuda, monkeypatch):
    here, there = on_both()
    ids = there.tokenizer.encode(LONG)
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 40)
    counts = []
    for model in (here, there):
        forward, counted = model._runner.forward, []
        monkeypatch.setattr(
            model._runner,
            "forward",
            lambda ids, *rest, forward=forward, counted=counted, **more: (
                counted.append(len(ids)) or forward(ids, *rest, **more)
            ),
        )
        model.score(LONG)
        counts.append(counted)
    assert [max(counted) for counted in counts] == [40, 320]
    assert sum(counts[1]) == len(ids) - 1


@pytest.mark.parametrize(
    ("option", "named", "reason"),
    [
        ({"precision": "bfloat16"}, "precision bfloat16", "only the engine for CPUs does this"),
        ({"offload": ".", "dtype": "int8"}, r"offload \.", "only the engine for CPUs does this"),
        ({"dtype": "int8"}, "dtype int8", "no Triton"),
        ({"compile": True, "kv_dtype": "int8"}, "kv_dtype int8, compile True", "no Triton"),
        ({"dtype": "int8", "kv_dtype": "bfloat16"}, "dtype int8, kv_dtype bfloat16", "do not know this family"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("device_map", [None, "auto", "cuda:0"])
def test_what_no_engine_can_do_is_refused_before_the_weights(
    option, named, reason, device_map, tiny_folder, cuda, monkeypatch
):
    monkeypatch.setattr("ropewalk.engine.load.read_weights", lambda *_, **__: pytest.fail("weights"))
    monkeypatch.setattr("ropewalk.engine.load.KERNELS_UNAVAILABLE", "no Triton" if reason == "no Triton" else None)
    if "family" in reason:
        monkeypatch.setattr("ropewalk.engine.load.supported", lambda _: False)
    with pytest.raises(rw.ConfigError, match=f"^{named}: .*{reason}.*device_map='cpu'"):
        rw.load(tiny_folder, device_map=device_map, **option)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_the_cpu_honours_them_beside_a_gpu(device_map, tiny_folder, cuda):
    model = rw.load(tiny_folder, device_map=device_map, dtype="int8", kv_dtype="int8")
    assert model.is_compiled and not cuda.uploads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_in_chunks_needs_no_mask(dtype, tiny_folder, tokenizer, cuda, monkeypatch):
    """Attention of ours reads every chunk of a prompt. Without a patch, and under static frequencies."""
    monkeypatch.setattr("ropewalk.engine.load.read_weights", lambda *_, dtype, **__: on_gpu(tiny_folder, dtype))
    model = rw.load(tiny_folder, "yarn:4", device_map="cuda:0", dtype=dtype, tokenizer=tokenizer, compile=False)
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 100 // 4)
    monkeypatch.setattr(model._runner, "chunk_factor", 4)
    cuda.reset()
    there = model.generate(LONG, greedy(4)).text
    layers = model.hf.config.num_hidden_layers
    chunks = -(-len(tokenizer.encode(LONG)) // 100)
    flash = layers * (2 * chunks - 1 + 3) if dtype == "bfloat16" else 0  # a chunk after the first has two parts
    assert cuda.kernels["flash attention"] == flash
    assert not cuda.kernels["attention"] and not cuda.kernels["attention with a mask"]
    if dtype == "float32":
        here = rw.load(tiny_folder, "yarn:4", device_map="cpu", dtype=dtype, compile=False)
        assert here.generate(LONG, greedy(4)).text == there

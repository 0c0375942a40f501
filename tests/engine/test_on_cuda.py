"""transformers' modules on a GPU: no operation mixes devices, and the host rarely waits. The GPU is a pretended one."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from decoders import DECODERS, IDS
from decoders import SPECS as ENGINE_SPECS
from live import MORE, TEXT, greedy
from pretend_cuda import CudaTensor, move
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk as rw
from ropewalk.engine.batch import Admission, Batch, generate_tokens
from ropewalk.engine.model import Model
from ropewalk.engine.rotary_site import rotary_sites
from ropewalk.engine.runners.gpu import step
from ropewalk.engine.runners.gpu.reference import TorchOps
from ropewalk.engine.runners.gpu.runner import GpuRunner
from ropewalk.engine.sequence import Sequence
from ropewalk.scaling import METHODS, parse

LONG = (TEXT + MORE) * 6  # beyond the trained length
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


def check_a_token_waits_once(here, there, cuda, monkeypatch):
    """The model on the device computes what the one on the CPU does. A token costs one wait, and one upload."""
    with cuda.aside():
        scores, expected = here.score(LONG).logprobs, here.generate(LONG, greedy(6)).text
    torch.testing.assert_close(there.score(LONG).logprobs, scores, atol=1e-4, rtol=0)
    with steps_counted(there, cuda, monkeypatch) as counts:
        assert there.generate(LONG, greedy(6)).text == expected
    assert counts == [(1, 1)] * len(counts) and len(counts) >= 3  # the token


@contextmanager
def steps_counted(model, cuda, monkeypatch):
    """A list of the waits and uploads from each step to the next."""
    marks, counts, step = [], [], model._runner.step

    def counted(rows):
        marks.append((cuda.syncs.total(), cuda.uploads.total()))
        return step(rows)

    with monkeypatch.context() as patch:
        patch.setattr(model._runner, "step", counted)
        yield counts
    counts += [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(marks)]


def generated(model):
    params = rw.SamplingParams(
        max_new_tokens=6, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3, logprobs=2
    )
    return model.generate(TEXT, params).token_ids


def batch(model):
    return [answer.text for answer in model.generate([TEXT, TEXT + MORE, MORE], greedy(4))]


def contexts(model):
    return model.generate("def f(", greedy(4), contexts=[TEXT, MORE]).text


def session(model):
    one = model.session()
    one.append(LONG)
    texts = [one.generate("\ndef ", greedy(4)).text]
    other = one.fork()
    texts.append(other.generate("x", greedy(3)).text)
    model.rope = "yarn:4"
    texts.append(one.generate("y", greedy(3)).text)
    one.crop(100)
    return [*texts, one.generate("z", greedy(3)).text]


def covers(model):
    return model.generate(TEXT[:-2], greedy(4)).text, model.logprob(MORE[3:20], TEXT + MORE[:3])


def next_bytes(model):
    return model.next_byte_logprobs(TEXT[:-2]).tolist()


def descriptions(model):
    return model.fingerprint, model.checkpoint_fingerprint


def patched(model):
    ids = model.tokenizer(LONG, return_tensors="pt").input_ids.to(model.hf.device)
    with rw.patch(model.hf, "dynamic-ntk"):
        grown = model.hf.generate(ids, max_new_tokens=3, do_sample=False)
    short = torch.nn.functional.pad(ids[:, :50], (ids.shape[1] - 50, 0))
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, : ids.shape[1] - 50] = 0
    with rw.patch(model.hf, "rerope:64|logn"):
        two = model.hf.generate(torch.cat([ids, short]), attention_mask=mask, max_new_tokens=3, do_sample=False)
    with rw.patch(model.hf, "logn"):
        tempered = model.hf.generate(torch.cat([ids, short]), attention_mask=mask, max_new_tokens=3, do_sample=False)
    return grown.tolist(), two.tolist(), tempered.tolist()


PATHS = (generated, batch, contexts, session, covers, next_bytes, descriptions, patched)


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


def on_gpu(folder, dtype):
    return move(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


class TestDevice:
    """The pretend device refuses what CUDA refuses."""

    def test_mixed_devices(self, cuda):
        on_device = torch.ones(3, device="cuda:0")
        with pytest.raises(RuntimeError, match="same device"):
            on_device + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([on_device, torch.ones(3)])
        with pytest.raises(RuntimeError, match="indices"):
            torch.ones(3)[torch.tensor([0], device="cuda:0")]
        with pytest.raises(RuntimeError, match="numpy"):
            on_device.numpy()
        assert (on_device + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may be on the CPU

    def test_counts(self, cuda):
        x = torch.tensor([1.0, 2.0], device="cuda:0")
        y = (x * 2)[:1]
        assert (cuda.uploads.total(), cuda.kernels.total(), cuda.syncs.total()) == (1, 1, 0)
        assert isinstance(y, CudaTensor) and y.device.type == "cuda"
        assert int(y) == 2 and bool(x.any()) and x.nonzero().shape == (2, 1)
        assert cuda.syncs.total() == 3
        assert x[torch.tensor([1])].tolist() == [2.0]
        assert cuda.uploads.total() == 2

    def test_cpu_tensors_are_not_counted(self, cuda):
        assert torch.arange(3).sum().item() == 3
        assert not cuda.kernels and not cuda.syncs and not cuda.uploads


STEPS = ("none", "yarn:4|logn", "rerope:64|logn", "self-extend:group=4,window=64")


@pytest.fixture
def unverified(monkeypatch):
    """Engines do not compare themselves with the modules, which takes most of a test. Others have them do it."""
    for check in ("_verify_chunk", "_verify_step"):
        monkeypatch.setattr(GpuRunner, check, lambda _: None)


@pytest.fixture
def by_engine(tiny_folder, tokenizer, cuda, unverified):
    """Makes the tiny model twice, run by the engine for GPUs: on the CPU, and on the pretend device."""

    def made(hf, rope):
        model = Model(hf, tokenizer, name="tiny", rope=None, max_length=4096)
        model.replace_runner(GpuRunner(hf, model.sites, TorchOps()))
        model.rope = rope
        return model

    def make(rope):
        with cuda.aside():
            here = made(AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), rope)
        return here, made(on_gpu(tiny_folder, torch.float32), rope)

    return make


@pytest.mark.parametrize("spec", STEPS)
def test_the_engine_under_a_scaler(spec, by_engine, cuda, monkeypatch):
    check_a_token_waits_once(*by_engine(spec), cuda, monkeypatch)


ROWS = {
    "greedy": [{}] * 8,
    "drawn": [{"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "logprobs": 2}] * 8,
    "mixed": [{}, {"temperature": 1.0}, {"logprobs": 0}, {"temperature": 0.7, "logprobs": 3}] * 2,
}


@pytest.mark.parametrize("kinds", ROWS.values(), ids=ROWS)
def test_a_step_of_eight_rows_waits_once_and_a_row_is_drawn_as_alone(kinds, by_engine, cuda, monkeypatch):
    here, there = by_engine(None)
    texts = [TEXT[n : n + 40] for n in range(8)]

    def answers(model, *indices):
        params = [
            model.resolved(rw.SamplingParams(**{"temperature": 0.0, "seed": n, **kinds[n]}, max_new_tokens=6))
            for n in indices
        ]
        prompts = [model.read(texts[n], "off") for n in indices]
        sequences = [
            Sequence(prompt, each, model.vocabulary, frozenset()) for prompt, each in zip(prompts, params, strict=True)
        ]
        for _ in generate_tokens(Batch(model, sequences, 200, admission=Admission(rows=8))):
            pass
        return [(sequence.read_ids, sequence.completion().logprobs) for sequence in sequences]

    with steps_counted(there, cuda, monkeypatch) as counts:
        together = answers(there, *range(8))
    assert counts == [(1, 1)] * 4
    for n, (ids, logprobs) in enumerate(together):
        with cuda.aside():
            ((alone, expected),) = answers(here, n)
        assert ids == alone and (logprobs is None) == (expected is None)
        if logprobs is not None:
            assert [each.logprob for each in logprobs] == pytest.approx([each.logprob for each in expected], abs=1e-4)
            assert [list(each.top) for each in logprobs] == [list(each.top) for each in expected]


@pytest.mark.parametrize("rope", [None, "rerope:64|logn"])
@pytest.mark.parametrize("path", [path for path in PATHS if path is not patched], ids=lambda path: path.__name__)
def test_a_path_by_the_engine(path, rope, by_engine, cuda):
    here, there = by_engine(rope)
    with cuda.aside():
        expected = path(here)
    if path is covers:
        text, logprob = path(there)
        assert (text, logprob) == (expected[0], pytest.approx(expected[1], abs=1e-4))
    else:
        assert path(there) == (pytest.approx(expected, abs=1e-5) if path is next_bytes else expected)


LEFT_OUT = {"sink-window:30", "linear:3", "ntk:4", "ntk-fixed:4", "llama3:4", "cope", "yarn:4|resonance"}
"""The first replaces buffers. Of the others, which set frequencies alone, yarn:4 stands for all."""


@pytest.mark.parametrize("spec", [spec for spec in ENGINE_SPECS if spec not in LEFT_OUT])
def test_a_graph_of_a_step(spec, cuda, unverified):
    """The host does nothing in it, and it computes the next tokens when it runs again on what was uploaded."""
    text = IDS[0].tolist()

    def steps(hf, captures):
        runner = GpuRunner(hf, rotary_sites(hf), TorchOps(), captures=captures)
        runner.use(parse(spec), len(text))
        caches = [runner.new_cache(len(text)) for _ in range(2)]
        for cache, length in zip(caches, (100, 40), strict=True):
            runner.forward(text[:length], cache, 1)
        return [runner.step([([token], cache) for cache in caches]).cpu() for token in text[100:104]]

    with cuda.aside():
        expected = steps(DECODERS["llama"](), None)
    torch.testing.assert_close(steps(move(DECODERS["llama"]()), step.capture), expected, atol=1e-4, rtol=0)


def test_lack_of_memory_in_a_capture_is_told_of_as_such(by_engine, cuda, monkeypatch):
    """CUDA refuses to end a capture in which an operation failed. That error hides the first."""
    _, there = by_engine(None)
    monkeypatch.setattr(there._runner._step, "_captures", step.capture)
    texts, compute = there.generate(TEXT, greedy(3, continuation="off")).text, step.DecodeStep._compute

    def fails(*arguments):
        try:
            if cuda.recorded is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(*arguments)
        finally:
            if cuda.recorded is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    there._runner._step._graphs.clear()
    monkeypatch.setattr(step.DecodeStep, "_compute", fails)
    with pytest.raises(rw.OutOfMemory, match="shorten the text"):
        there.generate(TEXT, greedy(3, continuation="off"))
    monkeypatch.setattr(step.DecodeStep, "_compute", compute)
    assert there.generate(TEXT, greedy(3, continuation="off")).text == texts


@pytest.mark.parametrize(("spec", "blocks"), [("rerope:20|logn", 2), ("dual-chunk", 3)])
def test_an_int8_cache_is_widened_once_for_a_chunk(spec, blocks, cuda, tiny_folder, monkeypatch):
    """Each key and value becomes a 16-bit number once, however many blocks of queries read it."""
    monkeypatch.setattr(GpuRunner, "_verify_chunk", lambda _: None)  # pretended weights cannot be widened
    hf, widened, attended = on_gpu(tiny_folder, torch.bfloat16), [], []
    runner = GpuRunner(hf, rotary_sites(hf), TorchOps(), cache="int8")
    runner.use(parse(spec), None)
    cache = runner.new_cache(700)
    for _ in range(2):
        runner.forward([5] * 300, cache, 1)
    run, flash = cuda.run, cuda._flash

    def counted(func, args, kwargs):
        if func._schema.name == "aten::_to_copy" and isinstance(args[0], CudaTensor) and args[0].ndim == 4:
            widened.append((args[0].dtype, args[0].shape[2]))
        return run(func, args, kwargs)

    monkeypatch.setattr(cuda, "run", counted)
    monkeypatch.setattr(cuda, "_flash", lambda q, k, *rest, **more: attended.append(k) or flash(q, k, *rest, **more))
    runner.forward([5] * 100, cache, 1)
    layers = hf.config.num_hidden_layers
    assert len(attended) >= blocks * layers
    assert widened.count((torch.int8, 700)) == 2 * layers
    assert not [length for dtype, length in widened if dtype == torch.float32 and length == 700]


def test_the_engine_chooses_the_device_of_the_weights(cuda):
    """Triton starts its kernels on the current device."""

    class Ops(TorchOps):
        def add_norm(self, *arguments):
            assert cuda.current == 0
            return super().add_norm(*arguments)

        def attention(self, *arguments):
            assert cuda.current == 0
            return super().attention(*arguments)

    hf = move(DECODERS["llama"]())
    runner = GpuRunner(hf, rotary_sites(hf), Ops(), captures=step.capture)
    runner.tree([(5,), (5, 7)], runner.new_cache(4))
    assert cuda.current is None


@pytest.mark.parametrize("rope", ["none", "logn", "yarn:4|logn", "rerope:64|logn"])
def test_a_prompt_in_bfloat16_is_read_by_the_fused_kernel(rope, tiny_folder, cuda, monkeypatch):
    """A temperature must not widen the queries: the kernel takes 16 bits only."""
    monkeypatch.setattr(GpuRunner, "_verify_chunk", lambda _: None)  # pretended weights cannot be widened
    hf = on_gpu(tiny_folder, torch.bfloat16)
    runner = GpuRunner(hf, rotary_sites(hf), TorchOps())
    runner.use(parse(rope), None)
    cache = runner.new_cache(300)
    runner.forward([5] * 100, cache, 1)
    cuda.reset()
    runner.forward([5] * 100, cache, 1)
    assert cuda.kernels["flash attention"] >= 2 * hf.config.num_hidden_layers and not cuda.kernels["bmm"]

"""The engine for GPUs on a pretended one: no operation mixes devices, and a step waits once."""

import pytest
import torch
from decoders import DECODERS, IDS
from decoders import SPECS as ENGINE_SPECS
from live import TEXT, greedy
from on_cuda import PATHS, check_a_token_waits_once, covers, next_bytes, on_gpu, patched, steps_counted
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
from ropewalk.scaling import parse


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


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


def sets_fixed_frequencies(spec):
    """True for scalers that give a step nothing but other numbers in one table."""
    scaler = parse(spec)
    facets = {part.facet for part in scaler.parts}
    is_fixed = not (scaler.depends_on_length or scaler.differs_by_layer)
    return is_fixed and bool(facets) and facets <= {"frequencies", "wavelength grid"}


GRAPHS = ["yarn:4", *(spec for spec in ENGINE_SPECS if not sets_fixed_frequencies(spec))]
GRAPHS.remove("sink-window:30")  # it replaces buffers


@pytest.mark.parametrize("spec", GRAPHS)
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

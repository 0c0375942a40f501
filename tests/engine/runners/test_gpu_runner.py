"""The engine for GPUs, run on the CPU with tensor operations, compared with the same model patched."""

import copy
import itertools
import sys
import types
from pathlib import Path

import pytest
import torch
from decoders import (
    DECODERS,
    IDS,
    LAYERED,
    LENGTH,
    SPECS,
    TOLERANCE,
    compiled,
    difference,
    in_bfloat16,
    in_chunks,
    read,
    under,
)
from torch.utils._python_dispatch import TorchDispatchMode

import ropewalk as rw
from ropewalk.engine.cache import rewind
from ropewalk.engine.rotary_site import rotary_sites
from ropewalk.engine.runners import choose
from ropewalk.engine.runners.choose import RunnerOptions
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS
from ropewalk.engine.runners.gpu import step
from ropewalk.engine.runners.gpu.angles import StepAngles
from ropewalk.engine.runners.gpu.reference import TorchOps
from ropewalk.engine.runners.gpu.runner import GpuRunner
from ropewalk.engine.runners.skim import Sample
from ropewalk.engine.runners.transformers import TransformersRunner
from ropewalk.errors import DataError, RopewalkWarning, UnsupportedModel

pytestmark = [
    pytest.mark.usefixtures("freed_memory_is_overwritten"),
    pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning"),
]
CHUNKS = {"whole": [1000], "few at a time": [1, 1, 5], "mixed": [50, 1, 1, MAX_STEP_TOKENS, 3, 30]}
MAPS = [
    "rerope:20|logn",
    "dpe:4/2,window=20",
    "self-extend:4,window=20",
    "dual-chunk",
    "jet-long:20",
    "sink-window:30",
    "yarn:4|logn",
]
PATHS = [(5,), (9,), (5, 7), (5, 8), (9, 7), (5, 7, 1), (9, 7, 3), (5, 7, 1, 4)]
TEXT = IDS[0].tolist()


def on_gpu(hf, **options):
    return GpuRunner(hf, rotary_sites(hf), TorchOps(), **options)


@pytest.fixture(scope="module")
def llama():
    hf = DECODERS["llama"]()
    return hf, on_gpu(hf)


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("spec", SPECS)
def test_llama_under_every_kind_of_scaler(llama, spec, sizes):
    hf, runner = llama
    with under(runner, hf, spec, LENGTH):
        expected = read(hf)
    assert difference(in_chunks(runner, sizes), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "spec"), [*((name, "none") for name in DECODERS), *itertools.product(LAYERED, ["rerope:30|logn"])]
)
def test_every_family(name, spec):
    hf = DECODERS[name]()
    runner = on_gpu(hf)
    with under(runner, hf, spec, LENGTH):
        expected = read(hf)
    for sizes in ([1000], [50, 1, 1, MAX_STEP_TOKENS, 3, 30]):
        assert difference(in_chunks(runner, sizes), expected) < TOLERANCE


@pytest.mark.parametrize("spec", ["none", "rerope:20|logn", "yarn:4|self-extend:4,window=20"])
def test_steps_and_chunks_agree_in_float64(spec):
    """Two forms of the same attention. transformers' modules round norms and angles to float32."""
    hf = DECODERS["gemma3_text" if spec == "none" else "llama"]().double()
    runner = on_gpu(hf)
    runner.use(rw.scaling.parse(spec), LENGTH)
    assert difference(in_chunks(runner, [1, 1, 5]), in_chunks(runner, [1000])) < 1e-10


def cached(runner, text, chunk=1000, capacity=3):
    cache = runner.new_cache(capacity)
    in_chunks(runner, [chunk], torch.tensor([text]), cache)
    return cache


@pytest.mark.parametrize("spec", ["none", *MAPS])
@torch.inference_mode()
def test_a_row_of_a_batch_equals_the_row_alone(llama, spec):
    _, runner = llama
    runner.use(rw.scaling.parse(spec), LENGTH)
    lengths, counts = (60, 1, 90, 23, 64), (1, 3, 2, 1, 1)
    rows = [(TEXT[n : n + count], cached(runner, TEXT[:n])) for n, count in zip(lengths, counts, strict=True)]
    together = runner.step([(ids, cache.fork()) for ids, cache in rows])
    for (ids, _), n, logits in zip(rows, lengths, together, strict=True):
        alone = in_chunks(runner, [1000], torch.tensor([TEXT[:n] + ids]))[-1]
        assert difference(logits, alone) < TOLERANCE


@pytest.mark.parametrize("spec", ["none", *MAPS])
@torch.inference_mode()
def test_a_tree_is_each_of_its_paths_and_leaves_the_cache_as_it_was(llama, spec):
    _, runner = llama
    runner.use(rw.scaling.parse(spec), LENGTH)
    for held in (22, 70):
        cache = cached(runner, TEXT[:held])
        logits = runner.tree(PATHS, cache)
        for path, row in zip(PATHS, logits, strict=True):
            text = torch.tensor([[*TEXT[:held], *path]])
            assert difference(row, in_chunks(runner, [1000], text)[-1]) < TOLERANCE
        assert cache.length == held
        following = in_chunks(runner, [4], IDS[:, held : held + 20], cache)
        assert difference(following, in_chunks(runner, [1000], IDS[:, : held + 20])[held:]) < TOLERANCE


@pytest.mark.parametrize("spec", ["none", *MAPS])
@torch.inference_mode()
def test_a_rewound_or_forked_cache_equals_the_text_run_again(llama, spec):
    _, runner = llama
    runner.use(rw.scaling.parse(spec), LENGTH)
    expected = in_chunks(runner, [1000], IDS)
    cache = cached(runner, TEXT[::-1][:20], 5)
    rewind(cache, 20)
    in_chunks(runner, [30], IDS[:, :80], cache)
    fork = cache.fork()
    in_chunks(runner, [5], IDS.flip(1)[:, :40], cache)
    rewind(cache, 65)
    assert difference(in_chunks(runner, [5], IDS[:, 55:], cache), expected[55:]) < TOLERANCE
    assert difference(in_chunks(runner, [30, 1], IDS[:, 80:], fork), expected[80:]) < TOLERANCE


@pytest.mark.parametrize(("cache", "tolerance"), [("auto", TOLERANCE), ("int8", 0.1)])
@pytest.mark.parametrize("specs", [("rerope:20", "self-extend:4,window=30|logn"), ("none", "yarn:2|jet-long:20")])
@torch.inference_mode()
def test_a_cache_can_be_used_under_another_scaler(specs, cache, tolerance):
    hf = DECODERS["llama"]()
    hf.model.layers = hf.model.layers[:1]  # higher layers keep what they read under the old scaler
    runner = on_gpu(hf, cache=cache)
    old, new = (rw.scaling.parse(spec) for spec in specs)
    runner.use(new, LENGTH)
    expected = in_chunks(runner, [1000])[60:]
    for sizes in ([1], [30]):
        runner.use(old, LENGTH)
        held, before = cached(runner, TEXT[:60], 7), runner.rope_state
        runner.use(new, LENGTH)
        assert runner.rotate_cached_keys(held, before)
        assert difference(in_chunks(runner, sizes, IDS[:, 60:], held), expected) < tolerance


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2-wide", "gemma2"])
def test_merged_weights_are_the_models_own(name):
    """Nothing is held twice, and transformers' modules give the bits that they gave before."""
    hf = DECODERS[name]()
    before, weights = read(hf), copy.deepcopy(hf.state_dict())
    sizes = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in hf.parameters()}.values())
    runner = on_gpu(hf)
    assert torch.equal(read(hf), before)
    assert all(torch.equal(weights[key], value) for key, value in hf.state_dict().items())
    assert sizes == sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in hf.parameters()}.values()
    )
    with torch.no_grad():
        gate = hf.model.layers[0].mlp.gate_up_proj if name == "phi3" else hf.model.layers[0].mlp.gate_proj
        gate.weight[0] += 1
    assert difference(in_chunks(runner, [1]), before) > 1e-3
    assert difference(in_chunks(runner, [1]), read(hf)) < TOLERANCE


@pytest.mark.parametrize("spec", ["none", "rerope:20|logn", "self-extend:4,window=20"])
@torch.inference_mode()
def test_a_step_is_captured_once_for_each_number_of_rows(llama, spec):
    hf, plain = llama
    captured = []

    def captures(run):
        captured.append(run)
        return run

    runner = on_gpu(hf, captures=captures)
    for each in (plain, runner):
        each.use(rw.scaling.parse(spec), LENGTH)
    captured.clear()
    caches = [cached(runner, TEXT[:n]) for n in (30, 64)]
    others = [cached(plain, TEXT[:n]) for n in (30, 64)]
    for token in TEXT[:12]:
        rows, same = ([([token], cache) for cache in each] for each in (caches, others))
        assert difference(runner.step(rows), plain.step(same)) < TOLERANCE
    assert len(captured) == 1
    kept = runner.step(rows[:1])
    again = kept.clone()
    runner.step(rows[:1])
    assert len(captured) == 2 and torch.equal(kept, again)
    runner.tree(PATHS, caches[0])
    assert len(captured) == 2
    runner.use(rw.scaling.parse("yarn:2"), None)
    runner.step(rows[:1])
    assert len(captured) == 3


@torch.inference_mode()
def test_requests_that_take_turns_keep_their_graphs(llama):
    hf, plain = llama
    captured, texts = [], []
    runner = on_gpu(hf, captures=lambda run: captured.append(run) or run)
    captured.clear()
    for each in (plain, runner):
        specs = ("rerope:20", "yarn:2", "dynamic-ntk")
        caches = {}
        for spec in specs:
            each.use(rw.scaling.parse(spec), LENGTH)
            caches[spec] = cached(each, TEXT[:30], capacity=50)
        for token in TEXT[:3]:
            for spec in specs:
                each.use(rw.scaling.parse(spec), LENGTH)
                texts.append(each.step([([token], caches[spec])]))
    assert len(captured) == 3
    assert all(difference(*pair) < TOLERANCE for pair in zip(texts[:9], texts[9:], strict=True))
    for spec in ("yarn:3", "yarn:4", "yarn:5", "rerope:20"):
        runner.use(rw.scaling.parse(spec), LENGTH)
    runner.step([([1], caches["rerope:20"])])
    assert len(captured) == 4 and len(runner._steps) == 4


@pytest.mark.parametrize(("spec", "capacity", "captures"), [("rerope:20", 100, 2), ("none", 100, 1), ("none", 21, 1)])
@torch.inference_mode()
def test_longer_tables_of_shifts_need_a_new_capture(llama, monkeypatch, spec, capacity, captures):
    """The table moves. Caches may: a graph reads their addresses."""
    hf, plain = llama
    monkeypatch.setattr("ropewalk.engine.runners.gpu.angles._FEWEST_SHIFTS", 32)
    captured = []
    runner = on_gpu(hf, captures=lambda run: captured.append(run) or run)
    for each in (plain, runner):
        each.use(rw.scaling.parse(spec), LENGTH)
    captured.clear()
    cache, other = (cached(each, TEXT[:20], capacity=capacity) for each in (runner, plain))
    for token in TEXT[20:50]:
        assert difference(runner.step([([token], cache)]), plain.step([([token], other)])) < TOLERANCE
    assert len(captured) == captures


@torch.inference_mode()
def test_a_token_that_does_not_exist_is_refused_and_leaves_no_trace(llama):
    _, runner = llama
    runner.use(rw.scaling.parse("none"), None)
    cache = cached(runner, TEXT[:50])
    with pytest.raises(DataError):
        runner.forward([3, 10**6], cache, 1)
    assert difference(in_chunks(runner, [5], IDS[:, 50:], cache), in_chunks(runner, [1000])[50:]) < TOLERANCE


def test_a_model_that_computes_something_else_is_refused():
    hf = DECODERS["llama"]()
    hf.model.layers[1].mlp.register_forward_hook(lambda _module, _args, out: out * 1.01)
    with pytest.raises(UnsupportedModel, match="differ by"):
        on_gpu(hf)


@torch.inference_mode()
def test_an_upload_of_inference_mode_is_replaced_outside_of_it():
    inputs = step._Inputs(1, 1, torch.device("cpu"))
    with torch.inference_mode(False):
        inputs.fill(range(6), [7], [8], [9])
    assert (inputs.slots, inputs.ids, inputs.positions) == (7, 8, 9)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_what_the_kernels_read_of_an_upload_is_aligned(tokens):
    """Triton compiles a kernel once more for a pointer that is no multiple of 16 bytes."""
    inputs = step._Inputs(tokens, 3, torch.device("cpu"))
    start = inputs._device.data_ptr()
    assert {(each.data_ptr() - start) % 16 for each in (*inputs.addresses, inputs.slots)} == {0}
    inputs.fill(range(18 * tokens), *(range(n * tokens, (n + 1) * tokens) for n in (100, 200, 300)))
    assert inputs.addresses.flatten().tolist() == list(range(18 * tokens))
    assert [int(each[0]) // tokens for each in (inputs.slots, inputs.ids, inputs.positions)] == [100, 200, 300]


class Launches(TorchDispatchMode):
    """Counts operations on tensors that are no views, which a GPU would start. Those inside an `Ops` do not count."""

    def __init__(self):
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        self.count += not (self.inside or returns_view or "empty" in func._schema.name)
        return func(*args, **(kwargs or {}))


class CountedOps:
    """`TorchOps` that counts the kernels of `TritonOps`."""

    def __init__(self, launches):
        self._launches = launches

    def __getattr__(self, name):
        def run(*args):
            self._launches.count += {"attention": 2}.get(name, 1)
            self._launches.inside = True
            result = getattr(TorchOps(), name)(*args)
            self._launches.inside = False
            return result

        return run


@pytest.mark.parametrize(
    ("spec", "once"), [("none", 17), ("yarn:4|logn", 23), ("rerope:20|logn", 48), ("dual-chunk", 59)]
)
@torch.inference_mode()
def test_the_launches_of_a_step(spec, once):
    """Ten a layer. The others are the angles and borders of bands, the embedding and the output layer."""
    hf, launches, counts = in_bfloat16(DECODERS["mistral-wide"]()), Launches(), []
    for layers in (3, 2):
        hf.model.layers = hf.model.layers[:layers]
        runner = GpuRunner(hf, rotary_sites(hf), CountedOps(launches))
        runner.use(rw.scaling.parse(spec), LENGTH)
        cache = cached(runner, TEXT[:70])
        runner.step([([1], cache)])  # makes the tables of shifts
        launches.count = 0
        with launches:
            runner.step([([2], cache)])
        counts.append(launches.count)
    assert counts[0] - counts[1] == 10
    assert counts[1] - 20 == once


def test_the_uploads_of_a_step(llama, monkeypatch):
    """One copy to the device for each step, and none back."""
    _, runner = llama
    runner.use(rw.scaling.parse("rerope:20|logn"), LENGTH)
    cache, fills = cached(runner, TEXT[:60]), []
    fill = step._Inputs.fill
    monkeypatch.setattr(step._Inputs, "fill", lambda self, *parts: fills.append(1) or fill(self, *parts))
    runner.step([([3], cache)])
    assert len(fills) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_the_host_does_not_read_the_angles_of_a_step(llama, spec):
    """Tensors without data have no number to read, and do not mix with those of another device."""
    _, runner = llama
    runner.use(rw.scaling.parse(spec), LENGTH)
    for rotation in runner._rotations:
        angles = StepAngles(rotation, 0.25, torch.device("meta"), exact=False)
        angles.reserve(100)
        bands, keys = angles.at(torch.empty(3, dtype=torch.int64, device="meta"))
        tables = [table for table in bands.shifts if table is not None]
        assert all(tensor.is_meta for tensor in (bands.queries, bands.edges, bands.scales, keys, *tables))


@pytest.mark.parametrize("spec", ["none", "rerope:20|logn", "yarn:4|self-extend:4,window=20"])
def test_bfloat16_is_as_near_to_float64_as_transformers_in_bfloat16(spec):
    hf = in_bfloat16(DECODERS["llama"]())
    exact, runner = on_gpu(copy.deepcopy(hf).double()), on_gpu(hf)
    for each in (exact, runner):
        each.use(rw.scaling.parse(spec), LENGTH)
    expected = in_chunks(exact, [1000])
    with under(runner, hf, spec, LENGTH):
        theirs = difference(read(hf), expected)
    for sizes in ([1000], [20, 1, 3]):
        assert difference(in_chunks(runner, sizes), expected) < 1.5 * theirs


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_int8_weights_are_those_of_the_engine_on_the_cpu(name):
    """Also with a cache in float32, so that nothing else is rounded."""
    runner = on_gpu(DECODERS[name](), weights="int8", cache="float32")
    expected = in_chunks(compiled(DECODERS[name](), weights="int8", cache="float32"), [1000])
    for sizes in ([1000], [1]):
        assert difference(in_chunks(runner, sizes), expected) < TOLERANCE
    assert runner.precision == "int8, float32 cache"
    assert difference(expected, read(DECODERS[name]())) > 100 * TOLERANCE


@pytest.mark.parametrize("spec", ["none", "rerope:20|logn"])
def test_a_skim_is_that_of_the_engine_on_the_cpu(llama, spec):
    hf, runner = llama
    sample = Sample.of(LENGTH, local=60, far=20, stretch=10)
    logits = []
    for each in (runner, compiled(hf)):
        each.use(rw.scaling.parse(spec), LENGTH)
        logits.append(each.skim([TEXT[place] for place in sample.positions.tolist()], sample, 60))
    assert difference(*logits) < TOLERANCE


@pytest.fixture
def on_cuda(monkeypatch):
    """A small model that says that it is on a GPU, and what becomes its runner there."""
    hf = DECODERS["llama"]()
    monkeypatch.setattr(type(hf), "device", torch.device("cuda:0"), raising=False)
    monkeypatch.setattr(choose, "GpuRunner", lambda hf, sites, ops, *options: options)
    monkeypatch.setattr(choose, "KERNELS_UNAVAILABLE", None)
    module = types.ModuleType("ropewalk.engine.runners.gpu.kernels.ops")
    module.TritonOps, module.KernelError = TorchOps, type("OutOfResources", (Exception,), {})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return hf


def test_a_model_on_a_gpu_gets_the_engine(on_cuda):
    sites = rotary_sites(on_cuda)
    assert choose.choose_runner(on_cuda, sites, RunnerOptions()) == ("own", "auto", step.capture)
    assert choose.choose_runner(on_cuda, sites, RunnerOptions(weights="int8", cache="int8")) == (
        "int8",
        "int8",
        step.capture,
    )
    assert type(choose.choose_runner(on_cuda, sites, RunnerOptions(compile=False))) is TransformersRunner


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (RunnerOptions(precision="float32"), "a precision of its own"),
        (RunnerOptions(folder=Path()), "a cache in files"),
        (RunnerOptions(compile=True), "no Triton"),
    ],
)
def test_what_the_engine_on_a_gpu_does_not_have_is_refused(on_cuda, monkeypatch, options, reason):
    if reason == "no Triton":
        monkeypatch.setattr(choose, "KERNELS_UNAVAILABLE", reason)
    with pytest.raises(UnsupportedModel, match=reason):
        choose.choose_runner(on_cuda, rotary_sites(on_cuda), options)


def test_a_gpu_without_the_engine_is_told_of_it(on_cuda, monkeypatch):
    monkeypatch.setattr(choose, "KERNELS_UNAVAILABLE", "no Triton")
    with pytest.warns(RopewalkWarning, match="slower: no Triton; compile=False uses them without"):
        runner = choose.choose_runner(on_cuda, rotary_sites(on_cuda), RunnerOptions())
    assert "no Triton" in runner.how


@pytest.mark.parametrize("kind", ["Python's", "Triton's"])
def test_kernels_that_do_not_run_are_told_of(kind, on_cuda, monkeypatch):
    def fails(*_):
        raise error

    error = RuntimeError("Failed to find C compiler.\nSet CC.")
    if kind == "Triton's":
        error = sys.modules["ropewalk.engine.runners.gpu.kernels.ops"].KernelError("out of resource: no C compiler.")
    monkeypatch.setattr(choose, "GpuRunner", fails)
    with pytest.warns(RopewalkWarning, match=r"do not run here \(\w+: .*C compiler\.\); compile=False"):
        assert type(choose.choose_runner(on_cuda, rotary_sites(on_cuda), RunnerOptions())) is TransformersRunner
    with pytest.raises(UnsupportedModel, match="C compiler"):
        choose.choose_runner(on_cuda, rotary_sites(on_cuda), RunnerOptions(compile=True))

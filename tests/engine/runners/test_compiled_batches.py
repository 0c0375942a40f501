"""Batches, trees and caches of the compiled kernels: rows are independent, and dropped tokens leave no trace."""

import copy

import pytest
import torch
from decoders import DECODERS, IDS, compiled, difference, in_chunks

import ropewalk as rw
from ropewalk.engine.cache import rewind
from ropewalk.errors import DataError

pytestmark = [
    pytest.mark.usefixtures("freed_memory_is_overwritten"),
    pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning"),
]
LENGTH = 100  # models are trained at 64
TEXT = IDS[0, :LENGTH].tolist()
SPECS = [
    "none",
    "yarn:4|logn",
    "dynamic-ntk",
    "rerope:20|logn",
    "self-extend:4,window=20",
    "dpe:4/2,window=20",
    "dual-chunk",
    "jet-long:20",
    "sink-window:30",
    "yarn:4@0|rerope:20@1|dynamic-ntk@2",
]
CASES = [("llama", spec) for spec in SPECS] + [
    (name, spec)
    for name in ("gemma2", "gemma3_text", "smollm3-windows", "mistral")
    for spec in ("none", "leaky-rerope:30,k=4|logn")
    if (name, spec) != ("mistral", "leaky-rerope:30,k=4|logn")  # all its layers are windows
]
PATHS = [(5,), (9,), (5, 7), (5, 8), (9, 7), (5, 7, 1), (9, 7, 3), (5, 7, 1, 4)]


@pytest.fixture(scope="module")
def runners():
    return {name: compiled(DECODERS[name]()) for name in {name for name, _ in CASES}}


@pytest.fixture(params=CASES, ids=[f"{name}-{spec}" for name, spec in CASES])
def runner(request, runners):
    name, spec = request.param
    runners[name].use(rw.scaling.parse(spec), LENGTH)
    return runners[name]


def cached(runner, text, chunk=1000):
    """A cache with a text."""
    cache = runner.new_cache(3)
    if text:
        in_chunks(runner, [chunk], torch.tensor([text]), cache)
    return cache


def last(runner, text, chunk=1000):
    """The logits after a text that is read into a new cache."""
    return in_chunks(runner, [chunk], torch.tensor([text]))[-1]


@torch.inference_mode()
def test_a_row_of_a_batch_has_the_bits_of_the_row_alone(runner):
    lengths, counts = (60, 1, 0, 90, 23, 64, 65), (1, 3, 5, 2, 1, 1, 17)
    rows = [(TEXT[n : n + count], cached(runner, TEXT[:n])) for n, count in zip(lengths, counts, strict=True)]
    alone = [runner.step([row])[0] for row in [(ids, cache.fork()) for ids, cache in rows]]
    together = runner.step([(ids, cache.fork()) for ids, cache in rows])
    backwards = runner.step([(ids, cache.fork()) for ids, cache in rows[::-1]])
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(backwards.flip(0), together)
    for (ids, _), n, logits in zip(rows, lengths, together, strict=True):
        assert difference(logits, last(runner, TEXT[:n] + ids)) < 5e-5


@torch.inference_mode()
def test_a_batch_continues_as_each_row_alone(runner):
    lengths = (60, 7, 85)
    rows = [cached(runner, TEXT[:n]) for n in lengths]
    others = copy.deepcopy(rows)
    for k in range(10):
        together = runner.step([(TEXT[n + k : n + k + 1], cache) for n, cache in zip(lengths, rows, strict=True)])
        for n, cache, logits in zip(lengths, others, together, strict=True):
            assert torch.equal(runner.forward(TEXT[n + k : n + k + 1], cache, 1)[0], logits)


@pytest.mark.parametrize("held", [0, 22, 70])
@torch.inference_mode()
def test_a_tree_is_each_of_its_paths_and_leaves_the_cache_as_it_was(runner, held):
    cache = cached(runner, TEXT[:held])
    before = copy.deepcopy(cache)
    logits = runner.tree(PATHS, cache)
    for path, row in zip(PATHS, logits, strict=True):
        assert difference(row, last(runner, [*TEXT[:held], *path])) < 5e-5
    assert cache.length == held
    following = IDS[:, held : held + 20]
    for sizes in ([4], [20]):
        expected = in_chunks(runner, sizes, following, copy.deepcopy(before))
        assert torch.equal(in_chunks(runner, sizes, following, copy.deepcopy(cache)), expected)


@pytest.mark.parametrize("chunk", [5, 30])
@torch.inference_mode()
def test_a_rewound_cache_equals_the_text_run_again(runner, chunk):
    expected = in_chunks(runner, [1000], IDS[:, :LENGTH])
    cache = cached(runner, TEXT[::-1][:20], chunk)
    rewind(cache, 20)
    in_chunks(runner, [chunk], IDS[:, :80], cache)
    fork = copy.deepcopy(cache)
    in_chunks(runner, [chunk], IDS.flip(1)[:, :40], cache)
    rewind(cache, 65)
    assert difference(in_chunks(runner, [chunk], IDS[:, 55:LENGTH], cache), expected[55:]) < 5e-5
    assert difference(in_chunks(runner, [chunk], IDS[:, 80:LENGTH], fork), expected[80:]) < 5e-5


@torch.inference_mode()
def test_nothing_depends_on_earlier_calls(runner):
    before = in_chunks(runner, [30, 7])
    cached(runner, TEXT[::-1], 9)
    scaler, length = runner.rope_state
    runner.use(rw.scaling.parse("yarn:8|rerope:9"), 3)
    cached(runner, TEXT[:50], 9)
    runner.use(scaler, length)
    assert torch.equal(in_chunks(runner, [30, 7]), before)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
@torch.inference_mode()
def test_a_step_that_failed_leaves_no_trace(runner, monkeypatch, error):
    cache = cached(runner, TEXT[:50], 20)
    if error is KeyboardInterrupt:
        monkeypatch.setattr("ropewalk.engine.runners.cpu.kernels.step", interrupted)
    with pytest.raises(error):
        runner.forward([3, 10**6] if error is DataError else [3, 4], cache, 1)
    monkeypatch.undo()
    for sizes in ([20], [5]):
        logits = in_chunks(runner, sizes, IDS[:, 50:LENGTH], copy.deepcopy(cache))
        assert difference(logits, in_chunks(runner, [1000], IDS[:, :LENGTH])[50:]) < 5e-5


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    "specs",
    [
        ("rerope:20", "self-extend:4,window=30|logn"),
        ("dual-chunk", "jet-long:20"),
        ("yarn:4|leaky-rerope:20,k=4", "rerope:30"),
        ("none", "yarn:2|self-extend:4,window=20"),
        ("dynamic-yarn|dual-chunk", "yarn:4"),
        ("sink-window:30", "string:20,window=4"),
    ],
    ids=" ".join,
)
@torch.inference_mode()
def test_a_cache_can_be_used_under_another_scaler(specs, kind):
    """The model has one layer, because higher layers keep what they read under the old map."""
    hf = DECODERS["llama"]()
    hf.model.layers = hf.model.layers[:1]
    runner = compiled(hf, cache=kind)
    old, new = (rw.scaling.parse(spec) for spec in specs)
    runner.use(new, LENGTH)
    expected = in_chunks(runner, [1000], IDS[:, :LENGTH])[60:]
    for sizes in ([1], [30]):
        runner.use(old, LENGTH)
        cache = cached(runner, TEXT[:60], 7)
        before = runner.rope_state
        runner.use(new, LENGTH)
        assert runner.rotate_cached_keys(cache, before)
        tolerance = 5e-5 if kind == "float32" else 0.1
        assert difference(in_chunks(runner, sizes, IDS[:, 60:LENGTH], cache), expected) < tolerance


@pytest.mark.parametrize("spec", ["jet-long:20", "dynamic-ntk|self-extend:2,window=20", "dynamic-yarn"])
@torch.inference_mode()
def test_a_cache_can_be_used_at_another_length(spec):
    hf = DECODERS["llama"]()
    hf.model.layers = hf.model.layers[:1]
    runner = compiled(hf)
    scaler = rw.scaling.parse(spec)
    runner.use(scaler, 300)
    expected = in_chunks(runner, [1000], IDS[:, :LENGTH])[60:]
    runner.use(scaler, 60)
    cache = cached(runner, TEXT[:60], 7)
    runner.use(scaler, 300)
    assert difference(in_chunks(runner, [30], IDS[:, 60:LENGTH], copy.deepcopy(cache)), expected) > 0.1
    runner.rotate_cached_keys(cache, (scaler, 60))
    assert difference(in_chunks(runner, [30], IDS[:, 60:LENGTH], cache), expected) < 5e-5

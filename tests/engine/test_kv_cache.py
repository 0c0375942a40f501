"""The cache of the compiled kernels: forks, growth, int8 rows, and memory-mapped files."""

import copy
import gc
import mmap
import sys
import weakref
from pathlib import Path

import pytest
import torch
from kv_caches import fill, rows, shape, states, unchanged
from live import MORE, TEXT, cache_difference, greedy, prepare

import ropewalk as rw
from ropewalk.engine.kv_cache import KVCache
from ropewalk.engine.prefill import prefill

KINDS = [torch.float32, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("dtype", KINDS)
def test_it_stores_what_was_appended_and_grows(dtype):
    cache, whole = KVCache(shape(dtype), 4), KVCache(shape(dtype), 64)
    fill(whole, 40)
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 29), (29, 40)):
        for index, layer in enumerate(cache.layers):
            part = states(40, index)[:, :, start:stop]
            keys, values = layer.update(part, -part)
            assert keys.shape[2] == values.shape[2] == stop
    assert unchanged(cache, rows(whole, 40), 40)
    assert cache.length == cache.get_seq_length() == 40
    assert cache.layers[0].capacity == cache.layers[0].values.shape[2] < 80


@pytest.mark.parametrize("dtype", KINDS)
def test_a_write_moves_the_writer_only(dtype):
    cache = KVCache(shape(dtype), 32)
    fill(cache, 10)
    fork = cache.fork()
    third, before = fork.fork(), rows(cache, 10)
    places = [layer.keys.data_ptr() for layer in cache.layers]

    def moved(other):
        return [layer.keys.data_ptr() not in places for layer in other.layers]

    assert moved(fork) == moved(third) == [False] * 3
    assert (cache.owned, fork.owned) == (0, 0)
    fork.crop(-4)
    fill(fork, 5, seed=9)
    assert (moved(cache), moved(fork), moved(third)) == ([False] * 3, [True] * 3, [False] * 3)
    assert unchanged(cache, before, 10)
    assert unchanged(fork, [part[:, :, :6] for part in before], 6)
    assert (cache.length, fork.length, third.length) == (10, 11, 10)
    assert (cache.owned, fork.owned) == (0, 11)
    third.reserve(1)
    fill(cache, 5, seed=7)  # alone now: in place
    assert (moved(cache), moved(third)) == ([False] * 3, [True] * 3)
    assert unchanged(third, before, 10)
    assert cache.owned == 15


@pytest.mark.parametrize("dtype", KINDS)
def test_the_memory_of_large_buffers_goes_back_when_they_are_freed(monkeypatch, dtype):
    mapped = []

    class Recorded(mmap.mmap):
        def __init__(self, *_, **__):
            mapped.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Recorded)
    sizes = shape(dtype)
    capacity = 2 * 2**20 // (sizes.heads * sizes.dim * dtype.itemsize)
    cache = KVCache(sizes, capacity)
    assert len(mapped) >= 2 * sizes.layers
    fill(cache, 10)
    fork = cache.fork()
    del cache
    gc.collect()
    assert all(part() is not None for part in mapped)
    assert len(KVCache(sizes, 4).layers) == sizes.layers and len(mapped) <= 4 * sizes.layers
    del fork
    gc.collect()
    assert all(part() is None for part in mapped)


def test_a_freed_fork_does_not_share():
    cache = KVCache(shape(), 32)
    fill(cache, 10)
    place = cache.layers[0].keys.data_ptr()
    fork = cache.fork()
    third = fork.fork()
    del fork
    assert (cache.owned, third.owned) == (0, 0)
    del third
    assert cache.owned == 10
    fork = cache.fork()
    del cache
    assert fork.owned == 10
    fill(fork, 5)
    assert fork.layers[0].keys.data_ptr() == place
    third = fork.fork()
    fork.reserve(1)  # has buffers of its own now
    fourth = third.fork()
    del fork
    assert (third.owned, fourth.owned) == (0, 0)


def test_a_copy_of_a_fork_is_its_own():
    cache = KVCache(shape(), 32)
    fill(cache, 10)
    fork, before = cache.fork(), rows(cache, 10)
    fill(copy.deepcopy(fork), 5, seed=3)
    assert unchanged(cache, before, 10)
    assert unchanged(fork, before, 10)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_addresses_are_those_of_the_buffers(dtype):
    """They are read again only where a buffer was replaced, also in forks and copies."""

    def of_buffers(cache):
        return [
            [
                [buffer.data_ptr(), scale.data_ptr() if scale is not None else 0, layer.capacity]
                for buffer, scale in (
                    (layer.keys, getattr(layer, "key_scales", None)),
                    (layer.values, getattr(layer, "value_scales", None)),
                )
            ]
            for layer in cache.layers
        ]

    cache = KVCache(shape(dtype), 16)
    fill(cache, 10)
    first, fork = cache.addresses, cache.fork()
    assert fork.addresses is first
    copied = copy.deepcopy(cache)
    fork.reserve(1)
    for each in (cache, fork, copied):
        assert each.addresses.tolist() == of_buffers(each)
    fill(fork, 30)
    for layer in fork.layers:
        layer.evict(4, 20, 10)
    assert fork.addresses.tolist() == of_buffers(fork)
    held = fork.addresses
    fill(fork, 2)
    assert fork.addresses is held and cache.addresses is first
    assert len({fork.addresses[0, 0, 0], cache.addresses[0, 0, 0], copied.addresses[0, 0, 0]}) == 3


# int8


def test_int8_rows_are_within_half_a_step():
    layer, sizes = KVCache(shape(torch.int8), 64).layers[0], 10.0 ** torch.arange(-6, 4).repeat(4)[:, None]
    x = states(40) * sizes
    x[:, :, 7] = 0
    x[:, 1, 8, 1:] = 0  # one number alone
    keys, values = layer.update(x, 3 * x)
    for rounded, exact in ((keys, x), (values, 3 * x)):
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((rounded - exact).abs() <= step * 0.5001).all()
        largest = exact.abs().amax(-1)
        assert torch.allclose(rounded.abs().amax(-1), largest, rtol=1e-6)
        assert int(layer.keys[:, :, :40].abs().max()) == 127
    assert torch.equal(layer.key_scales[:, :, :40], x.abs().amax(-1) / 127)
    assert torch.equal(layer.value_scales[:, :, :40], (3 * x).abs().amax(-1) / 127)


def test_int8_keys_are_written_again_in_place():
    layer = KVCache(shape(torch.int8), 64).layers[0]
    layer.update(states(20), states(20))
    before = {name: getattr(layer, name).clone() for name in layer.buffers}
    layer.write_keys(5, 4 * states(6, 1))
    assert torch.allclose(layer.key_rows(5, 11), 4 * states(6, 1), atol=0.07)
    for name, old in before.items():
        same = torch.ones(64, dtype=torch.bool)
        same[5:11] = name.startswith("value")
        assert torch.equal(getattr(layer, name)[:, :, same][:, :, :9], old[:, :, same][:, :, :9])


def test_a_token_takes_bytes_per_token():
    for dtype, width in ((torch.float32, 64), (torch.bfloat16, 32), (torch.int8, 16 + 4)):
        cache = KVCache(shape(dtype), 50)
        size = sum(getattr(layer, name).nbytes for layer in cache.layers for name in layer.buffers)
        assert size == 50 * shape(dtype).bytes_per_token == 50 * 3 * 2 * 2 * width


@pytest.fixture(scope="module")
def int8(tiny_folder):
    return rw.load(tiny_folder, kv_dtype="int8", max_length=4096, compile=True)


@torch.inference_mode()
def test_a_step_and_a_chunk_write_the_same_codes(int8):
    ids = int8.vocabulary.encode(TEXT)
    chunk, steps = int8.new_cache(100), int8.new_cache(100)
    int8._runner.forward(ids, chunk, logits_to_keep=1)
    for i in ids:
        int8._runner.forward([i], steps, logits_to_keep=1)
    first, other = chunk.layers[0], steps.layers[0]  # deeper ones read rounded keys in another order
    for name in first.buffers:
        a, b = (getattr(layer, name)[:, :, : len(ids)].float() for layer in (first, other))
        if name.endswith("scales"):
            assert torch.allclose(a, b, rtol=1e-5)
        else:
            assert (a - b).abs().max() <= 1
            assert float((a != b).float().mean()) < 1e-3
    for a, b in zip(chunk.layers, steps.layers, strict=True):
        worst = (a.key_rows(0, len(ids)) - b.key_rows(0, len(ids))).abs().max()
        assert worst < 0.05 * b.key_rows(0, len(ids)).abs().max()


def test_int8_scores_are_close_to_those_of_float32(int8, model):
    ids = model.vocabulary.encode(TEXT * 6)
    rounded, exact = (m.score_ids(ids, cache=m.new_cache(len(ids))) for m in (int8, model))
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).abs().mean()) < 0.02


def test_an_int8_session_is_saved_and_rotated(int8, tmp_path):
    session = int8.session()
    session.append(TEXT * 2)
    session.save(tmp_path / "s")
    loaded = int8.session(tmp_path / "s")
    assert unchanged(loaded._cached.cache, rows(session._cached.cache, session.tokens), session.tokens)
    try:
        int8.rope = "yarn:4"
        for each in (session, loaded):
            each.append("x = 1\n")
        fresh = int8.session()
        fresh.append(TEXT * 2 + "x = 1\n")
        a, b = (cache.layers[0].key_rows(0, fresh.tokens) for cache in (session._cached.cache, fresh._cached.cache))
        assert (a - b).abs().max() < 0.02 * b.abs().max()  # rounded twice
        assert session.generate(MORE, greedy()) == loaded.generate(MORE, greedy())
    finally:
        int8.rope = None


# Files


@pytest.mark.parametrize("spec", ["none", "rerope:16"])
def test_a_cache_in_a_file_gives_the_same_bits_and_leaves_no_file(tiny_folder, model, tmp_path, spec):
    mapped = rw.load(tiny_folder, spec, offload=tmp_path, max_length=4096)
    model.rope = spec
    try:
        params = greedy(12, logprobs=2)
        assert mapped.generate(TEXT * 4 + MORE, params) == model.generate(TEXT * 4 + MORE, params)
        parent, plain = mapped.session(), model.session()
        for session in (parent, plain):
            session.append(TEXT)
        fork = parent.fork()
        for session in (parent, plain):
            session.append(TEXT * 8)  # grows
        assert cache_difference(parent._cached.cache, plain._cached.cache, plain.tokens) == 0
        assert fork.generate(MORE, params).token_ids == model.generate(TEXT + MORE, params).token_ids
        assert list(tmp_path.iterdir()) == []
    finally:
        model.rope = None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("steps", [True, False])
def test_all_keys_under_a_map_lie_in_files(tiny_folder, tmp_path, steps):
    mapped = rw.load(tiny_folder, "rerope:16", offload=tmp_path, max_length=4096)
    prepare(mapped, 100)
    parent, ids = mapped.new_cache(8), mapped.vocabulary.encode(TEXT * 4)[:60]
    forward = mapped._runner.forward
    with torch.inference_mode():
        for part in [[i] for i in ids] if steps else [ids]:
            forward(part, parent, logits_to_keep=1)
        fork = parent.fork()
        forward(ids[:1], fork, logits_to_keep=1)
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/ropewalk-" in line
    ]
    for cache in (parent, fork):
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)


def test_a_folder_that_is_not_there_is_refused(tiny_folder, tmp_path):
    with pytest.raises(rw.ConfigError, match=r"offload .*nowhere is not a folder; make it"):
        rw.load(tiny_folder, offload=tmp_path / "nowhere")


@torch.inference_mode()
def test_keys_of_an_interrupted_step_are_not_read(model):
    """An interrupted step has made room for keys, but not written them."""
    model.rope = "rerope:16"
    try:
        ids = model.vocabulary.encode(TEXT * 2)
        cache, fresh = model.new_cache(200), model.new_cache(200)
        prefill(model._runner, ids[:40], cache)
        model._runner._buffer_addresses([(ids[40:44], cache)])
        for layer in cache.layers:
            layer.keys[:, :, 40:] = 1e3
        continued = prefill(model._runner, ids[40:], cache)
        assert torch.allclose(continued, prefill(model._runner, ids, fresh), atol=1e-3)
    finally:
        model.rope = None

"""Caches that do not fit into memory or on the disk are refused before any work."""

import psutil
import pytest
import torch
from kv_caches import rows, shape, unchanged
from live import TEXT, Memory, counted, greedy

import ropewalk as rw
from ropewalk.engine import kv_cache
from ropewalk.engine.cache import most_held
from ropewalk.engine.kv_cache import CacheShape
from ropewalk.engine.runners.runner import CHUNK


class Disk:
    def __init__(self, free):
        self.free = free


@pytest.fixture
def available(monkeypatch):
    def set_to(count):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(count))
        monkeypatch.setattr(kv_cache.shutil, "disk_usage", lambda folder: Disk(count))

    return set_to


def test_the_refusal_has_the_numbers_and_the_ways_out(available):
    big = CacheShape(layers=30, heads=3, dim=64, dtype=torch.float32)  # 46080 bytes a token
    available(1_000_000_000)
    kv_cache.check_room(big, 21_701)
    with pytest.raises(rw.ContextOverflow) as refused:
        kv_cache.check_room(big, 64 * 1024)
    assert str(refused.value) == (
        "keys and values of 64k tokens take 3.02 GB, more than the 1 GB of memory; load with "
        "kv_dtype='int8' (0.802 GB), "
        "or load with offload=FOLDER, which keeps keys and values in a file there, or take at most 21701 tokens"
    )
    with pytest.raises(rw.ContextOverflow, match=r"1.51 GB.*take at most 21701") as refused:
        kv_cache.check_room(big, 32 * 1024)
    with pytest.raises(rw.ContextOverflow) as refused:  # not even int8 is enough
        kv_cache.check_room(big, 128 * 1024)
    assert "int8" not in str(refused.value)


def test_a_cache_in_a_file_needs_room_on_the_disk(available, tmp_path):
    available(1_000_000)
    small = shape(folder=tmp_path)  # 768 bytes a token
    kv_cache.check_room(small, 1302)
    with pytest.raises(rw.ContextOverflow, match=r"more than the 0.001 GB of free space in .*") as refused:
        kv_cache.check_room(small, 1303)
    assert "offload" not in str(refused.value)
    assert "kv_dtype='int8'" in str(refused.value)


def test_a_cache_on_a_gpu_needs_room_there(available, monkeypatch):
    """What torch's allocator holds in reserve counts as free."""
    available(10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700_000_000, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200_000_000)
    big = CacheShape(layers=30, heads=3, dim=64, dtype=torch.float32, device=torch.device("cuda"))
    kv_cache.check_room(big, 21_701)
    with pytest.raises(rw.ContextOverflow) as refused:
        kv_cache.check_room(big, 64 * 1024)
    assert str(refused.value) == (
        "keys and values of 64k tokens take 3.02 GB, more than the 1 GB of GPU memory; load with "
        "kv_dtype='int8' (0.802 GB), or take at most 21701 tokens"
    )


def test_each_cache_with_eviction_needs_its_own_room(tiny_folder, available):
    runner = rw.load(tiny_folder, "sink-window:64", compile=True)._runner
    tokens = most_held((4, 64)) + CHUNK  # of one cache
    available(8 * tokens * runner.cache_shape.bytes_per_token)
    runner.check_room(*[20_000] * 8)
    runner.check_room(*[20_000] * 9, owned=tokens)
    runner.check_room(10, *[20_000] * 7)
    with pytest.raises(rw.ContextOverflow):
        runner.check_room(*[20_000] * 9)
    with pytest.raises(rw.ContextOverflow):
        runner.check_room(10, *[20_000] * 8)


def test_what_does_not_fit_is_refused_before_any_work(model, available, monkeypatch):
    session = model.session()
    session.append(TEXT * 8)
    before = session.text, list(session._cached.ids), rows(session._cached.cache, session.tokens)
    available(100 * model._runner.cache_shape.bytes_per_token)
    with counted(model, monkeypatch) as counts:
        for refused in (
            lambda: model.generate(TEXT * 8, greedy()),
            lambda: model.generate([TEXT * 8, "x"], greedy()),
            lambda: list(model.stream("x", greedy(100))),
            lambda: session.append(TEXT * 5),
            lambda: session.generate("", greedy(120)),
            lambda: session.fork().generate("", greedy(50)),
        ):
            with pytest.raises(rw.ContextOverflow, match="keys and values of"):
                refused()
    assert counts == []
    assert (session.text, session._cached.ids) == before[:2]
    assert unchanged(session._cached.cache, before[2], session.tokens)


def test_the_cache_of_a_session_is_not_counted_twice(model, available):
    session = model.session()
    session.append(TEXT * 8)
    assert session.tokens > 200
    available(100 * model._runner.cache_shape.bytes_per_token)
    session.append("x = 1\n")
    assert session.generate("y", greedy()).usage.completion_tokens == 6

"""Eviction: keys that no later token sees are dropped, and nothing else changes."""

import pytest
import torch
from decoders import DECODERS, compiled
from live import counted, prepare

import ropewalk as rw
from ropewalk.engine import cache as caches
from ropewalk.engine.cache import CacheLost, most_held, tokens_read
from ropewalk.engine.kv_cache import KVLayer
from ropewalk.engine.prefill import prefill
from ropewalk.engine.runners.runner import CHUNK

SPECS = ("sink-window:64", "sink-window:window=48,sinks=1", "yarn:2|sink-window:96")


@pytest.fixture(params=[True, False], ids=["compiled", "modules"])
def endless(request, tiny_folder):
    return rw.load(tiny_folder, compile=request.param)


@pytest.fixture
def soon(monkeypatch):
    """Caches drop keys early, so that short texts show it."""
    monkeypatch.setattr(caches, "SPARE", 24)
    monkeypatch.setattr(caches, "_STRIDE", 40)


@pytest.fixture
def ids(held_out_texts, endless):
    return endless.tokenizer(max(held_out_texts, key=len)).input_ids[:1500]


def holding_all(model, monkeypatch, work):
    """What `work` gives where nothing is dropped."""
    with monkeypatch.context() as patch:
        patch.setattr(type(model._runner), "sink_window", None)
        return work()


def same(completion, other):
    return (completion.text, completion.token_ids, completion.usage) == (other.text, other.token_ids, other.usage)


@pytest.mark.parametrize("spec", SPECS)
def test_scores_are_those_of_a_cache_that_holds_everything(endless, ids, spec, soon, monkeypatch):
    endless.rope = spec
    cache = endless.new_cache(8)
    actual = endless.score_ids(ids, cache=cache)
    held = cache.get_seq_length()
    assert held < 300 < len(ids) - 1 == tokens_read(cache)
    expected = holding_all(endless, monkeypatch, lambda: endless.score_ids(ids))
    assert actual == pytest.approx(expected, abs=2e-4)


def test_steps_are_those_of_a_cache_that_holds_everything(endless, ids, soon, monkeypatch):
    endless.rope = "sink-window:64"
    prepare(endless, len(ids))
    runner = endless._runner

    def steps():
        cache = endless.new_cache(8)
        runner.forward(ids[:1000], cache, 1)
        rows = [runner.step([([token], cache)]) for token in ids[1000:1200]]
        return torch.cat(rows), cache

    with torch.inference_mode():
        (actual, cache), (expected, whole) = steps(), holding_all(endless, monkeypatch, steps)
    assert cache.get_seq_length() < 200
    assert whole.get_seq_length() == tokens_read(cache) == tokens_read(whole) == 1200
    assert (actual - expected).abs().max() < 3e-4


def test_a_text_written_without_an_end_takes_the_memory_of_its_window(endless, ids, soon, monkeypatch):
    endless.rope = "sink-window:64"
    bound = most_held((4, 64)) + CHUNK
    params = rw.SamplingParams(max_new_tokens=300, temperature=0, continuation="off")
    cache = endless.new_cache(10**9)
    assert cache.layers[0].capacity == bound < 1200  # not a billion
    prompt = ids[:1200]
    actual = endless.generate_ids(prompt, params, cache)
    assert cache.layers[0].capacity == bound
    assert tokens_read(cache) == len(prompt) + len(actual.token_ids) - 1
    assert len(actual.token_ids) == 300
    assert cache.layers[0].evicted > 1000
    assert actual == holding_all(endless, monkeypatch, lambda: endless.generate_ids(prompt, params))


@pytest.mark.parametrize("spec", ["sink-window:64|logn", "dynamic-ntk:2|sink-window:64", "rerope:64", "yarn:2"])
def test_what_asks_for_true_positions_or_old_keys_holds_everything(endless, ids, spec, soon):
    endless.rope = spec
    cache = endless.new_cache(8)
    endless.score_ids(ids[:600], cache=cache)
    assert cache.get_seq_length() == 599


@pytest.mark.parametrize("name", ["smollm3-windows", "mistral-wide"])
def test_windows_of_the_model_hold_everything(name):
    """They hold rotated keys, which cannot move up; layers without rotation can."""
    runner = compiled(DECODERS[name]())
    runner.use(rw.parse("sink-window:16"), None)
    assert runner.sink_window == (None if name == "smollm3-windows" else (4, 16))


def test_going_back_is_exact_or_refused(endless, ids, soon):
    endless.rope = "sink-window:64"
    prepare(endless, len(ids))
    runner, cache = endless._runner, endless.new_cache(8)
    with torch.inference_mode():
        runner.forward(ids[:1000], cache, 1)
        room = cache.layers[0].length - cache.layers[0].needed
        assert room >= 24
        caches.rewind(cache, room)
        actual = runner.forward(ids[1000 - room : 1000], cache, 1)
        again = endless.new_cache(8)
        expected = runner.forward(ids[:1000], again, 1)
        assert (actual - expected).abs().max() < 3e-4
        with pytest.raises(rw.PatchError, match="keys that were dropped"):
            caches.rewind(cache, cache.layers[0].length - cache.layers[0].needed + 1)


def test_sessions_read_again_what_was_dropped(endless, held_out_texts, soon, monkeypatch):
    endless.rope = "sink-window:64"
    text = max(held_out_texts, key=len)[:3000]
    params = rw.SamplingParams(max_new_tokens=8, temperature=0)
    session = endless.session()
    session.append(text)
    fork = session.fork()
    assert same(session.generate("\ndef ", params), endless.generate(text + "\ndef ", params))
    session.crop(1000)
    assert same(session.generate("\ndef ", params), endless.generate(text[:1000] + "\ndef ", params))
    endless.rope = "yarn:8"
    assert fork.generate("\ndef ", params).token_ids  # the keys of another scaler cannot be made of what is left
    assert fork.tokens > 500


def test_going_back_as_far_as_the_keys_that_are_left_reach(tiny_folder, soon):
    """The last token of a prompt is run again, so one key more than the map sees has to be there."""
    model = rw.load(tiny_folder, rope="sink-window:64", compile=True)
    text = "".join(f"x{n} = {n}\n" for n in range(301))
    params = rw.SamplingParams(max_new_tokens=3, temperature=0)
    session = model.session()
    session.append(text)
    layer, ids = session._cached.cache.layers[0], session._cached.ids
    assert layer.evicted
    most = len(model.tokenizer.decode(ids[: len(ids) - layer.length + layer.needed]))
    held = []
    for end in range(most, most + 6):
        fork = session.fork()
        fork.crop(end)
        held.append(fork.tokens)
        assert same(fork.generate("", params), model.generate(text[:end], params))
    assert len(ids) - layer.length + layer.needed in held


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_beginning_shared_as_far_as_the_keys_that_are_left_reach(tiny_folder, soon, more):
    model = rw.load(tiny_folder, rope="sink-window:64", compile=True)
    text = "".join(f"x{n} = {n}\n" for n in range(301))
    params = rw.SamplingParams(max_new_tokens=2, temperature=0, continuation="off")
    ids, cache = model.vocabulary.encode(text), model.new_cache(8)
    model.generate_ids(ids, rw.SamplingParams(max_new_tokens=1), cache)
    layer = cache.layers[0]
    end = len(model.tokenizer.decode(ids[: len(ids) - layer.length + layer.needed + more]))
    prompts = [text, text[:end]]
    for completion, prompt in zip(model.generate(prompts, params), prompts, strict=True):
        assert same(completion, model.generate(prompt, params))


def test_a_session_without_an_end_is_saved(tiny_folder, held_out_texts, soon, tmp_path):
    model = rw.load(tiny_folder, rope="sink-window:64", compile=True)
    text = max(held_out_texts, key=len)[:3000]
    params = rw.SamplingParams(max_new_tokens=8, temperature=0)
    session = model.session()
    session.append(text)
    session.save(tmp_path / "session.safetensors")
    loaded = model.session(tmp_path / "session.safetensors")
    with pytest.MonkeyPatch.context() as monkeypatch, counted(model, monkeypatch) as read:
        actual = loaded.generate("\ndef ", params)
    assert sum(read) < 60
    assert same(actual, session.generate("\ndef ", params))


def test_a_step_broken_off_while_keys_are_dropped_loses_the_cache_only(tiny_folder, held_out_texts, soon, monkeypatch):
    model = rw.load(tiny_folder, rope="sink-window:64", compile=True)
    text = max(held_out_texts, key=len)[:3000]
    params = rw.SamplingParams(max_new_tokens=8, temperature=0)
    expected = model.generate(text + "\ndef ", params)
    session, seen = model.session(), []
    evict = caches.ContiguousLayer.evict

    def interrupted(layer, *args):
        seen.append(layer)
        if len(seen) == 2:
            raise KeyboardInterrupt
        evict(layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(caches.ContiguousLayer, "evict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.append(text)
    assert session.text == ""
    session.append(text)
    assert same(session.generate("\ndef ", params), expected)


def lacking(patch, layer):
    """Memory runs out when the keys of this layer are dropped, once."""
    copied, calls = KVLayer._copied, []

    def fails(self, capacity, first=0, skip=0):
        if skip:
            calls.append(self)
            if len(calls) - 1 == layer:
                raise MemoryError("cannot allocate")
        return copied(self, capacity, first, skip)

    patch.setattr(KVLayer, "_copied", fails)


def test_memory_that_runs_out_while_keys_are_dropped_leaves_a_cache_or_loses_it(tiny_folder, monkeypatch):
    model = rw.load(tiny_folder, rope="sink-window:64", compile=True)
    ids = [1 + 7 * n % 1000 for n in range(1400)]

    def read(layer):
        cache = model.new_cache(8)
        prefill(model._runner, ids[:1200], cache)
        with monkeypatch.context() as patch:
            lacking(patch, layer)
            return prefill(model._runner, ids[1200:], cache)

    with torch.inference_mode():
        expected = read(None)
        assert (read(0) - expected).abs().max() < 3e-4  # nothing was dropped yet: read in halves
        with pytest.raises(CacheLost):
            read(2)

"""What the tests of sessions, batches and caches share: texts, a check of a session's cache, interruptions, counts."""

from contextlib import contextmanager
from weakref import WeakSet

import psutil
import torch

import ropewalk as rw
from ropewalk.engine.batch import Batch, generate_tokens
from ropewalk.engine.kv_cache import KVCache, KVLayer
from ropewalk.engine.prefill import prefill
from ropewalk.engine.runners.cpu.runner import CompiledRunner
from ropewalk.engine.sequence import Sequence

TEXT = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    for name in sorted(names):\n"
MORE = '        if name.startswith("_"):\n            continue\n    return parser.parse_args(argv'


def greedy(tokens=6, **options):
    return rw.SamplingParams(max_new_tokens=tokens, temperature=0, **options)


@torch.inference_mode()
def check_cache(model, session):
    """The session's cache holds what its tokens, read afresh under the scaler in use, leave in one."""
    held, ids = session._cached.cache, session._cached.ids
    if held is None:
        assert ids == []
        return
    assert {layer.get_seq_length() for layer in held.layers} == {len(ids)}
    if ids:
        fresh = model.new_cache(len(ids))
        prefill(model._runner, ids, fresh)
        assert cache_difference(held, fresh, len(ids)) < 1e-4


def cache_difference(cache, other, tokens, layers=None):
    """Largest difference of keys or values, of the largest entry."""
    worst = 0.0
    for a, b in list(zip(cache.layers, other.layers, strict=True))[:layers]:
        for name in ("keys", "values"):
            x, y = (getattr(layer, name)[:, :, :tokens].float() for layer in (a, b))
            worst = max(worst, float((x - y).abs().max() / y.abs().max()))
    return worst


@contextmanager
def counted(model, monkeypatch):
    """A list of the number of tokens of every run of the runner."""
    counts = []
    with monkeypatch.context() as patch:
        for name in ("_decode_step", "_prefill_chunk"):
            original = getattr(model._runner, name)

            def counting(what, *args, original=original, few=name == "_decode_step"):
                counts.append(sum(len(ids) for ids, _ in what) if few else len(what))
                return original(what, *args)

            patch.setattr(model._runner, name, counting)
        yield counts


@contextmanager
def interrupted(monkeypatch, where, after=0, error=KeyboardInterrupt):
    """`error`, once, at the call of `where` that comes after `after` others.

    Args:
        where: "layer" (in the middle of a chunk), "rotated" (some keys are rotated to another scaler), "written" (a
            step has written its rows and not counted them) or "counted" (they are counted, and the logits are lost).
    """
    owner, *names = {
        "layer": (KVLayer, "update"),
        "rotated": (KVLayer, "write_keys"),
        "written": (KVCache, "advance"),
        "counted": (CompiledRunner, "_decode_step", "_prefill_chunk"),
    }[where]
    calls = iter(range(after + 1))

    def failing(original):
        def call(*args, **kwargs):
            result = original(*args, **kwargs) if where == "counted" else None
            if next(calls, None) == after:
                raise error
            return result if where == "counted" else original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(owner, name, failing(getattr(owner, name)))
        yield
        assert next(calls, None) is None, "nothing was interrupted"


class Memory:
    """What psutil says of the machine's memory."""

    def __init__(self, available):
        self.available = available


def limit_memory(monkeypatch, model, total):
    """Simulate a memory of `total` bytes. Caches that are made from now on take of it what is written into them.

    Returns:
        A list with the bytes that were free at every look.
    """
    caches, new, fork, free = WeakSet(), model._runner.new_cache, KVCache.fork, []

    def made(cache):
        caches.add(cache)
        return cache

    def look():
        written = {}  # by buffer, which forks share
        for cache in caches:
            buffer = cache.layers[0].keys.data_ptr()
            written[buffer] = max(written.get(buffer, 0), cache.length)
        free.append(total - sum(written.values()) * model.bytes_per_token)
        return Memory(free[-1])

    step = model._runner.step
    monkeypatch.setattr(model._runner, "new_cache", lambda capacity: made(new(capacity)))
    monkeypatch.setattr(KVCache, "fork", lambda cache: made(fork(cache)))
    monkeypatch.setattr(model._runner, "step", lambda rows: look() and step(rows))
    monkeypatch.setattr(psutil, "virtual_memory", look)
    return free


def prepare(model, length):
    """The scaler in use, ready for sequences of `length` tokens."""
    with model.running(length):
        pass


def written(model, prompt, params):
    """The completion of a prompt that was read already."""
    sequence = Sequence(prompt, model.resolved(params), model.vocabulary, model.stop_ids)
    for _ in generate_tokens(Batch(model, [sequence], sequence.length)):
        pass
    return sequence.completion()

"""Threads that share one model get the same results as alone."""

import contextlib
import threading

import pytest
import torch
from live import TEXT, cache_difference, greedy

import ropewalk as rw
from ropewalk.engine.prefill import prefill

pytestmark = pytest.mark.usefixtures("untouched")


def both(model, first, second):
    """The results of two threads that run at the same time."""
    completions = {}
    barrier = threading.Barrier(2)

    def work(name, prompt):
        barrier.wait()
        completions[name] = [model.generate(prompt, greedy(6)).token_ids for _ in range(3)]

    threads = [threading.Thread(target=work, args=pair) for pair in ((0, first), (1, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return completions[0], completions[1]


@pytest.mark.parametrize("spec", ["none", "yarn:4", "rerope:64|logn"])
def test_two_threads_under_one_scaler(model, spec):
    model.rope = spec
    prompts = [TEXT, TEXT * 6]
    alone = [[model.generate(prompt, greedy(6)).token_ids] * 3 for prompt in prompts]
    assert list(both(model, *prompts)) == alone


def test_a_request_of_another_length_waits(model, monkeypatch):
    """While a scaler is prepared for the length of one request, the request of another thread must wait."""
    model.rope = "dynamic-yarn"
    long = TEXT * 40
    expected = model.generate(long, greedy(2, logprobs=1))
    forward, prepared = model._runner.forward, threading.Event()

    def other():
        model.generate(TEXT, greedy(1))
        prepared.set()

    thread = threading.Thread(target=other)

    def interrupted(ids, cache, logits_to_keep):
        if threading.current_thread() is not thread and not thread.ident:
            thread.start()
            prepared.wait(2)  # times out if the thread has to wait for this request
        return forward(ids, cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(model._runner, "forward", interrupted)
    try:
        completion = model.generate(long, greedy(2, logprobs=1))
    finally:
        thread.join()
    assert [token.logprob for token in completion.logprobs] == [token.logprob for token in expected.logprobs]


class ChangedMeanwhile:
    """A lock. Once, while a thread waits for it, another thread changes the scaler."""

    def __init__(self, model, waits=0):
        self.model, self.lock, self.waits = model, model._lock, waits

    def __enter__(self):
        if not self.lock._is_owned():
            self.waits -= 1
            if self.waits == -1:
                self.model.rope = "linear:8"
        return self.lock.__enter__()

    def __exit__(self, *error):
        return self.lock.__exit__(*error)


@pytest.mark.parametrize("contexts", [None, ["import os", "def f(x)"]])
def test_a_change_of_scaler_while_a_step_waits_is_noticed(model, monkeypatch, contexts):
    stream = model.stream(TEXT, greedy(6), contexts=contexts)
    next(stream)
    monkeypatch.setattr(model, "_lock", ChangedMeanwhile(model))
    with pytest.raises(rw.PatchError, match="changed from none to linear:8"):
        next(stream)


@pytest.mark.parametrize("waits", range(8))
def test_a_change_of_scaler_at_any_time_leaves_sessions_right(model, monkeypatch, waits):
    for work in (
        lambda session: session.append(TEXT),
        lambda session: session.generate(TEXT, greedy(3)),
        lambda session: list(session.stream("x", greedy(3))),
    ):
        model.rope = None
        session = model.session()
        session.append(TEXT)
        with monkeypatch.context() as patch:
            patch.setattr(model, "_lock", ChangedMeanwhile(model, waits))
            with contextlib.suppress(rw.PatchError):
                work(session)
        session.append("")  # rotates the cached keys
        ids, fresh = session._cached.ids, model.new_cache(session.tokens)
        with torch.inference_mode():
            prefill(model._runner, ids, fresh)
        assert cache_difference(session._cached.cache, fresh, len(ids), layers=1) < 1e-4  # of the first layer only


def test_a_scaler_is_tried_out_while_no_request_runs(model, monkeypatch):
    held, use = [], model._runner.use

    def watched(*setting):
        held.append(model._lock._is_owned())
        use(*setting)

    with monkeypatch.context() as patch:
        patch.setattr(model._runner, "use", watched)
        model.rope = "auto"
    assert held
    assert all(held)

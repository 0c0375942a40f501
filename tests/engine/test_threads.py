"""Threads that share one model: each gets what it would get alone."""

import threading

import pytest
from live import TEXT, greedy

pytestmark = pytest.mark.usefixtures("untouched")


def both(model, first, second):
    """What two threads get, each of which runs before the other is done."""
    found = {}
    barrier = threading.Barrier(2)

    def work(name, prompt):
        barrier.wait()
        found[name] = [model.generate(prompt, greedy(6)).token_ids for _ in range(3)]

    threads = [threading.Thread(target=work, args=pair) for pair in ((0, first), (1, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0], found[1]


@pytest.mark.parametrize("spec", ["none", "yarn:4", "rerope:64|logn"])
def test_two_threads_under_one_scaler(model, spec):
    model.rope = spec
    prompts = [TEXT, TEXT * 6]
    alone = [[model.generate(prompt, greedy(6)).token_ids] * 3 for prompt in prompts]
    assert list(both(model, *prompts)) == alone


def test_a_request_of_another_length_does_not_come_between(model, monkeypatch):
    """A scaler that depends on the length is prepared for one request; another thread's must wait until it has run."""
    model.rope = "dynamic-yarn"
    long = TEXT * 40
    expected = model.generate(long, greedy(2, logprobs=1))
    forward, prepared = model.network.forward, threading.Event()

    def other():
        model.generate(TEXT, greedy(1))
        prepared.set()

    thread = threading.Thread(target=other)

    def interrupted(ids, cache, keep):
        if threading.current_thread() is not thread and not thread.ident:
            thread.start()
            prepared.wait(2)  # in vain where it has to wait for us
        return forward(ids, cache, keep=keep)

    monkeypatch.setattr(model.network, "forward", interrupted)
    try:
        found = model.generate(long, greedy(2, logprobs=1))
    finally:
        thread.join()
    assert [one.logprob for one in found.logprobs] == [one.logprob for one in expected.logprobs]

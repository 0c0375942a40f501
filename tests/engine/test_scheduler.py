"""Requests share the model's time and memory, whatever their scalers, and each gets the answer that it gets alone."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
from live import MORE, TEXT, Memory, greedy, limit_memory

import ropewalk as rw
from ropewalk.engine import batch, sequence
from ropewalk.engine.batch import _TURN
from ropewalk.engine.runners.runner import CHUNK
from ropewalk.engine.scheduler import Request, Scheduler
from ropewalk.engine.sequence import Sequence
from ropewalk.errors import OutOfMemory

pytestmark = pytest.mark.usefixtures("untouched")

LONG = TEXT * 50
PATIENCE = 300.0  # seconds; what takes longer never comes


class Asked:
    """A request that notes what it is told.

    Attributes:
        begun, ended: set with the first and the last update.
    """

    def __init__(self, model, prompt, tokens, rope="none", begins=None, **params):
        self.begun, self.ended = threading.Event(), threading.Event()
        self.completion, self._begins = None, begins
        plan = model.plan_for(rope)
        self.sequence = Sequence(
            model.read(prompt, "auto"), model.resolved(greedy(tokens, **params)), model.vocabulary, model.stop_ids
        )
        length = self.sequence.length
        self.request = Request(self.sequence, plan.at(length), length, self._report)

    def _report(self, update):
        if self._begins is not None and not self.begun.is_set():
            self._begins.append(self)
        self.begun.set()
        if update.is_last:
            self.completion = update.completion or update.error
            self.ended.set()


@contextmanager
def scheduling(model, **options):
    scheduler = Scheduler(model, **options)
    try:
        yield scheduler
    finally:
        scheduler.close()


def submit(scheduler, *asked):
    scheduler.submit(*(each.request for each in asked))


def alone(model, prompt, tokens, rope="none"):
    model.rope = rope
    try:
        return model.generate(prompt, greedy(tokens)).token_ids
    finally:
        model.rope = None


@pytest.fixture
def passes(model, monkeypatch):
    """The tokens of every forward pass over a prompt, or "step" for one of sequences in progress, and its seconds on a
    clock of its own: one a token, four a step."""
    log, clock = [], [0.0]
    monkeypatch.setattr(batch, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def timed(name, forward):
        def call(first, *args, **more):
            result = forward(first, *args, **more)
            what, seconds = ("step", 4) if name == "step" else (len(first), len(first))
            clock[0] += seconds
            log.append((what, seconds))
            return result

        return call

    for name in ("forward", "step"):
        monkeypatch.setattr(model._runner, name, timed(name, getattr(model._runner, name)))
    return log


@pytest.mark.parametrize("rope", ["none", "yarn:20"], ids=["same scaler", "another scaler"])
def test_a_long_prompt_leaves_others_their_turn(model, passes, rope):
    expected = alone(model, LONG, 2, rope)
    with scheduling(model) as scheduler:
        short, long = Asked(model, TEXT, 2000), Asked(model, LONG, 2, rope)
        submit(scheduler, short)
        assert short.begun.wait(PATIENCE)
        passes.clear()
        submit(scheduler, long)
        assert long.begun.wait(PATIENCE)
        during = list(passes)
        assert not short.ended.is_set()
        scheduler.cancel(short.request)
        assert long.ended.wait(PATIENCE)
    assert long.completion.token_ids == expected
    reads = [(tokens, seconds) for tokens, seconds in during if tokens != "step"]
    assert len(reads) > 4
    assert max(reads)[0] == _TURN
    steps = sum(seconds for tokens, seconds in during if tokens == "step")
    assert steps > 0.5 * sum(seconds for _, seconds in reads[:-2])


def test_a_prompt_that_is_read_alone_is_read_at_once(model, passes):
    with scheduling(model) as scheduler:
        long = Asked(model, LONG, 2)
        submit(scheduler, long)
        assert long.ended.wait(PATIENCE)
    assert passes[0][0] == CHUNK


def test_a_short_prompt_begins_while_a_long_one_is_read(model):
    """Three scalers: one answer goes on, and the prompts of the two others are read in turn."""
    with scheduling(model) as scheduler:
        going, long, short = Asked(model, TEXT, 3000), Asked(model, LONG, 2, "yarn:20"), Asked(model, "x", 2, "yarn:2")
        submit(scheduler, going)
        assert going.begun.wait(PATIENCE)
        submit(scheduler, long, short)
        assert short.ended.wait(PATIENCE)
        assert not long.begun.is_set()
        scheduler.cancel(going.request, long.request)


@pytest.mark.parametrize("ropes", [["none"] * 4, ["none", "yarn:2", "yarn:3", "none"]], ids=["one scaler", "three"])
def test_rows_are_counted_over_all_scalers(model, monkeypatch, ropes):
    counts, begins, seen = [20, 90, 20, 20], [], []  # the second goes on while the third begins and ends
    expected = [alone(model, TEXT, tokens, rope) for tokens, rope in zip(counts, ropes, strict=True)]
    with scheduling(model, rows=2) as scheduler:
        step = model._runner.step
        monkeypatch.setattr(model._runner, "step", lambda rows: seen.append(scheduler.running) or step(rows))
        asked = [Asked(model, TEXT, *pair, begins) for pair in zip(counts, ropes, strict=True)]
        submit(scheduler, *asked)
        assert all(each.ended.wait(PATIENCE) for each in asked)
    assert [each.completion.token_ids for each in asked] == expected
    assert max(seen) == 2
    assert begins == asked


def test_max_time_holds_while_a_request_waits(model, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with scheduling(model, rows=1) as scheduler:
        going, late, patient = Asked(model, TEXT, 3000), Asked(model, TEXT, 5, max_time=1), Asked(model, TEXT, 5)
        submit(scheduler, going, late, patient)
        assert going.begun.wait(PATIENCE)
        clock[0] = 2.0
        assert late.ended.wait(PATIENCE)
        assert not going.ended.is_set()
        scheduler.cancel(going.request)
        assert patient.ended.wait(PATIENCE)
    assert (late.completion.finish_reason, late.completion.token_ids) == ("time", [])
    assert late.sequence.cache is None
    assert patient.completion.finish_reason == "length"


def test_more_answers_than_the_queue_ever_holds_are_refused(model):
    with scheduling(model, rows=1, waiting=2) as scheduler:
        with pytest.raises(rw.ConfigError, match=r"4 answers at once are more than the 3 that this server takes"):
            submit(scheduler, *(Asked(model, TEXT, 2) for _ in range(4)))
        asked = [Asked(model, TEXT, 2) for _ in range(3)]
        submit(scheduler, *asked)
        assert all(each.ended.wait(PATIENCE) for each in asked)


@pytest.mark.parametrize("ropes", [["none", "none"], ["none", "yarn:2"]], ids=["same scaler", "another scaler"])
def test_a_request_waits_for_the_memory_that_others_will_take(model, monkeypatch, ropes):
    """The prompt is short and the answer long: when the second request comes, the first has not written much."""
    expected = [alone(model, "x", 80, rope) for rope in ropes]
    asked = [Asked(model, "x", 80, rope) for rope in ropes]
    free = limit_memory(monkeypatch, model, int(1.5 * asked[0].sequence.length * model.bytes_per_token))
    with scheduling(model) as scheduler:
        submit(scheduler, *asked)
        assert all(each.ended.wait(PATIENCE) for each in asked)
    assert [each.completion.token_ids for each in asked] == expected
    assert min(free) >= 0


def test_no_request_overtakes_one_that_waits_for_memory(model, monkeypatch):
    begins = []
    first, second, last = (Asked(model, "x", tokens, "none", begins) for tokens in (60, 120, 20))
    large = Asked(model, "x", 200, "yarn:4", begins)
    free = limit_memory(monkeypatch, model, 240 * model.bytes_per_token)
    with scheduling(model, rows=4) as scheduler:
        submit(scheduler, first, second, large)
        deadline = time.monotonic() + PATIENCE
        while scheduler._admission.limit == 4:
            assert time.monotonic() < deadline
        submit(scheduler, last)
        assert all(each.ended.wait(PATIENCE) for each in (first, second, large, last))
    assert begins == [first, second, large, last]
    assert min(free) >= 0


def test_a_request_that_has_no_room_alone_ends_and_the_next_is_answered(model, monkeypatch):
    """Other processes took the memory after the request was submitted."""
    large, small = Asked(model, "x", 200), Asked(model, "x", 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(100 * model.bytes_per_token))
    with scheduling(model) as scheduler:
        submit(scheduler, large, small)
        assert large.ended.wait(PATIENCE) and small.ended.wait(PATIENCE)
        with pytest.raises(rw.ContextOverflow, match="take at most 100 tokens"):
            scheduler.check_room(large.sequence, large.request.scaler)
    assert type(large.completion) is rw.ContextOverflow
    assert small.completion.token_ids == alone(model, "x", 20)


def test_a_lack_of_memory_under_one_scaler_waits_for_another(model, monkeypatch):
    """Reading a prompt under the second scaler does not fit while the first answer goes on."""
    expected = [alone(model, TEXT, 60, rope) for rope in ("none", "yarn:2")]
    forward, failures = model._runner.forward, []
    first, second = Asked(model, TEXT, 60), Asked(model, TEXT, 60, "yarn:2")

    def limited(ids, cache, logits_to_keep):
        if first.begun.is_set() and not first.ended.is_set():
            failures.append(len(ids))
            raise MemoryError("cannot allocate")
        return forward(ids, cache, logits_to_keep=logits_to_keep)

    with scheduling(model, cache_bytes=0) as scheduler:
        submit(scheduler, first)
        assert first.begun.wait(PATIENCE)
        monkeypatch.setattr(model._runner, "forward", limited)
        submit(scheduler, second)
        assert second.ended.wait(PATIENCE)
        assert first.ended.wait(PATIENCE)
    assert [each.completion.token_ids for each in (first, second)] == expected
    assert failures


def test_an_error_at_the_end_of_a_prompt_ends_its_request_alone(model, monkeypatch):
    """It ended every request in progress."""
    good, late, bad = Asked(model, TEXT, 60), Asked(model, MORE, 8), Asked(model, TEXT, 5)
    error = rw.ConfigError("no token is certain")

    def fails(runner):
        raise error

    monkeypatch.setattr(bad.sequence, "first_token", fails)
    with scheduling(model) as scheduler:
        submit(scheduler, good)
        assert good.begun.wait(PATIENCE)
        submit(scheduler, late, bad)
        for each in (good, late, bad):
            assert each.ended.wait(PATIENCE)
    assert bad.completion is error
    assert good.completion.token_ids == alone(model, TEXT, 60)
    assert late.completion.text == model.generate(MORE, greedy(8)).text


def test_the_time_of_reading_is_counted_once_where_memory_runs_out(model, monkeypatch):
    clock, counted, unused = [0.0], [], ["a cache"]

    def forward(*given, **options):
        clock[0] += 1
        if unused:
            raise OutOfMemory("no room")
        return read(*given, **options)

    read = model._runner.forward
    monkeypatch.setattr(model._runner, "forward", forward)
    monkeypatch.setattr(batch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(batch.Admission, "others_wait", property(lambda self: True))
    monkeypatch.setattr(batch.Admission, "count_reading", lambda self, seconds: counted.append(seconds))
    monkeypatch.setattr(batch.Batch, "_free_unused", lambda self: bool(unused and unused.pop()))
    model.generate(TEXT, greedy(1))
    assert len(counted) > 1 and sum(counted) == clock[0]


def test_the_lead_of_reading_is_what_steps_have_not_made_up_for():
    admission = batch.Admission(rows=4)
    admission.count_reading(2.0)
    admission.count_reading(1.5)
    assert admission.lead == 3.5
    admission.count_step(1.0)
    assert admission.lead == 2.5
    admission.count_step(4.0)
    assert admission.lead == 0

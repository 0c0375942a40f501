"""Engines in turn: the order of turns, speeds, ratios within a turn, agreement, the tables and the JSON."""

import io
import json
from collections import deque

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from ropewalk.evals.speed.timing import Spread, as_json, tables, time_engines
from ropewalk.evals.speed.worker import TimedRun


class FakeLane:
    """Takes the seconds that it is told to take, and writes down what it was asked."""

    versions = {}  # noqa: RUF012

    def __init__(self, name, log, *, prefill, decode, logits=(0.0, 1.0, 0.5), dtype="float32"):
        self.name, self.dtype, self.cache_dtype, self._log = name, dtype, f"{dtype} cache", log
        self._seconds = {"prefill": deque(prefill), "decode": deque(decode)}
        self._logits = np.array(logits, dtype=np.float32)

    def _reading(self, what, count):
        chosen = [int(self._logits.argmax())] * count
        return TimedRun(seconds=self._seconds[what].popleft(), chosen=chosen, logits=self._logits)

    def prefill(self, ids):
        self._log.append((self.name, "prefill", list(ids)))
        return self._reading("prefill", 1)

    def decode(self, length, tokens):
        self._log.append((self.name, "decode", length, list(tokens)))
        return self._reading("decode", len(tokens))

    def peak_memory_mb(self):
        return 100.0 if self.dtype == "float32" else None


@pytest.fixture
def contest():
    return contest_on("cpu")


def contest_on(device, first_reads=0):
    """One length of 4 tokens, two turns of prefill and three of decode; first warm-ups that took an age."""
    log = []
    workers = [
        FakeLane(
            "ropewalk float32", log, prefill=[99] * (1 + first_reads) + [2.0, 4.0], decode=[99, 99, 1.0, 2.0, 4.0]
        ),
        FakeLane(
            "llama.cpp q8_0",
            log,
            prefill=[99] * (1 + first_reads) + [1.0, 1.0],
            decode=[99, 99, 2.0, 2.0, 2.0],
            logits=(0.0, 1.0, 1.25),
            dtype="q8_0",
        ),
    ]
    widths = iter([8.0, 10.0, 9.0, 7.0])
    with Progress(console=Console(file=io.StringIO())) as progress:
        outcome = time_engines(
            workers,
            list(range(10, 20)),
            [4],
            new_tokens=2,
            repeats=3,
            prefill_repeats=2,
            device=device,
            bandwidth=lambda: next(widths),
            step_bytes=lambda dtype, cache, length: (
                ({"float32": 3.0, "q8_0": 0.5}[dtype] + {"float32 cache": 1.0, "q8_0 cache": 0.5}[cache]) * length
            ),
            progress=progress,
        )
    return outcome, log


def test_every_turn_runs_every_engine_once(contest):
    names, prompt = ["ropewalk float32", "llama.cpp q8_0"], [10, 11, 12, 13]
    warm_up = [spec for n in names for spec in ((n, "prefill", prompt), (n, "decode", 4, [14, 15]))]
    prefills = [(n, "prefill", prompt) for n in names] * 2
    decodes = [(n, "decode", 4, [14, 15]) for n in names] * 4
    assert contest[1] == warm_up + prefills + decodes


def test_speeds_and_ratios_are_medians_of_turns_without_the_warm_up(contest):
    timings = {(timing.engine, timing.what): timing for timing in contest[0].timings}
    first, other = timings["ropewalk float32", "decode"], timings["llama.cpp q8_0", "decode"]
    assert first.seconds == [1.0, 2.0, 4.0]
    assert first.speed == Spread(median=1.0, lowest=0.5, highest=2.0)
    assert first.ratio == Spread(median=1.0, lowest=1.0, highest=1.0)
    assert other.ratio == Spread(median=1.0, lowest=0.5, highest=2.0)  # its seconds over ours, turn by turn
    prefill = timings["llama.cpp q8_0", "prefill"]
    assert prefill.speed == Spread(median=4.0, lowest=4.0, highest=4.0)
    assert prefill.ratio == Spread(median=0.375, lowest=0.25, highest=0.5)
    assert prefill.memory_share is None


def test_a_gpu_reads_each_prompt_once_more_and_tells_of_its_own_memory(contest):
    result, log = contest_on("cuda", first_reads=1)
    prompts = [entry for entry in log if entry[1] == "prefill"]
    assert len(prompts) == 8 and len([entry for entry in contest[1] if entry[1] == "prefill"]) == 6
    assert [timing.seconds for timing in result.timings if timing.what == "prefill"] == [[2.0, 4.0], [1.0, 1.0]]
    titles = [tables(each, "ropewalk float32")[-1].title for each in (contest[0], result)]
    assert "peak memory: resident" in titles[0] and "peak memory: of the GPU" in titles[1]


def test_the_share_of_memory_is_that_of_the_best_bandwidth(contest):
    assert contest[0].bandwidth == 10.0
    shares = {t.engine: t.memory_share for t in contest[0].timings if t.what == "decode"}
    # at the middle of the decoded tokens, 5, a step reads 20 and 5 bytes; both decode one token a second
    assert shares == pytest.approx({"ropewalk float32": 2.0, "llama.cpp q8_0": 0.5})


def test_next_tokens_and_logits_are_compared_with_the_first(contest):
    first, other = contest[0].agreements
    assert (first.same, first.compared, first.difference, first.peak_memory_mb) == (3, 3, 0.0, 100.0)
    assert (other.same, other.compared, other.difference, other.peak_memory_mb) == (0, 3, 0.75, None)


def test_tables_and_json_tell_the_same(contest):
    outcome, _ = contest
    console = Console(file=io.StringIO(), width=80)
    for table in tables(outcome, "ropewalk float32"):
        console.print(table)
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["4", "llama.cpp", "q8_0", "1.0", "1.0-1.0", "1.00", "0.50-2.00", "50%"] in shown
    assert ["4", "llama.cpp", "q8_0", "4.0", "4.0-4.0", "0.38", "0.25-0.50"] in shown
    assert ["4", "llama.cpp", "q8_0", "0", "of", "3", "0.75", "?"] in shown
    assert ["4", "ropewalk", "float32", "1.0", "0.5-2.0", "200%"] in shown
    printed = json.loads(json.dumps(as_json(outcome, {"model": "tiny"})))
    assert (printed["model"], printed["bandwidth_gb_s"]) == ("tiny", 1e-8)
    assert printed["timings"][-1]["ratio"] == {"median": 1.0, "lowest": 0.5, "highest": 2.0}
    assert printed["agreements"][1]["peak_memory_mb"] is None

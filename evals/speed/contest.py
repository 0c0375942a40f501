"""Engines timed in turn on the same tokens: speeds, ratios within a turn, and whether they are the same model.

Every turn runs every engine once, so that a machine which drifts slows all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from statistics import median
from typing import Literal

import numpy as np
from rich.progress import Progress

from .worker import Reading, Worker

WARM_UP = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The middle and the ends of some numbers."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one number."""
        return Spread(median=median(values), lowest=min(values), highest=max(values))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One engine at one length.

    Args:
        what: "prefill": reading `length` tokens; "decode": reading tokens one by one behind them.
        tokens: read in a turn.
        seconds: of every turn.
        speed: tokens a second.
        ratio: the first engine's speed over this one's, turn by turn: above 1 the first is faster.
        memory_share: of what reading the weights and the cache at full bandwidth would allow; None for a prefill.
    """

    engine: str
    what: Literal["prefill", "decode"]
    length: int
    tokens: int
    seconds: list[float]
    speed: Spread
    ratio: Spread
    memory_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether an engine at one length gives what the first engine gives.

    Args:
        same: next tokens, after the prompt and after every decoded token, that are the first engine's.
        compared: out of how many.
        difference: the largest absolute difference of a logit, after the prompt or after the last decoded token.
        peak_memory_mb: most memory held so far; lengths are run in the order of the list. None: not known.
    """

    engine: str
    length: int
    same: int
    compared: int
    difference: float
    peak_memory_mb: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that a comparison found; `bandwidth` is in bytes a second."""

    timings: list[Timing]
    agreements: list[Agreement]
    bandwidth: float


def compete(
    workers: Sequence[Worker],
    text: list[int],
    lengths: Sequence[int],
    *,
    new_tokens: int,
    repeats: int,
    prefill_repeats: int,
    bandwidth: Callable[[], float],
    step_bytes: Callable[[str, str, float], float],
    progress: Progress,
) -> Outcome:
    """Time all `lanes` at every length; the first is what the others are compared with.

    At every length the prompt is read `prefill_repeats` times, and the state of the last time is what all decode
    turns go on from, after one turn that warms up.

    Args:
        text: token ids, at least the longest length and `new_tokens` more: prompts are its beginnings, and the
            tokens after a prompt are decoded, whatever the engines would have chosen.
        bandwidth: measures what memory gives, bytes a second; called once a turn, and the best counts.
        step_bytes: of a dtype of weights, one of keys and values, and a length: bytes that one decode step reads.
    """
    runs = len(workers) * (1 + len(lengths) * (prefill_repeats + 1 + repeats))
    task = progress.add_task("", total=runs)

    def turn(doing: str, run: Callable[[Worker], Reading]) -> list[Reading]:
        readings = []
        for worker in workers:
            progress.update(task, description=f"{worker.name}: {doing}")
            readings.append(run(worker))
            progress.advance(task)
        return readings

    def warm_up(worker: Worker) -> Reading:
        start = min(WARM_UP, *lengths)
        worker.prefill(text[:start])
        return worker.decode(start, text[start : start + 2])

    turn("warming up", warm_up)
    widths, found = [], []
    for n in sorted(lengths):
        prompt, rest = text[:n], text[n : n + new_tokens]
        prefills = [
            turn(f"reading {n} tokens, turn {i + 1}", methodcaller("prefill", prompt)) for i in range(prefill_repeats)
        ]
        decodes = []
        for i in range(repeats + 1):
            widths.append(bandwidth())
            doing = f"decoding behind {n} tokens, turn {i}" if i else f"decoding behind {n} tokens, warming up"
            decodes.append(turn(doing, methodcaller("decode", n, rest)))
        found.append((n, prefills, decodes[1:], [worker.peak_memory_mb() for worker in workers]))
    progress.remove_task(task)

    best = max(widths)
    timings: list[Timing] = []
    agreements: list[Agreement] = []
    for n, prefills, decodes, peaks in found:
        timings += _timings(workers, "prefill", n, n, prefills)
        shares = [step_bytes(worker.dtype, worker.cache_dtype, n + new_tokens / 2) / best for worker in workers]
        timings += _timings(workers, "decode", n, new_tokens, decodes, shares)
        agreements += _agreements(workers, n, [prefills[-1], decodes[-1]], peaks)
    return Outcome(timings=timings, agreements=agreements, bandwidth=best)


def _timings(
    workers: Sequence[Worker],
    what: Literal["prefill", "decode"],
    length: int,
    tokens: int,
    turns: list[list[Reading]],
    least_seconds: list[float] | None = None,
) -> Iterator[Timing]:
    """`least_seconds`: of a token, for every lane, at full bandwidth."""
    first = [turn[0].seconds for turn in turns]
    for index, worker in enumerate(workers):
        own = [turn[index].seconds for turn in turns]
        speed = Spread.of([tokens / seconds for seconds in own])
        yield Timing(
            engine=worker.name,
            what=what,
            length=length,
            tokens=tokens,
            seconds=own,
            speed=speed,
            ratio=Spread.of([mine / other for mine, other in zip(own, first, strict=True)]),
            memory_share=None if least_seconds is None else least_seconds[index] * speed.median,
        )


def _agreements(
    workers: Sequence[Worker], length: int, stages: list[list[Reading]], peaks: list[float | None]
) -> Iterator[Agreement]:
    for index, worker in enumerate(workers):
        pairs = [(stage[0], stage[index]) for stage in stages]
        chosen = [(a, b) for one, other in pairs for a, b in zip(one.chosen, other.chosen, strict=True)]
        yield Agreement(
            engine=worker.name,
            length=length,
            same=sum(a == b for a, b in chosen),
            compared=len(chosen),
            difference=max(float(np.abs(one.logits - other.logits).max()) for one, other in pairs),
            peak_memory_mb=peaks[index],
        )

"""Engines timed in rounds on the same tokens: speeds, ratios within a round, and agreement of their
logits.

Every round runs every engine once, so that a drift of the machine's speed affects all of them
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import methodcaller
from statistics import median
from typing import Any, Literal

import numpy as np
from rich import box
from rich.progress import Progress
from rich.table import Table

from .worker import TimedRun, Worker

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
        tokens: read in a round.
        seconds: of every round.
        speed: tokens a second.
        ratio: the first engine's speed divided by this one's, round by round: above 1 the first is
            faster.
        memory_share: of what reading the weights and the cache at full bandwidth would allow; None
            for a prefill.
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
        same: next tokens, after the prompt and after every decoded token, that are the first
            engine's.
        compared: out of how many.
        difference: the largest absolute difference of a logit, after the prompt or after the last
            decoded token.
        peak_memory_mb: most memory held so far; lengths are run in the order of the list. None: not
            known.
    """

    engine: str
    length: int
    same: int
    compared: int
    difference: float
    peak_memory_mb: float | None


@dataclass(frozen=True, kw_only=True)
class TimingResult:
    """All that a comparison found; `bandwidth` is in bytes a second."""

    timings: list[Timing]
    agreements: list[Agreement]
    bandwidth: float


def time_engines(
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
) -> TimingResult:
    """Time all `workers` at every length; the first is what the others are compared with.

    At every length the prompt is read `prefill_repeats` times, and the state of the last time is
    what all decode rounds continue from, after one warm-up round.

    Args:
        text: token ids, at least the longest length and `new_tokens` more: prompts are its
            beginnings, and the tokens after a prompt are decoded, whatever the engines would have
            chosen.
        bandwidth: measures what memory gives, bytes a second; called once a round; the best counts.
        step_bytes: of a dtype of weights, one of keys and values, and a length: bytes that one
            decode step reads.
    """
    runs = len(workers) * (1 + len(lengths) * (prefill_repeats + 1 + repeats))
    task = progress.add_task("", total=runs)

    def run_round(doing: str, run: Callable[[Worker], TimedRun]) -> list[TimedRun]:
        timed = []
        for worker in workers:
            progress.update(task, description=f"{worker.name}: {doing}")
            timed.append(run(worker))
            progress.advance(task)
        return timed

    def warm_up(worker: Worker) -> TimedRun:
        start = min(WARM_UP, *lengths)
        worker.prefill(text[:start])
        return worker.decode(start, text[start : start + 2])

    run_round("warming up", warm_up)
    widths, by_length = [], []
    for n in sorted(lengths):
        prompt, rest = text[:n], text[n : n + new_tokens]
        prefills = [
            run_round(f"reading {n} tokens, round {i + 1}", methodcaller("prefill", prompt))
            for i in range(prefill_repeats)
        ]
        decodes = []
        for i in range(repeats + 1):
            widths.append(bandwidth())
            doing = f"decoding behind {n} tokens, round {i}" if i else f"decoding behind {n} tokens, warming up"
            decodes.append(run_round(doing, methodcaller("decode", n, rest)))
        by_length.append((n, prefills, decodes[1:], [worker.peak_memory_mb() for worker in workers]))
    progress.remove_task(task)

    best = max(widths)
    timings: list[Timing] = []
    agreements: list[Agreement] = []
    for n, prefills, decodes, peaks in by_length:
        timings += _timings(workers, "prefill", n, n, prefills)
        shares = [step_bytes(worker.dtype, worker.cache_dtype, n + new_tokens / 2) / best for worker in workers]
        timings += _timings(workers, "decode", n, new_tokens, decodes, shares)
        agreements += _agreements(workers, n, [prefills[-1], decodes[-1]], peaks)
    return TimingResult(timings=timings, agreements=agreements, bandwidth=best)


def _timings(
    workers: Sequence[Worker],
    what: Literal["prefill", "decode"],
    length: int,
    tokens: int,
    rounds: list[list[TimedRun]],
    least_seconds: list[float] | None = None,
) -> Iterator[Timing]:
    """`least_seconds`: of a token, for every worker, at full bandwidth."""
    first = [timed[0].seconds for timed in rounds]
    for index, worker in enumerate(workers):
        seconds_each = [timed[index].seconds for timed in rounds]
        speed = Spread.of([tokens / seconds for seconds in seconds_each])
        yield Timing(
            engine=worker.name,
            what=what,
            length=length,
            tokens=tokens,
            seconds=seconds_each,
            speed=speed,
            ratio=Spread.of([mine / other for mine, other in zip(seconds_each, first, strict=True)]),
            memory_share=None if least_seconds is None else least_seconds[index] * speed.median,
        )


def _agreements(
    workers: Sequence[Worker], length: int, stages: list[list[TimedRun]], peaks: list[float | None]
) -> Iterator[Agreement]:
    for index, worker in enumerate(workers):
        pairs = [(stage[0], stage[index]) for stage in stages]
        chosen = [(a, b) for first, other in pairs for a, b in zip(first.chosen, other.chosen, strict=True)]
        yield Agreement(
            engine=worker.name,
            length=length,
            same=sum(a == b for a, b in chosen),
            compared=len(chosen),
            difference=max(float(np.abs(first.logits - other.logits).max()) for first, other in pairs),
            peak_memory_mb=peaks[index],
        )


def tables(result: TimingResult, first: str) -> list[Table]:
    """Decode and prefill speeds, and what shows that the engines ran the same model.

    Args:
        first: the name of the engine that the others are compared with.
    """
    return [_speeds(result, "decode", first), _speeds(result, "prefill", first), _checks(result, first)]


def as_json(result: TimingResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, `about` first, for one line of JSON."""
    return {
        **about,
        "bandwidth_gb_s": result.bandwidth / 1e9,
        "timings": [asdict(timing) for timing in result.timings],
        "agreements": [asdict(agreement) for agreement in result.agreements],
    }


def _speeds(result: TimingResult, what: str, first: str) -> Table:
    note = f"ratio: {first} over the engine, of the same round"
    headings = ["median", "range", "ratio", "range"]
    if what == "decode":
        note += f"; memory: of what {result.bandwidth / 1e9:.1f} GB/s would allow"
        headings.append("memory")
    table = _table(f"{what}, tokens a second ({note})", headings)
    for timing in result.timings:
        if timing.what == what:
            table.add_row(*_row(timing, first), end_section=_is_last(result, timing))
    return table


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _row(timing: Timing, first: str) -> list[str]:
    ratio = ("", "") if timing.engine == first else (f"{timing.ratio.median:.2f}", _range(timing.ratio, 2))
    digits = 1 if timing.speed.median < 100 else 0
    cells = [
        str(timing.length),
        timing.engine,
        f"{timing.speed.median:.{digits}f}",
        _range(timing.speed, digits),
        *ratio,
    ]
    return cells if timing.memory_share is None else [*cells, f"{timing.memory_share:.0%}"]


def _range(spread: Spread, digits: int) -> str:
    return f"{spread.lowest:.{digits}f}-{spread.highest:.{digits}f}"


def _is_last(result: TimingResult, timing: Timing) -> bool:
    """Of its kind and length."""
    alike = [other for other in result.timings if (other.what, other.length) == (timing.what, timing.length)]
    return alike[-1] is timing


def _checks(result: TimingResult, first: str) -> Table:
    headings = ["same next token", "logits off by", "peak memory"]
    table = _table(f"the same model as {first}? (peak memory: resident, with libraries and loading)", headings)
    rows = result.agreements
    for index, agreement in enumerate(rows):
        peak = "?" if agreement.peak_memory_mb is None else f"{agreement.peak_memory_mb:.0f} MB"
        check = (
            ("", "")
            if agreement.engine == first
            else (f"{agreement.same} of {agreement.compared}", f"{agreement.difference:.2g}")
        )
        ends = index + 1 == len(rows) or rows[index + 1].length != agreement.length
        table.add_row(str(agreement.length), agreement.engine, *check, peak, end_section=ends)
    return table

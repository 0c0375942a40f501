"""Time several engines in rounds on the same tokens: speeds, ratios within a round, and agreement
of the logits.

Every round runs every engine once. A drift of the machine's speed therefore affects all engines
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
    """Median, minimum and maximum of some numbers."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one number."""
        return Spread(median=median(values), lowest=min(values), highest=max(values))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The times of one engine at one length.

    Args:
        what: "prefill": read `length` tokens; "decode": read tokens one by one after them.
        tokens: tokens per round.
        seconds: of every round.
        speed: tokens per second.
        ratio: the first engine's speed divided by this one's, round by round. Above 1, the first is
            faster.
        memory_share: the speed as a share of what the memory bandwidth allows for reading weights
            and cache; None for prefill.
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
    """Whether an engine computes the same as the first engine, at one length.

    Args:
        same: number of next tokens, after the prompt and after every decoded token, that equal the
            first engine's.
        compared: number of compared tokens.
        difference: largest absolute difference of a logit, after the prompt or after the last
            decoded token.
        peak_memory_mb: peak memory so far. Lengths run in ascending order. None: unknown.
    """

    engine: str
    length: int
    same: int
    compared: int
    difference: float
    peak_memory_mb: float | None


@dataclass(frozen=True, kw_only=True)
class TimingResult:
    """The result of a comparison. `bandwidth` is in bytes per second, `device` "cpu" or "cuda"."""

    timings: list[Timing]
    agreements: list[Agreement]
    bandwidth: float
    device: str


def time_engines(
    workers: Sequence[Worker],
    text: list[int],
    lengths: Sequence[int],
    *,
    new_tokens: int,
    repeats: int,
    prefill_repeats: int,
    device: str,
    bandwidth: Callable[[], float],
    step_bytes: Callable[[str, str, float], float],
    progress: Progress,
) -> TimingResult:
    """Time all `workers` at every length. The first one is the reference of the others.

    At every length the prompt is read `prefill_repeats` times, on a GPU once more before. All decode
    rounds continue from the state after the last time; one warm-up round comes first.

    Args:
        text: token ids, at least the longest length plus `new_tokens`. Prompts are its beginnings.
            The tokens after a prompt are decoded, independent of what the engines would choose.
        device: "cpu", or "cuda", where the first prompt of a length takes longer: libraries choose kernels, and the
            allocator takes memory.
        bandwidth: measures the memory bandwidth, bytes per second. It is called once per round; the
            best value counts.
        step_bytes: the bytes that a decode step reads, from the dtype of the weights, that of the
            cache, and a length.
    """
    first_reads = 0 if device == "cpu" else 1
    runs = len(workers) * (1 + len(lengths) * (first_reads + prefill_repeats + 1 + repeats))
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
            run_round(
                f"reading {n} tokens, round {i}" if i else f"reading {n} tokens, warming up",
                methodcaller("prefill", prompt),
            )
            for i in range(1 - first_reads, prefill_repeats + 1)
        ]
        decodes = []
        for i in range(repeats + 1):
            widths.append(bandwidth())
            doing = f"decoding after {n} tokens, round {i}" if i else f"decoding after {n} tokens, warming up"
            decodes.append(run_round(doing, methodcaller("decode", n, rest)))
        by_length.append((n, prefills[first_reads:], decodes[1:], [worker.peak_memory_mb() for worker in workers]))
    progress.remove_task(task)

    best = max(widths)
    timings: list[Timing] = []
    agreements: list[Agreement] = []
    for n, prefills, decodes, peaks in by_length:
        timings += _timings(workers, "prefill", n, n, prefills)
        shares = [step_bytes(worker.dtype, worker.cache_dtype, n + new_tokens / 2) / best for worker in workers]
        timings += _timings(workers, "decode", n, new_tokens, decodes, shares)
        agreements += _agreements(workers, n, [prefills[-1], decodes[-1]], peaks)
    return TimingResult(timings=timings, agreements=agreements, bandwidth=best, device=device)


def _timings(
    workers: Sequence[Worker],
    what: Literal["prefill", "decode"],
    length: int,
    tokens: int,
    rounds: list[list[TimedRun]],
    least_seconds: list[float] | None = None,
) -> Iterator[Timing]:
    """`least_seconds`: seconds per token at full bandwidth, for every worker."""
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
            ratio=Spread.of([seconds / reference for seconds, reference in zip(seconds_each, first, strict=True)]),
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
    """Decode speeds, prefill speeds, and the check that the engines ran the same model.

    Args:
        first: the name of the reference engine.
    """
    return [_speeds(result, "decode", first), _speeds(result, "prefill", first), _checks(result, first)]


def as_json(result: TimingResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """The result for one line of JSON, with `about` first."""
    return {
        **about,
        "bandwidth_gb_s": result.bandwidth / 1e9,
        "timings": [asdict(timing) for timing in result.timings],
        "agreements": [asdict(agreement) for agreement in result.agreements],
    }


def _speeds(result: TimingResult, what: str, first: str) -> Table:
    note = f"ratio: speed of {first} over that of the engine, in the same round"
    headings = ["median", "range", "ratio", "range"]
    if what == "decode":
        note += f"; memory: share of what {result.bandwidth / 1e9:.1f} GB/s allow"
        headings.append("memory")
    table = _table(f"{what}, tokens per second ({note})", headings)
    for timing in result.timings:
        if timing.what == what:
            table.add_row(*_row(timing, first), end_section=_is_last(result, timing))
    return table


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("engine", overflow="fold")
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
    """True for the last timing of its kind and length."""
    same_kind = [other for other in result.timings if (other.what, other.length) == (timing.what, timing.length)]
    return same_kind[-1] is timing


def _checks(result: TimingResult, first: str) -> Table:
    headings = ["same next token", "logits off by", "peak memory"]
    memory = "resident, with libraries and loading" if result.device == "cpu" else "of the GPU, as torch allocates it"
    table = _table(f"the same model as {first}? (peak memory: {memory})", headings)
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

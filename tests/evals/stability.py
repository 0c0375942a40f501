"""Many requests of every kind in one process, cancelled ones among them: does memory stay where it is?

python tests/evals/stability.py smollm2-135m --requests 200
"""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import psutil

from ropewalk.engine.model import Model
from ropewalk.engine.sampling import SamplingParams
from ropewalk.engine.session import Session
from ropewalk.errors import ConfigError, ContextOverflow, RopewalkError
from ropewalk.evals.data import load_text
from ropewalk.tokenizer_tools.encode import text_ids

READINGS = 16
"""Readings of a run, at least."""

SCALERS = ("none", "yarn:2", "ntk:4|resonance", "dynamic-ntk", "logn", "rerope:128", "yarn:2|self-extend:2,window=128")
"""What the model is put under in turn."""

_MB = 1_000_000
_SESSIONS = 3  # kept open at a time


class Cancelled(Exception):
    """A request that is broken off on purpose."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The process after some requests: seconds since the first, resident memory in MB (10^6 bytes)."""

    requests: int
    seconds: float
    resident_mb: float
    kinds: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What grew between the end of the warm-up and the end.

    Args:
        warm_mb, last_mb: least resident memory of the readings in the second and in the last quarter of the requests,
            MB: what is held at the least, which noise only adds to.
        allowed_mb: growth that is put down to the allocator: 3 % and what the largest cache takes.
    """

    requests: int
    warm_mb: float
    last_mb: float
    allowed_mb: float

    @property
    def stable(self) -> bool:
        """True if memory did not grow."""
        return self.last_mb - self.warm_mb <= self.allowed_mb

    def __str__(self) -> str:
        grown = self.last_mb - self.warm_mb
        return (
            f"{'stable' if self.stable else 'GROWING'}: {self.warm_mb:.0f} MB after the warm-up, {self.last_mb:.0f} MB "
            f"after {self.requests} requests ({grown:+.0f} MB; {self.allowed_mb:.0f} are put down to the allocator)"
        )


class Load:
    """Random requests to one model, the same ones for the same seed.

    Args:
        text: what prompts are cut from.
        longest: tokens of the longest.
    """

    def __init__(self, model: Model, text: str, *, longest: int, seed: int = 0) -> None:
        self.model, self.text, self.longest = model, text, longest
        self.random = random.Random(seed)
        self.sessions: list[Session] = []
        self.kinds: Counter[str] = Counter()
        self._characters = len(text[: 4 * longest]) / max(1, len(text_ids(text[: 4 * longest], model.tokenizer)))

    def request(self) -> None:
        """Serve one more request. Those that are refused or cancelled count too."""
        kinds: list[Callable[[], object]] = [
            self.generate,
            self.together,
            self.score,
            self.open,
            self.append,
            self.go_on,
            self.fork,
            self.crop,
            self.close_stream,
            self.cancel,
            self.rescale,
        ]
        kind = self.random.choice(kinds)
        self.kinds[kind.__name__] += 1
        try:
            kind()
        except ContextOverflow:
            self.kinds["refused"] += 1
        while len(self.sessions) > _SESSIONS or sum(s.tokens for s in self.sessions) > 2 * self.longest:
            self.sessions.pop(0).close()

    def prompt(self, part: float = 1.0) -> str:
        """A piece of the text: 1 to `longest` tokens, each power of two as likely."""
        count = int(part * self._characters * self.longest ** self.random.random()) or 1
        start = self.random.randrange(max(1, len(self.text) - count))
        return self.text[start : start + count]

    def params(self) -> SamplingParams:
        """A short answer, greedy or drawn."""
        return SamplingParams(
            max_new_tokens=self.random.randint(1, 12),
            temperature=self.random.choice((0.0, 1.0)),
            seed=self.random.randrange(1000),
            logprobs=self.random.choice((None, 2)),
        )

    def session(self) -> Session:
        """One of the open sessions, or a new one."""
        if not self.sessions or self.random.random() < 0.2:
            self.sessions.append(self.model.session())
        return self.random.choice(self.sessions)

    def generate(self) -> None:
        self.model.generate(self.prompt(), self.params())

    def together(self) -> None:
        shared = self.prompt(0.3)
        self.model.generate([shared + self.prompt(0.1) for _ in range(self.random.randint(2, 10))], self.params())

    def score(self) -> None:
        self.model.score("x = " + self.prompt(0.5))

    def open(self) -> None:
        self.sessions.append(self.model.session())
        self.sessions[-1].append(self.prompt())

    def append(self) -> None:
        self.session().append(self.prompt(0.3))

    def go_on(self) -> None:
        self.session().generate(self.prompt(0.1), self.params())

    def fork(self) -> None:
        fork = self.session().fork()
        self.sessions.append(fork)
        fork.generate(self.prompt(0.1), self.params())

    def crop(self) -> None:
        session = self.session()
        session.crop(self.random.randint(0, len(session.text)))

    def close_stream(self) -> None:
        """Leave a stream after its first piece, closed or forgotten."""
        stream = self.random.choice((self.model, self.session())).stream(self.prompt(0.3), self.params())
        next(stream, "")

    def cancel(self) -> None:
        """An error in the middle of a request, as Ctrl-C would be."""
        session = self.session()
        try:
            with _cancelled(self.model, self.random.randint(1, 4)):
                session.append(self.prompt(0.5))
                session.generate(self.prompt(0.1), self.params())
        except Cancelled:
            self.kinds["cancelled"] += 1

    def rescale(self) -> None:
        try:
            self.model.rope = self.random.choice(SCALERS)
        except ConfigError:  # an int8 cache has no room for maps
            self.kinds["refused"] += 1


@contextmanager
def _cancelled(model: Model, after: int) -> Iterator[None]:
    """Raise `Cancelled` at the end of the network's call number `after` + 1, if there are as many."""
    with model.running(None) as runner:
        forward, calls = runner.forward, iter(range(after))

    def stops(*args: object, **kwargs: object) -> object:
        found = forward(*args, **kwargs)  # type: ignore[arg-type]
        if next(calls, None) is None:
            raise Cancelled
        return found

    runner.forward = stops  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del runner.forward


def serve(
    model: Model,
    text: str,
    *,
    requests: int,
    longest: int,
    seed: int = 0,
    tell: Callable[[Reading], None] = lambda _: None,
) -> Verdict:
    """Serve random requests and read the resident memory; the first quarter is the warm-up.

    Args:
        text: what prompts are cut from.
        longest: tokens of the longest prompt.
        tell: gets every reading.
    """
    process, load, started = psutil.Process(), Load(model, text, longest=longest, seed=seed), time.monotonic()
    before, readings = model.rope, []
    every = max(1, requests // READINGS)
    try:
        for n in range(1, requests + 1):
            load.request()
            if n % every == 0:
                gc.collect()
                readings.append(process.memory_info().rss / _MB)
                seconds = time.monotonic() - started
                tell(Reading(requests=n, seconds=seconds, resident_mb=readings[-1], kinds=dict(load.kinds)))
    finally:
        model.rope = before
    quarter = len(readings) // 4
    warm = min(readings[quarter : 2 * quarter])
    cache = model.bytes_per_token * longest / _MB if model.is_compiled else 0
    return Verdict(requests=requests, warm_mb=warm, last_mb=min(readings[-quarter:]), allowed_mb=0.03 * warm + cache)


@click.command()
@click.argument("model")
@click.option("--requests", default=200, show_default=True, type=click.IntRange(min=READINGS))
@click.option("--longest", default="4k", show_default=True, help="Tokens of the longest prompt.")
@click.option("--text", default="code", show_default=True, help="As of `ropewalk ppl`.")
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--kv-dtype", default="auto", show_default=True)
def main(model: str, requests: int, longest: str, text: str, seed: int, dtype: str, kv_dtype: str) -> None:
    """Serve random requests in one process and tell whether its memory grows; exit code 1 if it does."""
    from ropewalk.engine.load import load
    from ropewalk.scaling.lengths import parse_length

    def tell(reading: Reading) -> None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(reading.kinds.items()))
        click.echo(
            f"{reading.requests:5} requests {reading.seconds:7.0f} s {reading.resident_mb:7.0f} MB resident  ({kinds})"
        )

    try:
        most = parse_length(longest)
        loaded = load(model, dtype=dtype, kv_dtype=kv_dtype, max_length=8 * most)
        document = load_text(text).documents[0]
        verdict = serve(loaded, document, requests=requests, longest=most, seed=seed, tell=tell)
    except RopewalkError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(verdict))
    raise SystemExit(0 if verdict.stable else 1)


if __name__ == "__main__":
    main()

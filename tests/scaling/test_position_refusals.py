"""Position maps with impossible fields, or on a model that they do not fit, are refused in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from geometries import trained_on

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    DPE,
    DualChunk,
    JetLong,
    LeakyReRoPE,
    ReRoPE,
    Scaler,
    SelfExtend,
    SelfLogistic,
    SinkWindow,
    String,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReRoPE(window=0), "rerope: window 0 must be at least 1"),
        (lambda: LeakyReRoPE(window=0, k=2), "leaky-rerope: window 0 must be at least 1"),
        (lambda: LeakyReRoPE(window=4, k=0.5), "leaky-rerope: k 0.5 must be 1 to 2"),
        (lambda: LeakyReRoPE(window=4, k=float("inf")), "leaky-rerope: k inf must be 1 to 2.* use rerope"),
        (lambda: LeakyReRoPE(window=4, k=float("nan")), "leaky-rerope: k nan must be 1 to 2"),
        (lambda: SelfExtend(group=0, window=4), "self-extend: group 0 must be at least 1"),
        (lambda: SelfExtend(group=4, window=-1), "self-extend: window -1 must be at least 1"),
        (lambda: DPE(groups=(), window=4), "dpe: groups must be sizes of at least 1, joined by '/'"),
        (lambda: DPE(groups=(4, 0), window=4), "dpe: groups must be sizes of at least 1, joined by '/'"),
        (lambda: DPE(groups=(4,), window=0), "dpe: window 0 must be at least 1"),
        (lambda: SelfLogistic(window=0), "self-logistic: window 0 must be at least 1"),
        (lambda: SelfLogistic(window=4, rate=0), "self-logistic: rate 0 must be 0.001 to 10"),
        (lambda: SelfLogistic(window=4, rate=float("nan")), "self-logistic: rate nan must be 0.001 to 10"),
        (lambda: SelfLogistic(window=4, capacity=1), "self-logistic: capacity 1 must be 2 to 1024"),
        (lambda: DualChunk(chunk=0), "dual-chunk: chunk 0 must be at least 1"),
        (lambda: DualChunk(window=0), "dual-chunk: window 0 must be at least 1"),
        (lambda: String(shift=0), "string: shift 0 must be at least 1"),
        (lambda: String(window=0), "string: window 0 must be at least 1"),
        (lambda: JetLong(near=0), "jet-long: near 0 must be at least 1"),
        (lambda: JetLong(step=0), "jet-long: step 0 must be at least 1"),
        (lambda: SinkWindow(window=0), "sink-window: window 0 must be at least 1"),
        (lambda: SinkWindow(window=4, sinks=0), "sink-window: sinks 0 must be at least 1"),
    ],
)
def test_impossible_fields_are_refused(make: Callable[[], Scaler], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


BEYOND = "{}: {} must be below 100, the length that the model reaches without it; 25 to 50 works best"


@pytest.mark.parametrize(
    ("last_good", "first_bad", "message"),
    [
        (ReRoPE(window=99), ReRoPE(window=100), BEYOND.format("rerope", "window 100")),
        (LeakyReRoPE(window=99, k=2), LeakyReRoPE(window=100, k=2), BEYOND.format("leaky-rerope", "window 100")),
        (SelfExtend(group=2, window=99), SelfExtend(group=2, window=100), BEYOND.format("self-extend", "window 100")),
        (DPE(groups=(2,), window=99), DPE(groups=(2,), window=100), BEYOND.format("dpe", "window 100")),
        (
            DPE(groups=(2, 3), window=9),
            DPE(groups=(2, 3, 4), window=9),
            "dpe: 3 groups cannot divide the 4 rotary pairs",
        ),
        (SelfLogistic(window=99), SelfLogistic(window=100), BEYOND.format("self-logistic", "window 100")),
        (JetLong(near=99), JetLong(near=100), BEYOND.format("jet-long", "near 100")),
        (String(shift=99, window=5), String(shift=100, window=5), BEYOND.format("string", "shift 100")),
        (String(window=33), String(window=34), "window 34 must not exceed the shift 33; its authors take L/3 and 128"),
        (String(shift=7, window=7), String(shift=7, window=8), "window 8 must not exceed the shift 7"),
        (
            DualChunk(chunk=99, window=49),
            DualChunk(chunk=100, window=49),
            "chunk 100 and window 49 must satisfy 2 window <= chunk < 100, the length that the model reaches without "
            "it; its authors take 75 and 12",
        ),
        (DualChunk(window=37), DualChunk(window=38), "chunk 75 and window 38 must satisfy 2 window <= chunk"),
        (
            SinkWindow(window=90, sinks=10),
            SinkWindow(window=90, sinks=11),
            "11 sinks and window 90 exceed the trained length 100; take fewer",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(last_good: Scaler, first_bad: Scaler, message: str) -> None:
    last_good.check(trained_on(100))
    with pytest.raises(ConfigError, match=message) as caught:
        first_bad.check(trained_on(100))
    assert str(caught.value).startswith(first_bad.name + ": ")


def test_maps_on_models_that_are_too_short_for_their_defaults() -> None:
    with pytest.raises(ConfigError, match="chunk 5 and window 0 must satisfy"):
        DualChunk().check(trained_on(7))
    with pytest.raises(ConfigError, match="window 128 must not exceed the shift 100"):
        String().check(trained_on(300))
    with pytest.raises(ConfigError, match="near 2048 must be below 2048, the length"):
        JetLong().check(trained_on(2048))

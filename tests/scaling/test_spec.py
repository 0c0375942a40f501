"""Spec strings: every scaler can be written and read again."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    DPE,
    METHODS,
    NTK,
    AlphaRoPE,
    Base,
    BaseBound,
    CoPE,
    CriticalBase,
    DPRoPE,
    DualChunk,
    DynamicNTK,
    DynamicYaRN,
    InfoScale,
    JetLong,
    LeakyReRoPE,
    Linear,
    Llama3,
    LogN,
    LongRoPE,
    MrRoPE,
    NTKByParts,
    NTKFixed,
    NTKMixed,
    ReRoPE,
    Resonance,
    Scaler,
    SelfExtend,
    SelfLogistic,
    SinkWindow,
    StepLog,
    String,
    Temperature,
    YaRN,
    compose,
    parse,
)
from ropewalk.scaling.rope import Composition

factor = st.floats(1, 1e6) | st.integers(1, 1000).map(float)
positive = st.floats(1e-9, 1e9)
betas = st.tuples(st.floats(1e-3, 1e3), st.floats(1.001, 100)).map(
    lambda pair: {"beta_slow": pair[0], "beta_fast": pair[0] * pair[1]}
)
tokens = st.integers(1, 2**40)
numbers = st.lists(positive, min_size=1, max_size=5).map(tuple)


temperatures = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"attention_factor": positive}),
    st.fixed_dictionaries({"mscale": positive, "mscale_all_dim": positive}),
)

SCALERS: dict[str, st.SearchStrategy[Scaler]] = {
    "none": st.just(Scaler()),
    "linear": st.builds(Linear, factor=factor),
    "ntk": st.builds(NTK, factor=factor),
    "ntk-fixed": st.builds(NTKFixed, factor=factor),
    "ntk-mixed": st.builds(NTKMixed, factor=factor, b=st.floats(0, 1)),
    "dynamic-ntk": st.builds(DynamicNTK, factor=factor, step=st.none() | tokens),
    "ntk-by-parts": st.builds(
        lambda s, betas, truncate: NTKByParts(factor=s, truncate=truncate, **betas),
        factor,
        betas,
        st.booleans(),
    ),
    "yarn": st.builds(
        lambda s, betas, truncate, m: YaRN(factor=s, truncate=truncate, **betas, **m),
        factor,
        betas,
        st.booleans(),
        temperatures,
    ),
    "dynamic-yarn": st.builds(
        lambda betas, truncate, step: DynamicYaRN(truncate=truncate, step=step, **betas),
        betas,
        st.booleans(),
        st.none() | tokens,
    ),
    "llama3": st.builds(
        lambda s, low, times: Llama3(factor=s, low_freq_factor=low, high_freq_factor=low * times),
        factor,
        st.floats(1e-3, 1e3),
        st.floats(1.001, 100),
    ),
    "longrope": st.builds(LongRoPE, factor=factor, short=numbers, long=numbers, attention_factor=st.none() | positive),
    "base": st.builds(Base, base=st.floats(1.0001, 1e12)),
    "critical-base": st.builds(CriticalBase, length=tokens),
    "base-bound": st.builds(BaseBound, length=tokens),
    "mrrope": st.builds(
        lambda s, betas, uniform: MrRoPE(factor=s, uniform=uniform, **betas), factor, betas, st.booleans()
    ),
    "alpharope": st.builds(AlphaRoPE, factor=factor),
    "dprope": st.builds(DPRoPE, factor=factor),
    "resonance": st.just(Resonance()),
    "cope": st.just(CoPE()),
    "rerope": st.builds(ReRoPE, window=tokens),
    "leaky-rerope": st.builds(LeakyReRoPE, window=tokens, k=factor),
    "self-extend": st.builds(SelfExtend, group=st.integers(1, 1000), window=tokens),
    "dpe": st.builds(DPE, groups=st.lists(st.integers(1, 500), min_size=1, max_size=9).map(tuple), window=tokens),
    "self-logistic": st.builds(SelfLogistic, window=tokens, rate=st.floats(1e-3, 10), capacity=st.integers(2, 1024)),
    "dual-chunk": st.builds(DualChunk, chunk=st.none() | tokens, window=st.none() | tokens),
    "string": st.builds(String, shift=st.none() | tokens, window=tokens),
    "jet-long": st.builds(JetLong, near=tokens, step=st.none() | tokens),
    "sink-window": st.builds(SinkWindow, window=tokens, sinks=st.integers(1, 1000)),
    "logn": st.builds(LogN, power=st.floats(1e-3, 100)),
    "infoscale": st.builds(InfoScale, dim=st.none() | st.integers(1, 1000)),
    "step-log": st.builds(StepLog, beta=st.floats(1e-6, 1e6), length=st.none() | tokens),
    "temperature": st.builds(Temperature, factor=positive),
}


def test_every_method_has_a_strategy_here() -> None:
    assert set(SCALERS) == set(METHODS)


@pytest.mark.parametrize("name", SCALERS)
@given(data=st.data())
def test_parse_reads_back_what_str_writes(name: str, data: st.DataObject) -> None:
    scaler = data.draw(SCALERS[name])
    again = parse(str(scaler))
    assert again == scaler
    assert type(again) is type(scaler)
    assert str(again) == str(scaler)


@given(host=st.one_of(*(strategy for name, strategy in SCALERS.items() if name not in ("none", "resonance"))))
def test_compositions_read_back(host: Scaler) -> None:
    assert parse(str(host | Resonance())) == host | Resonance()


@pytest.mark.parametrize(
    ("text", "scaler"),
    [
        ("none", Scaler()),
        ("yarn:4", YaRN(factor=4)),
        ("YaRN: 4", YaRN(factor=4)),
        ("yarn:factor=4", YaRN(factor=4)),
        ("yarn:4,truncate=false,beta_fast=16", YaRN(factor=4, truncate=False, beta_fast=16)),
        ("ntk-mixed:factor=8,b=0.75", NTKMixed(factor=8, b=0.75)),
        ("dynamic-ntk", DynamicNTK(factor=1)),
        ("llama3", Llama3(factor=8, low_freq_factor=1, high_freq_factor=4)),
        ("critical-base:128k", CriticalBase(length=131072)),
        ("longrope:2,short=1/1.5,long=2/3", LongRoPE(factor=2, short=(1.0, 1.5), long=(2.0, 3.0))),
        ("none|yarn:4", YaRN(factor=4)),
        (" ntk:4 | resonance ", NTK(factor=4) | Resonance()),
        ("rerope:1k", ReRoPE(window=1024)),
        ("leaky-rerope:512,k=8", LeakyReRoPE(window=512, k=8)),
        ("self-extend:4,window=1k", SelfExtend(group=4, window=1024)),
        ("dual-chunk:window=1k", DualChunk(chunk=None, window=1024)),
        ("string", String(shift=None, window=128)),
        ("jet-long:1k,step=512", JetLong(near=1024, step=512)),
        ("sink-window:1k", SinkWindow(window=1024, sinks=4)),
        ("dynamic-yarn:step=1k", DynamicYaRN(step=1024)),
        ("ntk:4|rerope:512|logn", NTK(factor=4) | ReRoPE(window=512) | LogN()),
    ],
)
def test_spellings(text: str, scaler: Scaler) -> None:
    assert parse(text) == scaler


@pytest.mark.parametrize(
    ("scaler", "text"),
    [
        (Scaler(), "none"),
        (YaRN(factor=4), "yarn:4"),
        (YaRN(factor=4.5, truncate=False), "yarn:4.5,truncate=false"),
        (DynamicYaRN(beta_slow=2), "dynamic-yarn:beta_slow=2"),
        (Llama3(), "llama3"),
        (CriticalBase(length=131072), "critical-base:128k"),
        (LongRoPE(factor=2, short=(1, 1.5), long=(2, 3)), "longrope:2,short=1/1.5,long=2/3"),
        (NTK(factor=4) | Resonance(), "ntk:4|resonance"),
        (SelfExtend(group=4, window=1536), "self-extend:4,window=1.5k"),
        (DualChunk(window=1024), "dual-chunk:window=1k"),
        (JetLong(near=2048), "jet-long"),
        (SinkWindow(window=1024, sinks=8), "sink-window:1k,sinks=8"),
        (DynamicNTK(step=2048), "dynamic-ntk:step=2k"),
        (NTK(factor=4) | ReRoPE(window=512) | LogN(), "ntk:4|rerope:512|logn"),
    ],
)
def test_shortest_spelling(scaler: Scaler, text: str) -> None:
    assert str(scaler) == text


def test_parse_passes_scalers_and_none_through() -> None:
    scaler = YaRN(factor=2)
    assert parse(scaler) is scaler
    assert parse(None) == Scaler()


LENGTH_FIELDS = [
    (name, field.name)
    for name, method in METHODS.items()
    for field in dataclasses.fields(method)
    if field.metadata.get("length")
]


@pytest.mark.parametrize(("name", "field"), LENGTH_FIELDS)
def test_every_length_may_be_a_multiple_of_the_trained_one(name: str, field: str) -> None:
    others = {"self-extend": "group=4,", "dpe": "groups=4/2,", "leaky-rerope": "k=2,"}.get(name, "")
    scaler = parse(f"{name}:{others}{field}=0.5x", trained_length=8192)
    assert scaler == parse(f"{name}:{others}{field}=4096")
    assert getattr(scaler, field) == 4096
    assert parse(str(scaler)) == scaler
    with pytest.raises(ConfigError) as caught:
        parse(f"{name}:{others}{field}=0.5x")
    message = f"{name}: {field}: '0.5x' is a multiple of the trained length, which is not known here"
    assert str(caught.value).startswith(message)


def test_there_are_lengths_in_all_kinds_of_methods() -> None:
    assert {"critical-base", "base-bound", "rerope", "dual-chunk", "dynamic-ntk", "sink-window"} <= {
        *dict(LENGTH_FIELDS)
    }


def test_multiples_in_compositions_and_fields_that_are_not_lengths() -> None:
    scaler = parse("critical-base:4x|dual-chunk:0.75x,window=0.125x", 8192)
    assert scaler == CriticalBase(length=32768) | DualChunk(chunk=6144, window=1024)
    with pytest.raises(ConfigError, match="yarn: factor='2x' is not a number"):
        parse("yarn:2x", 8192)
    with pytest.raises(ConfigError, match=r"rerope: window: length '0.3x' is 2457.6 tokens; it must be a whole number"):
        parse("rerope:0.3x", 8192)


def test_the_trained_length_is_asked_only_for_a_multiple() -> None:
    asked: list[str] = []

    def trained() -> int:
        asked.append("asked")
        return 8192

    assert parse("yarn:4|rerope:512", trained) == parse("yarn:4|rerope:512")
    with pytest.raises(ConfigError, match="unknown scaler 'reropee'"):
        parse("reropee:0.5x", trained)
    assert not asked
    assert parse("rerope:0.5x", trained) == ReRoPE(window=4096)
    assert asked


def test_composition_of_nothing_and_of_one() -> None:
    assert compose() == Scaler()
    assert compose(YaRN(factor=2)) == YaRN(factor=2)
    assert not isinstance(parse("yarn:2"), Composition)

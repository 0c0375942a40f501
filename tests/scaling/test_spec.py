"""Spec strings: everything a scaler holds goes through them, and every mistake is named."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    METHODS,
    NTK,
    AlphaRoPE,
    Base,
    BaseBound,
    CoPE,
    CriticalBase,
    DynamicNTK,
    DynamicYaRN,
    Linear,
    Llama3,
    LongRoPE,
    MrRoPE,
    NTKByParts,
    NTKFixed,
    NTKMixed,
    Resonance,
    Scaler,
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
    "dynamic-ntk": st.builds(DynamicNTK, factor=factor),
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
    "dynamic-yarn": st.builds(lambda betas, truncate: DynamicYaRN(truncate=truncate, **betas), betas, st.booleans()),
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
    "resonance": st.just(Resonance()),
    "cope": st.just(CoPE()),
}


def test_every_frequency_method_has_a_strategy_here() -> None:
    facets = (None, "frequencies", "wavelength grid")
    assert set(SCALERS) == {name for name, method in METHODS.items() if method.facet in facets}


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
    ],
)
def test_shortest_spelling(scaler: Scaler, text: str) -> None:
    assert str(scaler) == text


def test_parse_passes_scalers_and_none_through() -> None:
    scaler = YaRN(factor=2)
    assert parse(scaler) is scaler
    assert parse(None) == Scaler()


MISTAKES = [
    ("yran:4", "unknown scaler 'yran'. Did you mean 'yarn'?"),
    ("", "unknown scaler ''. Known: "),
    ("yarn:4|", "unknown scaler ''. Known: "),
    ("zigzag", "unknown scaler 'zigzag'. Known: alpharope, base, "),
    ("yarn:4,beta_fats=3", "yarn: unknown field 'beta_fats'. Did you mean 'beta_fast'?"),
    ("yarn:four", "yarn: factor='four' is not a number"),
    ("yarn:", "yarn: needs factor, as in 'yarn:factor=4'"),
    ("yarn", "yarn: needs factor, as in 'yarn:factor=4'"),
    ("longrope:4", "longrope: needs short, long, as in 'longrope:factor=4,short=4,long=4'"),
    ("critical-base", "critical-base: needs length, as in 'critical-base:length=32k'"),
    ("yarn:4,factor=8", "yarn: 'factor' is given twice"),
    ("yarn:4,8", "yarn: '8' needs a field name, as in 'yarn:factor=4'"),
    ("resonance:4", "resonance: '4' needs a field name, as in 'resonance' (it has no fields)"),
    ("yarn:4,truncate=maybe", "yarn: truncate='maybe' is not true or false"),
    (
        "critical-base:2x",
        "critical-base: length: '2x' is a multiple of the trained length, which is not known here",
    ),
    ("critical-base:soon", "critical-base: length: 'soon' is not a length"),
    ("longrope:4,short=1/a,long=1/2", "longrope: short='1/a' is not numbers joined by '/'"),
    ("yarn:0.5", "yarn: factor 0.5 must be at least 1"),
    ("linear:0.999", "linear: factor 0.999 must be at least 1"),
    ("dynamic-ntk:0", "dynamic-ntk: factor 0 must be at least 1"),
    ("ntk:inf", "ntk: factor inf must be at least 1"),
    ("ntk:nan", "ntk: factor nan must be at least 1"),
    ("ntk-mixed:4,b=1.5", "ntk-mixed: b 1.5 must be between 0 (linear) and 1 (ntk-fixed)"),
    ("base:1", "base: 1 must be above 1"),
    ("yarn:4,beta_fast=1", "yarn: beta_fast 1 must be above beta_slow 1, and both finite and above 0"),
    ("yarn:4,beta_fast=inf", "yarn: beta_fast inf must be above beta_slow 1, and both finite"),
    ("mrrope:4,beta_slow=-1", "mrrope: beta_fast 32 must be above beta_slow -1"),
    ("yarn:4,attention_factor=0", "yarn: attention_factor 0 must be finite and above 0"),
    ("yarn:4,mscale=1", "yarn: mscale and mscale_all_dim go together; give both or neither"),
    ("yarn:4,mscale=0,mscale_all_dim=1", "yarn: mscale 0 must be finite and above 0"),
    (
        "yarn:4,mscale=1,mscale_all_dim=1,attention_factor=1",
        "yarn: attention_factor and mscale both set m; give one of them",
    ),
    ("llama3:8,high_freq_factor=1", "llama3: high_freq_factor 1 must be above low_freq_factor 1"),
    ("longrope:4,short=1/0,long=1/1", "longrope: short must be finite numbers above 0"),
    ("longrope:4,short=1/1,long=1/nan", "longrope: long must be finite numbers above 0"),
    ("yarn:4|ntk:4", "'yarn' and 'ntk' both set the frequencies; keep one of them"),
    (
        "yarn:4|resonance|resonance",
        "'resonance' and 'resonance' both set the wavelength grid; keep one of them",
    ),
    ("cope|yarn:2", "'cope' and 'yarn' both set the frequencies; keep one of them"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_are_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented_and_a_frozen_value(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    doc = inspect.getdoc(method)
    assert doc is not None
    if method is not Scaler:
        assert any(source.strip() in doc for source in re.split("[;,]| section", method.source)), method.source
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    documented = set(re.findall(r"^\s+(\w+): ", doc, flags=re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(method)}
    assert fields - {"factor"} <= documented
    assert all(field.kw_only for field in dataclasses.fields(method))


def test_infinite_fields_are_refused_at_construction() -> None:
    with pytest.raises(ConfigError):
        Linear(factor=math.inf)
    with pytest.raises(ConfigError):
        YaRN(factor=2, attention_factor=math.inf)


def test_composition_of_nothing_and_of_one() -> None:
    assert compose() == Scaler()
    assert compose(YaRN(factor=2)) == YaRN(factor=2)
    assert not isinstance(parse("yarn:2"), Composition)

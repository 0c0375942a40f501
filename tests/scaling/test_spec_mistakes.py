"""Mistakes in a spec: one line with the value, and with a close name or the missing field."""

from __future__ import annotations

import math

import pytest

from ropewalk.errors import ConfigError
from ropewalk.scaling import Linear, YaRN, parse

MISTAKES = [
    ("yran:4", "unknown scaler 'yran'. Did you mean 'yarn'?"),
    ("", "a scaler is empty; 'none' is the untouched model"),
    ("yarn:4|", "a scaler is empty; 'none' is the untouched model"),
    ("zigzag", "unknown scaler 'zigzag'. Known: alpharope, auto, base, "),
    ("yarn:4,beta_fats=3", "yarn: unknown field 'beta_fats'. Did you mean 'beta_fast'?"),
    ("yarn:four", "yarn: factor='four' is not a number"),
    ("yarn:", "yarn: needs factor, as in 'yarn:4'"),
    ("yarn", "yarn: needs factor, as in 'yarn:4'"),
    ("longrope:4", "longrope: needs short, long, as in 'longrope:4,short=4,long=4'"),
    ("critical-base", "critical-base: needs length, as in 'critical-base:32k'"),
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
    ("ntk:1e300", "ntk: factor 1e+300 must be at least 1 (target length / trained length) and at most 2^63"),
    ("temperature:1e38", "temperature: factor 1e+38 must be above 0 and at most 1e9"),
    ("longrope:4,short=1,long=1,attention_factor=1e10", "longrope: attention_factor 1e+10 must be above 0 and at most"),
    ("ntk-mixed:4,b=1.5", "ntk-mixed: b 1.5 must be between 0 (linear) and 1 (ntk-fixed)"),
    ("base:1", "base: 1 must be above 1"),
    ("yarn:4,beta_fast=1", "yarn: beta_fast 1 must be above beta_slow 1, and both must be within 1e-100 to 1e100"),
    ("yarn:4,beta_fast=inf", "yarn: beta_fast inf must be above beta_slow 1, and both must be"),
    ("mrrope:4,beta_slow=-1", "mrrope: beta_fast 32 must be above beta_slow -1"),
    ("yarn:4,attention_factor=0", "yarn: attention_factor 0 must be above 0 and at most 1e9"),
    ("yarn:4,mscale=1", "yarn: mscale needs mscale_all_dim; give both or neither"),
    ("yarn:4,mscale=0,mscale_all_dim=1", "yarn: mscale 0 must be above 0 and at most 1e9"),
    (
        "yarn:4,mscale=1,mscale_all_dim=1,attention_factor=1",
        "yarn: attention_factor and mscale both set m; give one of them",
    ),
    ("llama3:8,high_freq_factor=1", "llama3: high_freq_factor 1 must be above low_freq_factor 1"),
    ("rerope", "rerope: needs window, as in 'rerope:32k'"),
    ("rerope:2x", "rerope: window: '2x' is a multiple of the trained length, which is not known here"),
    ("leaky-rerope:512", "leaky-rerope: needs k, as in 'leaky-rerope:32k,k=4'"),
    ("self-extend:4,512", "self-extend: '512' needs a field name, as in 'self-extend:group=4,window=32k'"),
    ("self-extend:2.5,window=512", "self-extend: group='2.5' is not a whole number"),
    ("sink-window:1k,sink=4", "sink-window: unknown field 'sink'. Did you mean 'sinks'?"),
    ("cope:2", "cope: '2' needs a field name, as in 'cope' (it has no fields)"),
    ("temperature", "temperature: needs factor, as in 'temperature:4'"),
    ("longrope:4,short=1/0,long=1/1", "longrope: short must be finite numbers above 0"),
    ("longrope:4,short=1/1,long=1/nan", "longrope: long must be finite numbers above 0"),
    ("yarn:4|ntk:4", "'yarn' and 'ntk' both set the frequencies; keep one of them"),
    (
        "yarn:4|resonance|resonance",
        "'resonance' and 'resonance' both set the wavelength grid; keep one of them",
    ),
    ("cope|yarn:2", "'cope' and 'yarn' both set the frequencies; keep one of them"),
    ("rerope:512|logn|dual-chunk", "'rerope' and 'dual-chunk' both set the positions; keep one of them"),
    ("logn|yarn:2|temperature:2", "'logn' and 'temperature' both set the temperature; keep one of them"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_are_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_infinite_fields_are_refused_at_construction() -> None:
    with pytest.raises(ConfigError):
        Linear(factor=math.inf)
    with pytest.raises(ConfigError):
        YaRN(factor=2, attention_factor=math.inf)

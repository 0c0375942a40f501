"""Lengths and scalers as a user writes them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from typing import Any

import torch
from hypothesis import strategies as st
from inputs import text
from parser import Parser

from ropewalk.scaling import METHODS, BaseBound, OnLayers, RopeSpec, parse
from ropewalk.scaling.by_layer import layer_groups
from ropewalk.scaling.lengths import format_length, parse_length

ROPE = RopeSpec(dim=64, base=10_000.0, trained_length=8192)
_EXTREMES = ["1e308", "1e-320", "9" * 19, "9" * 400, "9" * 5000, "0." + "1" * 5000]


def _lengths() -> st.SearchStrategy[str]:
    number = st.from_regex(r"-?[0-9]{0,25}[.]?[0-9]{0,8}(e[0-9]{1,5})?", fullmatch=True)
    written = st.builds(str.__add__, number, st.sampled_from(["", "k", "M", "g", "x", "X", " k", "kk", "ＫB", "\0"]))
    hostile = written | st.sampled_from(_EXTREMES) | text(6) | st.text("0123456789.xkMg٣²", max_size=12)
    return _most(_valid_lengths(), hostile)


def _most(valid: st.SearchStrategy[Any], hostile: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Six in ten inputs that are, or may well be, valid: what stands behind a parser is to be reached too."""
    return st.integers(0, 9).flatmap(lambda n: valid if n < 6 else hostile)


def _valid_lengths(most: int = 10**13) -> st.SearchStrategy[str]:
    """Lengths up to about `most`: whole ones in any unit, and fractions of units that are whole numbers of tokens."""
    units = {
        unit: size for unit, size in {"": 1, "k": 1024, "M": 1024**2, "x": 8192, "G": 1024**3}.items() if size <= most
    }

    def one(unit: str) -> st.SearchStrategy[str]:
        size = units[unit]
        whole = st.integers(1, max(1, most // size)).map(str)
        parts = st.integers(1, max(1, 8 * most // size)).map(lambda eighths: f"{eighths / 8:.3f}".rstrip("0"))
        number = whole if size < 8 else whole | parts.map(lambda shown: shown + "0" * shown.endswith("."))
        spelled = st.sampled_from([unit, unit.lower(), unit.upper(), " " + unit])
        return st.builds("{}{}{}".format, st.sampled_from(["", "", " ", "00"]), number, spelled)

    return st.sampled_from(list(units)).flatmap(one)


def _length(value: str) -> None:
    tokens = parse_length(value, 8192)
    assert parse_length(format_length(tokens)) == tokens


def _numbers(low: float, high: float) -> st.SearchStrategy[str]:
    return st.floats(low, high).map(lambda number: f"{number:.4g}") | st.floats(low, high).map(repr)


def _valid_values() -> dict[str, st.SearchStrategy[str]]:
    """Values that a field of this name may have, alone at least; what a plug-in may have is a number."""
    lists = st.lists(_numbers(1, 64), min_size=ROPE.dim // 2, max_size=ROPE.dim // 2).map("/".join)
    flags = st.sampled_from(["true", "false", "True", "0", "1"])
    return {
        "factor": _numbers(1, 128), "b": _numbers(0, 1), "k": _numbers(1, 1000), "base": _numbers(1.5, 1e9),
        "attention_factor": _numbers(0.1, 4), "mscale": _numbers(0.1, 2), "mscale_all_dim": _numbers(0.1, 2),
        "low_freq_factor": _numbers(0.1, 2), "high_freq_factor": _numbers(2.1, 16), "beta_fast": _numbers(8, 64),
        "beta_slow": _numbers(0.1, 4), "truncate": flags, "uniform": flags, "short": lists, "long": lists,
        "group": st.integers(1, 64).map(str), "sinks": st.integers(0, 16).map(str),
        "length": st.sampled_from(["8k", "8192", "1x", "2x", "1.5x", "12k", "16384"]),  # few: each may be searched
    }  # fmt: skip


def _layers() -> st.SearchStrategy[str]:
    """What stands behind a method: nothing, or its layers."""
    bounds = st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(sorted)
    several = bounds.map(lambda at: "@" + "/".join(f"{a}-{a + (b - a) // 2}" for a, b in itertools.pairwise([*at, 99])))
    return st.sampled_from(["", "", "", "", "", "@3", "@0-9", " @ 10-", "@0-", "@5/6-7", "@9-1", "@"]) | several


def _valid_specs() -> st.SearchStrategy[str]:
    """Methods of different facets with fields and values of their own; a few are refused for how values go together."""
    values, facets = _valid_values(), sorted({method.facet for method in METHODS.values() if method.facet})
    short = _valid_lengths(2048)

    @st.composite
    def one(draw: st.DrawFn, names: list[str]) -> str:
        name = draw(st.sampled_from(names))
        fields = dataclasses.fields(METHODS[name])
        chosen = [f for f in fields if f.default is dataclasses.MISSING or draw(st.integers(0, 2)) == 0]
        items = []
        for field in chosen:
            kind = values.get(field.name, short if field.metadata.get("length") else values["factor"])
            items.append((field, draw(kind if draw(st.integers(0, 15)) else st.sampled_from(_EXTREMES))))
        bare = items[:1] if items and items[0][0] is fields[0] and draw(st.booleans()) else []
        named = [f"{field.name}={value}" for field, value in draw(st.permutations(items[len(bare) :]))]
        joined = draw(st.sampled_from([",", ", "])).join([value for _, value in bare] + named)
        shown = draw(st.sampled_from([name, name, name.upper(), f" {name} "]))
        return (f"{shown}:{joined}" if joined else shown) + draw(_layers())

    @st.composite
    def several(draw: st.DrawFn) -> str:
        kinds = draw(st.lists(st.sampled_from(facets), min_size=2, max_size=4, unique=True))
        return draw(st.sampled_from(["|", " | "])).join(
            draw(one(sorted(name for name, method in METHODS.items() if method.facet == kind))) for kind in kinds
        )

    return one(sorted(METHODS)) | several()


def _specs() -> st.SearchStrategy[str]:
    fields = sorted({name for method in METHODS.values() for name in method.__dataclass_fields__})
    number = st.from_regex(r"-?[0-9]{1,12}[.]?[0-9]{0,4}(e-?[0-9]{1,4})?", fullmatch=True)
    plain = st.sampled_from(["2", "4", "8.5", "1", "64", "512", "1k"])
    value = (
        plain
        | plain
        | number
        | st.sampled_from(
            ["nan", "inf", "-inf", "1/2/3", "0.5x", "8k", "true", "", "1_0", "٣", "1e999", "\0", *_EXTREMES]
        )
    )
    item = value | st.builds("{}={}".format, st.sampled_from(fields), value)
    method = st.builds(
        lambda name, items: name + (":" + ",".join(items) if items else ""),
        st.sampled_from(sorted(METHODS)),
        st.lists(item, max_size=4),
    )
    own = st.sampled_from(sorted(METHODS)).flatmap(
        lambda name: st.lists(
            st.builds("{}={}".format, st.sampled_from([*METHODS[name].__dataclass_fields__, "factor"]), value),
            max_size=3,
        ).map(lambda items: f"{name}:{','.join(items)}")
    )
    noise = text(4) | st.text(string.printable, max_size=20)
    joined = st.lists(own | method | noise, min_size=2, max_size=3).map("|".join)
    damaged = st.builds(
        lambda spec, at, size, new: spec[: at % (len(spec) + 1)] + new + spec[at % (len(spec) + 1) + size :],
        _valid_specs(), st.integers(0, 200), st.integers(0, 3), value | text(2),
    )  # fmt: skip
    return _most(_valid_specs(), damaged | own | method | joined)


def _spec(value: str) -> None:
    scaler = parse(value, 8192)
    assert parse(str(scaler)) == scaler
    methods = [part.scaler if isinstance(part, OnLayers) else part for part in scaler.parts]
    searched = [method.length for method in methods if isinstance(method, BaseBound)]
    if max(searched, default=0) > 2**15:
        return  # a base that is searched exactly takes time by the length, which is no matter of parsing
    for each in layer_groups(scaler):
        each.check(ROPE)
        for length in (None, 100, 16384):
            found = each.frequencies(ROPE, length)
            assert found.inv_freq.isfinite().all() and math.isfinite(found.attention_factor)
            assert each.bands(ROPE, length)
        assert each.logit_factor(torch.tensor([0, 100, 16383]), ROPE).isfinite().all()
        assert each.reach(ROPE) > 0 and each.growing_step(ROPE) > 0


SPECS: dict[str, Parser] = {
    "length": Parser(_lengths, _length, 100),
    "spec": Parser(_specs, _spec, 200),
}

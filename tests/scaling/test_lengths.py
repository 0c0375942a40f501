"""Lengths as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import format_length, parse_length


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("512", 512),
        (512, 512),
        ("8k", 8192),
        ("8K", 8192),
        (" 8 k ", 8192),
        ("1.5k", 1536),
        ("1M", 1024**2),
        ("0.25m", 256 * 1024),
        ("1g", 1024**3),
        ("1", 1),
    ],
)
def test_parse(text: str | int, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize(
    ("text", "trained", "tokens"),
    [("2x", 8192, 16384), ("0.25x", 8192, 2048), ("0.29x", 100, 29), ("1.1X", 10, 11), ("4k", 100, 4096)],
)
def test_multiples_of_the_trained_length(text: str, trained: int, tokens: int) -> None:
    assert parse_length(text, trained_length=trained) == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a length; write 512, 8k"),
        ("long", "'long' is not a length"),
        ("8kb", "'8kb' is not a length"),
        ("-8k", "'-8k' is not a length"),
        ("1e5", "'1e5' is not a length"),
        ("8,192", "'8,192' is not a length"),
        ("2x", "'2x' is a multiple of the trained length, which is not known here; write a number of tokens"),
        ("0", "length '0' is 0 tokens; it must be a whole number of at least 1"),
        ("0.3", "length '0.3' is 0.3 tokens"),
        ("1.3k", "length '1.3k' is 1331.2 tokens"),
    ],
)
def test_errors_name_the_value(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_length(text)


@given(tokens=st.one_of(st.integers(1, 2**21), st.integers(1, 2**50), st.integers(1, 2**36).map(lambda n: n * 256)))
def test_format_is_exact(tokens: int) -> None:
    assert parse_length(format_length(tokens)) == tokens


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (1, "1"),
        (1000, "1000"),
        (1024, "1k"),
        (1280, "1.25k"),
        (3000, "3000"),
        (131072, "128k"),
        (1024**2, "1M"),
        (1792 * 1024, "1.75M"),
        (12_641_536, "12345.25k"),  # seven digits: "%g" would round it
    ],
)
def test_format(tokens: int, text: str) -> None:
    assert format_length(tokens) == text

"""Inputs that no one would write on purpose: mutants of real files, and text with everything that text can hold."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NASTY: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400),
    *(-0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "\0", "\ud800", "é\u0301", "../../x", "none", "1e9", "a" * 5000, [], {}, [[]], {"": None}),
    *([0] * 300, ["a", 1, None], {"type": "x"}, "<|endoftext|>"),
)
"""Values that a field may be given in the place of its own."""

TOKENS = (
    *(
        "import ",
        "x",
        "0",
        " ",
        "\n",
        "\t",
        "\0",
        "\ud800",
        "\udfff",
        "\ufeff",
        "é",
        "e\u0301",
        "中",
        "👍🏽",
        "\u200d",
        "’",
    ),
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<s>",
        "</s>",
        "<0x41>",
        "[INST]",
        "<unk>",
        "▁",
        "\x1b[0m",
        "\u202e",
        "'re",
        "::",
    ),
)
"""Pieces of prompts."""


def text(most: int = 30) -> st.SearchStrategy[str]:
    """Prompts: any characters, lone surrogates too, mixed with what tokenizers treat in a special way."""
    anything = st.text(st.characters(), max_size=8)
    return st.lists(st.sampled_from(TOKENS) | anything, max_size=most).map("".join)


def mutants(*samples: bytes) -> st.SearchStrategy[bytes]:
    """One of `samples` with a few places changed, cut, doubled or joined with another."""
    return st.builds(_mutant, st.sampled_from(samples), st.sampled_from(samples), st.integers(0, 2**48))


def _mutant(sample: bytes, other: bytes, seed: int) -> bytes:
    rng, data = random.Random(seed), bytearray(sample)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        head = rng.random() < 0.7  # most of what a parser decides stands at the beginning
        at = rng.randrange(min(len(data), 512) if head else len(data)) if data else 0
        size = rng.choice((1, 1, 1, 2, 4, 8, 32))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            number = rng.choice((0, 1, 2**7, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            width = rng.choice((4, 8))
            data[at : at + width] = (number % 256**width).to_bytes(width, "little")
        else:
            data[at:at] = other[at : at + rng.choice((8, 64, 512))]
    return bytes(data)


def json_mutants(*samples: Any) -> st.SearchStrategy[Any]:
    """One of `samples`, JSON values, with a few of its parts replaced, left out, renamed or put elsewhere."""
    return st.builds(_json_mutant, st.sampled_from(samples), st.integers(0, 2**48))


def _json_mutant(sample: Any, seed: int) -> Any:
    rng, value = random.Random(seed), copy.deepcopy(sample)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = list(_spots(value, rng))
        if not spots:
            return rng.choice(NASTY)
        holder, key = rng.choice(spots)
        if (kind := rng.randrange(10)) < 6:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind < 8:
            del holder[key]
        elif kind == 8:
            other, name = rng.choice(spots)
            holder[key] = copy.deepcopy(
                other.get(name) if isinstance(other, dict) else other[name % max(len(other), 1)]
            )
        elif isinstance(holder, dict):
            holder[rng.choice(("x", "type", "factor", str(key) + "_"))] = holder.pop(key)
        else:
            holder[key] = [holder[key]] * rng.choice((2, 200))
    return value


def _spots(value: Any, rng: random.Random) -> Any:
    """Places in a JSON value: containers and keys. Of a long list or table, some."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) < 50 else rng.sample(keys, 8):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _spots(value[key], rng)


def written(value: Any) -> bytes:
    """A JSON value as a file holds it; lone surrogates are escaped, numbers that are none stay."""
    return json.dumps(value).encode()


def header(value: Any) -> bytes:
    """JSON as the header of a safetensors file."""
    return len(written(value)).to_bytes(8, "little") + written(value)


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what stands behind it."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def deep(depth: int = 100_000) -> list[bytes]:
    """JSON that is nested far deeper than any parser recurses."""
    return [b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth]

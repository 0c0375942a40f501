"""How every engine reads configs of every kind, in words and numbers: tests/scaling/readings.txt.

python tests/scaling/words.py > tests/scaling/readings.txt      # after an intended change; read the difference
"""

from __future__ import annotations

import torch

from ropewalk.scaling import Linear, YaRN
from ropewalk.scaling.gguf_rope import GgufRope
from ropewalk.scaling.rope import RopeSpec
from ropewalk.scaling.serving import read_all, read_gguf
from ropewalk.scaling.spec import parse

ROPE = RopeSpec(dim=64, base=10_000.0, trained_length=2048)
THETA = {"rope_theta": 1e4}
TRAINED = {"original_max_position_embeddings": 2048}
YARN = {"rope_type": "yarn", "factor": 4.0, **THETA, **TRAINED}
LONG = {"rope_type": "longrope", "factor": 4.0, **THETA, **TRAINED, "short_factor": [1.0] * 32}
LONG["long_factor"] = [2.0] * 32
SAME = LONG | {"short_factor": [2.0] * 32}
MSCALES = {"attention_factor": 1.2, "short_mscale": 1.2, "long_mscale": 1.2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **THETA}

CONFIGS = {
    "plain": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "linear by a whole number": {"rope_type": "linear", "factor": 4, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "proportional": {"rope_type": "proportional", **THETA},
    "proportional by 4": {"rope_type": "proportional", "factor": 4.0, **THETA},
    "llama3": LLAMA3 | TRAINED,
    "llama3 at 8192": LLAMA3 | {"original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn without a trained length": {k: v for k, v in YARN.items() if k not in TRAINED},
    "yarn by 8": YARN | {"factor": 8.0},
    "yarn, attention_factor": YARN | {"attention_factor": 1.3},
    "yarn, mscale alone": YARN | {"mscale": 0.8},
    "yarn, mscales": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn, mscales and attention_factor": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "attention_factor": 1.3},
    "yarn, betas": YARN | {"beta_fast": 20.0, "beta_slow": 2.0},
    "yarn, usual betas": YARN | {"beta_fast": 32, "beta_slow": 1, "truncate": True},
    "yarn, truncate": YARN | {"truncate": False},
    "longrope": LONG,
    "longrope, same factors": SAME,
    "longrope, attention_factor": LONG | {"attention_factor": 1.5},
    "longrope, mscales": LONG | MSCALES,
}
"""Rotary parameters by a short name."""

FILES = {
    "plain": GgufRope(dim=64, base=1e4),
    "linear": GgufRope.of(ROPE, Linear(factor=4)),
    "linear by 0": GgufRope(dim=64, base=1e4, scaling={"type": "linear", "factor": 0.0}),
    "yarn": GgufRope.of(ROPE, YaRN(factor=4)),
    "yarn, attention_factor": GgufRope.of(ROPE, YaRN(factor=4, attention_factor=1.3)),
    "llama3": GgufRope.of(RopeSpec(dim=64, base=5e5, trained_length=8192), parse("llama3:8")),
    "ntk-mixed": GgufRope.of(ROPE, parse("ntk-mixed:4")),
    "attn_factor alone": GgufRope(dim=64, base=1e4, scaling={"attn_factor": 1.25}),
}
"""GGUF files by their contents."""


def read(parameters, max_length, *, old=True):
    """The readings of a Llama's config."""
    content = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    content["max_position_embeddings"] = max_length
    content["rope_parameters"] = parameters
    if old:
        content["rope_theta"] = parameters["rope_theta"]
        content["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    return read_all(content)


def line(reading):
    """A reading: scaler, geometry, one number for its frequencies in a short and in a long text, m, notes."""
    numbers = []
    for length in (100, 8192):
        frequencies = reading.frequencies(length)
        if frequencies is not None:
            weights = torch.arange(1, len(frequencies.inv_freq) + 1, dtype=torch.float64)
            number = float((frequencies.inv_freq.log() * weights).sum())
            numbers.append(f"{number:.5f} m {frequencies.attention_factor:.6g}")
    rope = f"base {reading.rope.base:g}, trained at {reading.rope.trained_length}, serves {reading.max_length}"
    return "; ".join([f"  {reading.engine}: {reading.label}", rope, *dict.fromkeys(numbers), *reading.notes])


def lines():
    """All lines of the file."""
    for name, parameters in CONFIGS.items():
        yield f"{name}, 8192"
        yield from map(line, read(parameters, 8192))
        if name in ("yarn", "longrope"):
            yield f"{name}, 8192, rope_parameters alone"
            yield from map(line, read(parameters, 8192, old=False))
        if "long_factor" in parameters or name in ("yarn", "linear", "dynamic"):
            yield f"{name}, 2048"
            yield from map(line, read(parameters, 2048))
    for name, file in FILES.items():
        yield f"GGUF {name}, 8192"
        yield from map(line, read_gguf(file, 8192))


if __name__ == "__main__":
    print("\n".join(lines()))

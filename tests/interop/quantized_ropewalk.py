"""Compares ways to compute with the blocks of a GGUF file with float32 arithmetic on expanded weights, and writes
docs/results/quantized.json: python quantized_ropewalk.py WORK."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from work import (
    BUILT_IN,
    QUANTIZED,
    QUANTIZED_MODEL,
    QUANTIZED_TOKENS,
    arguments,
    quantized_file,
    quantized_logits,
    read_ids,
)

import ropewalk as rw
from ropewalk.engine.hf_model import stored_dtype
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS

OUT = Path(__file__).resolve().parents[2] / "docs" / "results" / "quantized.json"
LIMITS = {"blocks": (1e-9, 1e-6), "steps": (1e-6, 1e-4), "as loaded": (1e-2, 1e-2), "llama.cpp": (1e-1, 1e-1)}
"""Of the mean divergence and of the difference of the mean loss: of rounding to float32, vectors to 16 bits, to
bfloat16, to 8 bits."""


def read(model: rw.Model, ids: list[int], tokens: int) -> Tensor:
    """Log-probabilities after every token, float64 [N, V], of a text read some tokens at a time."""
    cache = model.new_cache(len(ids))
    with model.running(None) as runner:
        parts = [ids[start : start + tokens] for start in range(0, len(ids), tokens)]
        return _log_softmax(torch.cat([runner.forward(part, cache, len(part)) for part in parts]))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def compared(expected: Tensor, found: Tensor, ids: list[int]) -> dict[str, float]:
    """The divergence of the next token's distribution, mean and largest, and the difference of the mean loss."""
    divergence = (expected.exp() * (expected - found)).sum(-1)
    here, following = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
    loss = (expected[here, following] - found[here, following]).mean()
    return {"divergence": float(divergence.mean()), "largest": float(divergence.max()), "loss": float(loss)}


def measured(work: Path, name: str) -> dict[str, Any]:
    """What is found of one file."""
    file, ids = quantized_file(work, name), read_ids(work, QUANTIZED_MODEL, QUANTIZED_TOKENS)
    exact = {"kv_dtype": "float32", "precision": "float32"}
    expected = read(rw.load(file, dtype="float32", **exact), ids, len(ids))
    blocks, loaded = rw.load(file, **exact), rw.load(file)
    steps = rw.load(file, kv_dtype="float32")
    found = {
        "blocks": read(blocks, ids, MAX_STEP_TOKENS),
        "steps": read(steps, ids, MAX_STEP_TOKENS),
        "as loaded": read(loaded, ids, len(ids)),
    }
    theirs = quantized_logits(work, name)
    if theirs.exists():
        found["llama.cpp"] = _log_softmax(torch.from_numpy(np.load(theirs)))
    ways = {how: compared(expected, logprobs, ids) for how, logprobs in found.items()}
    return {"file": name, "formats": stored_dtype(blocks.hf), "as_loaded": loaded.precision, "ways": ways}


def main() -> None:
    """Everything; fails if a difference is more than rounding."""
    work = arguments().work
    found = [measured(work, name) for name in (BUILT_IN, *QUANTIZED)]
    OUT.write_text(json.dumps({"tokens": QUANTIZED_TOKENS, "files": found}, indent=1) + "\n", encoding="utf-8")
    for one in found:
        for how, numbers in one["ways"].items():
            divergence, loss = LIMITS[how]
            if not (numbers["divergence"] < divergence and abs(numbers["loss"]) < loss):
                raise SystemExit(f"{one['file']}, {how}: {numbers}")


if __name__ == "__main__":
    main()

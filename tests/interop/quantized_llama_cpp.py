"""Quantizes a model with llama.cpp, and keeps its logits of each file: python quantized_llama_cpp.py WORK, without
ropewalk installed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp_read import File
from work import (
    BUILT_IN,
    QUANTIZED,
    QUANTIZED_MODEL,
    QUANTIZED_TOKENS,
    arguments,
    quantized_file,
    quantized_logits,
    read_cases,
    read_ids,
)


def quantize(work: Path, name: str) -> None:
    """Write the file in a format from that in float32."""
    [plain] = [case for case in read_cases(work, "llama.cpp") if (case.model, case.scaler) == (QUANTIZED_MODEL, "none")]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    out = quantized_file(work, name)
    unfinished = out.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(plain.path.encode(), str(unfinished).encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp does not quantize {plain.path} to {name}")
    unfinished.replace(out)


def main() -> None:
    """Everything that is missing."""
    work = arguments().work
    ids = read_ids(work, QUANTIZED_MODEL, QUANTIZED_TOKENS)
    for name in (BUILT_IN, *QUANTIZED):
        if not quantized_file(work, name).exists():
            quantize(work, name)
        if not quantized_logits(work, name).exists():
            np.save(quantized_logits(work, name), File(str(quantized_file(work, name)), len(ids)).logits(ids, 0))


if __name__ == "__main__":
    main()

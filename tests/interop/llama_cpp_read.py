"""Reads every exported GGUF file with llama.cpp: python llama_cpp_read.py WORK, without ropewalk installed.

The cache is in float32 and flash attention is off, so that what differs is not the cache's rounding.
"""

from __future__ import annotations

import os
from typing import Any

import llama_cpp
import numpy as np
from work import GREEDY, Case, arguments, read_cases, run, save_versions

BATCH = 512
ENGINE = "llama.cpp"


class File:
    """A GGUF file opened by llama.cpp, with room for `context` tokens."""

    def __init__(self, path: str, context: int) -> None:
        kind, threads = llama_cpp.GGML_TYPE_F32, len(os.sched_getaffinity(0))
        self._llama = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=False,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def logits(self, ids: list[int], first: int) -> Any:
        """After each of at most `BATCH` tokens, the first at position `first`."""
        batch, n = self._batch, len(ids)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(self._llama.ctx, batch) != 0:
            raise SystemExit(f"llama.cpp does not read {n} tokens at {first}")
        found = llama_cpp.llama_get_logits(self._llama.ctx)
        return np.ctypeslib.as_array(found, (n, self._llama.n_vocab())).copy()

    def read(self, ids: list[int]) -> tuple[list[float], list[int]]:
        """Log-probabilities of all but the first, and what is written greedily after them."""
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        llama_cpp.llama_memory_clear(memory, True)
        logprobs: list[float] = []
        for start in range(0, len(ids), BATCH):
            logits = self.logits(ids[start : start + BATCH], start)
            own = ids[start + 1 : start + 1 + BATCH]
            logprobs += _log_softmax(logits)[np.arange(len(own)), own].tolist()
        written = [int(logits[-1].argmax())]
        while len(written) < GREEDY:
            written.append(int(self.logits(written[-1:], len(ids) + len(written) - 1)[-1].argmax()))
        return logprobs, written


def _log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def open_model(case: Case) -> Any:
    """The file as llama.cpp runs it."""
    return File(case.path, max(case.lengths) + GREEDY).read


def main() -> None:
    """Everything that is missing."""
    given = arguments()
    cases = read_cases(given.work, "llama.cpp", "q8_0 at once", "q8_0 rewritten")
    run(given.work, ENGINE, cases, given.longest, open_model)
    save_versions(given.work, ENGINE, "llama-cpp-python")


if __name__ == "__main__":
    main()

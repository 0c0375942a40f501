"""llama.cpp as an engine of a comparison."""

from __future__ import annotations

from collections import deque
from functools import cache

import numpy as np

from ...errors import ConfigError, RopewalkError
from .entry import Entry, Logits, versions_of

BATCH = 512  # tokens that llama.cpp reads at once: its own default


class LlamaCpp:
    """llama.cpp through the functions of its library: flash attention, a cache in float16."""

    def __init__(self, entry: Entry) -> None:
        import llama_cpp

        if entry.device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise ConfigError(
                "this llama-cpp-python was built without support for the GPU that the other engines use; build it "
                "with one (CMAKE_ARGS=-DGGML_CUDA=on), or compare on the CPU with CUDA_VISIBLE_DEVICES= in front"
            )
        self._api = llama_cpp
        said, _ = _listen()
        said.clear()
        try:
            self._llama = llama_cpp.Llama(
                entry.source,
                n_ctx=entry.context + entry.room,
                n_batch=BATCH,
                n_ubatch=BATCH,
                n_threads=entry.threads,
                n_threads_batch=entry.threads,
                n_gpu_layers=0 if entry.device == "cpu" else -1,
                flash_attn=True,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            told = "; ".join(line for line in said if line)
            raise RopewalkError(f"llama.cpp cannot load {entry.source} ({told or error})") from error
        self.dtype, self.cache_dtype = entry.dtype, "float16"
        self.versions, self.remark = versions_of("llama-cpp-python"), ""
        self.versions["llama.cpp"] = llama_cpp.llama_print_system_info().decode().strip(" |")

    def prefill(self, ids: list[int]) -> Logits:
        self.rewind(0)
        for start in range(0, len(ids), BATCH):
            self._decode(ids[start : start + BATCH])
        return self._logits()

    def step(self, token: int) -> Logits:
        self._decode([token])
        return self._logits()

    def rewind(self, length: int) -> None:
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._llama.ctx), -1, length, -1)

    def _decode(self, ids: list[int]) -> None:
        tokens = (self._api.llama_token * len(ids))(*ids)
        status = self._api.llama_decode(self._llama.ctx, self._api.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise RopewalkError(f"llama.cpp gave status {status} on reading {len(ids)} tokens; try shorter --lengths")

    def _logits(self) -> Logits:
        row = self._api.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(row, (self._llama.n_vocab(),)).copy()


@cache
def _listen() -> tuple[deque[str], object]:
    """The last lines that llama.cpp said, kept instead of printed; and what it calls, to live as long as the process,
    since the library has one listener for all models."""
    import llama_cpp

    said: deque[str] = deque(maxlen=3)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def run_trial(_level: int, text: bytes, _data: object) -> None:
        said.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(run_trial, None)
    return said, run_trial

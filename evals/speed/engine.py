"""The engines of a speed comparison, behind one interface: ropewalk, transformers and llama.cpp.

Each engine imports its libraries when it is opened, so that a process has only the memory of its
own engine.
"""

from __future__ import annotations

import importlib.metadata
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from ...errors import ConfigError, RopewalkError

Logits = np.ndarray[tuple[int], np.dtype[np.float32]]
"""Float32 [V] on the CPU. The device has finished when the caller has them."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """How to open an engine.

    Args:
        kind: a key of `ENGINES`.
        dtype: of the weights, as the engine calls it. "auto" only for ropewalk.
        source: what to load. For ropewalk: as for `load`; for hf: a folder or hub id; for
            llama.cpp: a file.
        context: tokens of the longest prompt.
        room: most tokens after a prompt.
        threads: number of CPU threads.
        device: "cpu" or "cuda".
    """

    kind: str
    dtype: str
    source: str
    context: int
    room: int
    threads: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.kind} {self.dtype}"


class Engine(Protocol):
    """A model with the cache of one text.

    Attributes:
        dtype: of the weights.
        cache_dtype: of the keys and values.
        versions: of the engine's packages.
        remark: what tables show after its name, for example that a slower path runs the model;
            usually empty.
    """

    dtype: str
    cache_dtype: str
    versions: dict[str, str]
    remark: str

    def prefill(self, ids: list[int]) -> Logits:
        """Clear the cache, read `ids`, and return the logits after the last token."""
        ...

    def step(self, token: int) -> Logits:
        """Read one more token, and return the logits after it."""
        ...

    def rewind(self, length: int) -> None:
        """Remove all but the first `length` tokens from the cache."""
        ...


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those `packages` that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


BATCH = 512  # tokens that llama.cpp reads at a time: its default


class LlamaCppEngine:
    """llama.cpp through the functions of its library, with flash attention and a cache in float16."""

    def __init__(self, spec: EngineSpec) -> None:
        import llama_cpp

        if spec.device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise ConfigError(
                "this llama-cpp-python was built without GPU support, and the other engines use the GPU; build it "
                "with CMAKE_ARGS=-DGGML_CUDA=on, or compare on the CPU with CUDA_VISIBLE_DEVICES= before the command"
            )
        self._api = llama_cpp
        log_lines, _ = _log_lines()
        log_lines.clear()
        try:
            self._llama = llama_cpp.Llama(
                spec.source,
                n_ctx=spec.context + spec.room,
                n_batch=BATCH,
                n_ubatch=BATCH,
                n_threads=spec.threads,
                n_threads_batch=spec.threads,
                n_gpu_layers=0 if spec.device == "cpu" else -1,
                flash_attn=True,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            messages = "; ".join(line for line in log_lines if line)
            raise RopewalkError(f"llama.cpp cannot load {spec.source} ({messages or error})") from error
        self.dtype, self.cache_dtype = spec.dtype, "float16"
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
            raise RopewalkError(f"llama.cpp gave status {status} for {len(ids)} tokens; try shorter --lengths")

    def _logits(self) -> Logits:
        row = self._api.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(row, (self._llama.n_vocab(),)).copy()


@cache
def _log_lines() -> tuple[deque[str], object]:
    """The last log lines of llama.cpp, which are not printed, and the callback that stores them.

    The library has one callback for all models, so it lives as long as the process.
    """
    import llama_cpp

    lines: deque[str] = deque(maxlen=3)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def store_line(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(store_line, None)
    return lines, store_line


class RopewalkEngine:
    """ropewalk, through the functions that `generate` uses."""

    def __init__(self, spec: EngineSpec) -> None:
        import torch

        from ...engine.hf_model import stored_dtype
        from ...engine.load import load
        from ...version import __version__

        torch.set_num_threads(spec.threads)
        self._model = load(spec.source, dtype=spec.dtype)
        self._room = spec.room
        self.dtype = "int8" if spec.dtype == "int8" else stored_dtype(self._model.hf)
        self.prefill([0])  # some caches take their dtype from the first keys
        self.cache_dtype = _dtype_name(self._cache.layers[0].keys.dtype)
        self.versions = {"ropewalk": __version__, **versions_of("torch", "transformers", "numba")}
        self.versions["network"] = self._model.run_by
        self.remark = "" if self._model.is_compiled else "(by transformers' modules)"

    def prefill(self, ids: list[int]) -> Logits:
        self._cache: Any = None  # two caches at a time would count as peak memory
        self._cache = self._model.new_cache(len(ids) + self._room)
        return self._run(ids)

    def step(self, token: int) -> Logits:
        return self._run([token])

    def rewind(self, length: int) -> None:
        from ...engine.cache import rewind

        rewind(self._cache, self._cache.get_seq_length() - length)

    def _run(self, ids: list[int]) -> Logits:
        from ...engine.prefill import prefill

        with self._model.running(None) as runner:
            return _on_cpu(prefill(runner, ids, self._cache)[-1])


class TransformersEngine:
    """transformers as its `generate` runs one text: SDPA attention, a growing cache, prompts in one
    piece."""

    def __init__(self, spec: EngineSpec) -> None:
        import torch

        from ...engine.checkpoints.checkpoint import read_config, read_weights

        torch.set_num_threads(spec.threads)
        options = {"dtype": getattr(torch, spec.dtype), "device_map": spec.device}
        config = read_config(spec.source)
        self._model = read_weights(spec.source, config, attn_implementation="sdpa", **options)
        self.dtype = self.cache_dtype = spec.dtype
        self.versions, self.remark = versions_of("transformers", "torch"), ""

    def prefill(self, ids: list[int]) -> Logits:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        return self._run(ids)

    def step(self, token: int) -> Logits:
        return self._run([token])

    def rewind(self, length: int) -> None:
        self._cache.crop(length - self._cache.get_seq_length())

    def _run(self, ids: list[int]) -> Logits:
        import torch

        with torch.inference_mode():
            batch = torch.tensor([ids], device=self._model.device)
            output = self._model(input_ids=batch, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            return _on_cpu(output.logits[0, -1])


ENGINES: dict[str, Callable[[EngineSpec], Engine]] = {
    "ropewalk": RopewalkEngine,
    "hf": TransformersEngine,
    "llama.cpp": LlamaCppEngine,
}
"""The engines by the names of `--against`, and ropewalk."""


def open_engine(spec: EngineSpec) -> Engine:
    """Open the engine of a spec.

    Raises:
        RopewalkError: the engine cannot be loaded.
    """
    return ENGINES[spec.kind](spec)


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _on_cpu(logits: Any) -> Logits:
    array: Logits = logits.float().cpu().numpy()
    return array

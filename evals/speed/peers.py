"""Engines that run the same model: ropewalk and transformers, and llama.cpp by its name.

Nothing heavy is imported before an engine is opened, so that the memory of one is not that of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .entry import Engine, Entry, Logits, versions_of
from .llama import LlamaCpp


class Ropewalk:
    """This engine, through the functions that `generate` uses."""

    def __init__(self, entry: Entry) -> None:
        import torch

        from ...engine.load import load
        from ...version import __version__

        torch.set_num_threads(entry.threads)
        self._model = load(entry.source, dtype=entry.dtype)
        self._room = entry.room
        self.dtype = "int8" if entry.dtype == "int8" else _name(self._model.hf.dtype)
        self.prefill([0])  # caches of some networks take their dtype from the first keys
        self.cache_dtype = _name(self._cache.layers[0].keys.dtype)
        self.versions = {"ropewalk": __version__, **versions_of("torch", "transformers", "numba")}
        self.versions["network"] = self._model.run_by
        self.remark = "" if self._model.is_compiled else "(by transformers' modules)"

    def prefill(self, ids: list[int]) -> Logits:
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


class Transformers:
    """transformers as its own `generate` runs it on one text: SDPA attention, a growing cache, prompts in one piece."""

    def __init__(self, entry: Entry) -> None:
        import torch

        from ...engine.checkpoints.checkpoint import read_config, read_weights

        torch.set_num_threads(entry.threads)
        options = {"dtype": getattr(torch, entry.dtype), "device_map": entry.device}
        config = read_config(entry.source)
        self._model = read_weights(entry.source, config, attn_implementation="sdpa", **options)
        self.dtype = self.cache_dtype = entry.dtype
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


ENGINES: dict[str, Callable[[Entry], Engine]] = {"ropewalk": Ropewalk, "hf": Transformers, "llama.cpp": LlamaCpp}
"""By the names that `--against` takes, and ropewalk."""


def open_engine(entry: Entry) -> Engine:
    """Load the engine of `entry`.

    Raises:
        RopewalkError: it cannot be loaded.
    """
    return ENGINES[entry.kind](entry)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _on_cpu(logits: Any) -> Logits:
    found: Logits = logits.float().cpu().numpy()
    return found

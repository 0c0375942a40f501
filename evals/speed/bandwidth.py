"""What memory allows: how fast it can be read here, and what a step of decoding has to read."""

from __future__ import annotations

import time
from typing import Any

import torch

READ_BYTES = 256 * 2**20
"""Far more than any cache holds."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
_BYTES |= {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32}  # a scale of 2 bytes for 32 weights
"""Bytes of a number, as torch and as GGUF call its type."""


class Memory:
    """Memory of one device, read over and over.

    Args:
        device: "cpu", which torch's threads read together, or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self._numbers = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)

    def bandwidth(self, tries: int = 3) -> float:
        """Bytes a second, the best of `tries` sums."""
        best = float("inf")
        for _ in range(tries):
            started = time.perf_counter()
            self._numbers.sum().item()  # item() waits for the device
            best = min(best, time.perf_counter() - started)
        return READ_BYTES / best


class Traffic:
    """What a decode step of a model has to read: every weight once, and the keys and values of the
    past.

    Of the input embedding one row is read, unless it is the output matrix too. All layers are taken
    to see the whole past, and all experts of a mixture to be read.

    Args:
        config: of a transformers model.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        config = config.get_text_config()
        self.weights: int = sum(parameter.numel() for parameter in model.parameters())
        if not config.tie_word_embeddings:
            self.weights -= model.get_input_embeddings().weight.numel()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cached: int = 2 * config.num_hidden_layers * heads * dim

    def step_bytes(self, dtype: str, cache_dtype: str, length: float) -> float:
        """Bytes that a step behind `length` tokens reads.

        Args:
            dtype: of the weights, as torch or as GGUF calls it.
            cache_dtype: of the keys and values.
        """
        return self.weights * _BYTES[dtype] + length * self.cached * _BYTES[cache_dtype]

"""The runner that calls the modules of transformers, with the patches in them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...errors import ContextOverflow, Setting
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from .. import tensor_parallel
from ..attention.causal import ATTENTION_NAME
from ..attention.rows import counting_up
from ..cache import attends_to_everything, new_cache, rewind
from ..hf_model import dtype_name, input_device, key_shape, stored_dtype
from ..kv_cache import free_on_gpu, gigabytes
from ..patches.attention_hook import is_replaced
from .runner import Path, Runner

_GPU_CHUNK_FACTOR = 8  # a GPU that multiplies small matrices waits for its memory


class TransformersRunner(Runner):
    """Runs a transformers model by its own modules.

    Args:
        why: why the compiled kernels cannot run it, if they were tried.
    """

    def __init__(self, hf: PreTrainedModel, why: str | None = None) -> None:
        super().__init__(hf)
        self._why = why
        takes_positions = "position_ids" in inspect.signature(hf.forward).parameters
        self._takes_positions = takes_positions and hf.config.get_text_config() is hf.config
        self._needs_positions = False
        if hf.device.type == "cuda":
            self.chunk_factor = _GPU_CHUNK_FACTOR

    def use(self, scaler: Scaler, length: int | None) -> None:
        super().use(scaler, length)
        self._needs_positions = self._takes_positions and is_replaced(self.hf)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        heads, dim = key_shape(self.hf.config)
        return int(2 * self.hf.config.get_text_config().num_hidden_layers * heads * dim * self.hf.dtype.itemsize)

    @property
    def weights(self) -> str:
        """The dtype of the stored weights, or the formats of packed ones."""
        return stored_dtype(self.hf)

    @property
    def precision(self) -> str:
        """The dtype of the model, which is also that of its arithmetic, after the formats of packed weights."""
        dtype = dtype_name(self.hf.dtype)
        return dtype if self.weights == dtype else f"{self.weights}, {dtype} arithmetic"

    @property
    def how(self) -> str:
        """A short description of the runner, with the reason against the compiled kernels."""
        reason = f" (not the compiled kernels: {self._why})" if self._why else ""
        shared = f", split over {dist.get_world_size()} processes" if tensor_parallel.is_split() else ""
        return f"transformers' modules in {self.weights} on {input_device(self.hf).type}{shared}{reason}"

    def check_room(self, *rows: int, owned: int = 0, reserved: int = 0) -> None:
        """Refuse, on a GPU that holds the whole model, keys and values that do not fit beside what is there.

        Elsewhere it never raises, because the memory that transformers' modules need is not known.

        Raises:
            ContextOverflow: with the numbers.
        """
        device = input_device(self.hf)
        if not (needed := self.needed_bytes(*rows, owned=owned)):
            return
        available = max(0, free_on_gpu(device) - reserved)
        if needed > available:
            raise ContextOverflow(
                f"keys and values of {format_length(sum(rows))} tokens take {gigabytes(needed)}, more than the "
                f"{gigabytes(available)} of GPU memory that are free; take at most "
                f"{format_length(available // self.bytes_per_token)} tokens, or ",
                Setting("device_map", "cpu", "load"),
            )

    def needed_bytes(self, *rows: int, owned: int = 0) -> int:
        """Bytes of the keys and values on a GPU that holds the whole model; 0 elsewhere, as it is not known.

        Copies that a position map rotates, and the states of layers in between, are not in them.
        """
        one_gpu = input_device(self.hf).type == "cuda" and len(set(getattr(self.hf, "hf_device_map", {}).values())) < 2
        if not (one_gpu and attends_to_everything(self.hf.config.get_text_config()) and not tensor_parallel.is_split()):
            return 0
        return self.bytes_per_token * max(0, sum(map(self._room, rows)) - owned)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for one sequence of about `capacity` tokens."""
        return new_cache(self.hf.config, self._room(capacity))

    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        """Run `ids` on top of `cache` and return the logits after the last tokens, [logits_to_keep, V]."""
        self.check(ids)
        device = input_device(self.hf)
        batch = torch.tensor([ids], device=device)
        options = {}
        if self._needs_positions:  # attention would read the model's own from the device, and wait for it
            options["position_ids"] = counting_up(cache.get_seq_length(), len(ids), device)
        logits: Tensor = self.hf(
            input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep, **options
        ).logits
        self._evict(cache)
        return logits[0, -logits_to_keep:]

    @property
    def runs_trees(self) -> bool:
        """True if attention takes a mask of any form, which a position map does not."""
        takes_masks = self.hf.config.get_text_config()._attn_implementation in ("sdpa", ATTENTION_NAME)
        return takes_masks and not is_replaced(self.hf)

    def tree(self, paths: Sequence[Path], cache: Cache) -> Tensor:
        """The logits after each path, [paths, V], by one forward pass. In its mask, each token sees its ancestors."""
        self.check([path[-1] for path in paths])
        past = cache.get_seq_length()
        index = {path: n for n, path in enumerate(paths)}
        seen = torch.zeros(len(paths), past + len(paths), dtype=torch.bool)
        seen[:, :past] = True
        for path, n in index.items():
            seen[n, [past + index[path[: k + 1]] for k in range(len(path))]] = True
        device = input_device(self.hf)
        logits: Tensor = self.hf(
            input_ids=torch.tensor([[path[-1] for path in paths]], device=device),
            position_ids=torch.tensor([[past + len(path) - 1 for path in paths]], device=device),
            attention_mask=seen[None, None].to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
        rewind(cache, len(paths))
        return logits

"""The runner that uses the modules of transformers, with whatever is patched into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .. import tensor_parallel
from ..attention.causal import ATTENTION_NAME
from ..cache import new_cache, rewind
from ..hf_model import input_device
from ..patches.attention_hook import is_replaced
from .runner import Path, Runner


class TransformersRunner(Runner):
    """Runs a transformers model by its own modules.

    Args:
        why: why the compiled kernels do not run it, where they were considered.
    """

    def __init__(self, hf: PreTrainedModel, why: str | None = None) -> None:
        super().__init__(hf)
        self._why = why

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take."""
        config = self.hf.config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * dim * self.hf.dtype.itemsize)

    @property
    def weights(self) -> str:
        """The dtype that the weights are stored in."""
        return str(self.hf.dtype).removeprefix("torch.")

    @property
    def precision(self) -> str:
        """The dtype of the model, in which it computes."""
        return str(self.hf.dtype).removeprefix("torch.")

    @property
    def how(self) -> str:
        """What runs the model, in a few words, and why the compiled kernels do not."""
        reason = f" (not the compiled kernels: {self._why})" if self._why else ""
        shared = f", split over {dist.get_world_size()} processes" if tensor_parallel.is_split() else ""
        return f"transformers' modules in {self.weights} on {input_device(self.hf).type}{shared}{reason}"

    def check_room(self, *rows: int, owned: int = 0) -> None:
        """Never refuses: how much memory transformers' modules take is not known."""

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for one sequence of about `capacity` tokens."""
        return new_cache(self.hf.config, self._room(capacity))

    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        """Run `ids` on top of `cache`: the last logits, [logits_to_keep, V]."""
        self.check(ids)
        batch = torch.tensor([ids], device=input_device(self.hf))
        logits: Tensor = self.hf(
            input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep
        ).logits
        self._evict(cache)
        return logits[0, -logits_to_keep:]

    @property
    def runs_trees(self) -> bool:
        """True without a position map, where transformers' attention takes a mask of any form."""
        takes_masks = self.hf.config.get_text_config()._attn_implementation in ("sdpa", ATTENTION_NAME)
        return takes_masks and not is_replaced(self.hf)

    def tree(self, paths: Sequence[Path], cache: Cache) -> Tensor:
        """Logits after each of the paths, [paths, V], by one forward under a mask of their ancestors."""
        self.check([path[-1] for path in paths])
        held = cache.get_seq_length()
        index = {path: n for n, path in enumerate(paths)}
        seen = torch.zeros(len(paths), held + len(paths), dtype=torch.bool)
        seen[:, :held] = True
        for path, n in index.items():
            seen[n, [held + index[path[: k + 1]] for k in range(len(path))]] = True
        device = input_device(self.hf)
        logits: Tensor = self.hf(
            input_ids=torch.tensor([[path[-1] for path in paths]], device=device),
            position_ids=torch.tensor([[held + len(path) - 1 for path in paths]], device=device),
            attention_mask=seen[None, None].to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
        rewind(cache, len(paths))
        return logits

"""A model as the decode loop sees it: token ids on top of a cache in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...scaling.positions import PositionScaler
from ...scaling.rope import Scaler
from ...tokenizer_tools.vocab import check_ids
from .. import tensor_parallel
from ..attention.causal import ATTENTION_NAME
from ..cache import evict, most_held, new_cache, rewind
from ..patches.attention_hook import is_replaced
from ..placement import input_device

Path = tuple[int, ...]

RopeState = tuple[Scaler, int | None]

CHUNK = 1024  # tokens a prefill step: 8k tokens of a 135M model take 41, 39, 38, 38 s at 256, 512, 1024, 2048


def token_rows(hf: PreTrainedModel) -> int:
    """Tokens that a model can read and write."""
    written = int(hf.config.get_text_config().vocab_size)
    embedding = getattr(hf, "get_input_embeddings", lambda: None)()
    return min(written, getattr(embedding, "num_embeddings", written))


class Runner:
    """A transformers model, run by its own modules, with whatever is patched into them.

    Attributes:
        hf: the model.
    """

    is_compiled = False

    def __init__(self, hf: PreTrainedModel, why: str | None = None) -> None:
        self.hf = hf
        self._rows = token_rows(hf)
        self._why = why
        self._rope_state: RopeState = Scaler(), None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of a token take."""
        config = self.hf.config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * dim * self.hf.dtype.itemsize)

    @property
    def precision(self) -> str:
        """In which numbers it computes, as results are labelled."""
        return str(self.hf.dtype).removeprefix("torch.")

    @property
    def how(self) -> str:
        """What runs the model, in a few words, and why nothing faster does."""
        reason = f" (not the compiled kernels: {self._why})" if self._why else ""
        shared = f", split over {dist.get_world_size()} processes" if tensor_parallel.is_split() else ""
        return f"transformers' modules in {self.weights} on {input_device(self.hf).type}{shared}{reason}"

    def use(self, scaler: Scaler, length: int | None) -> None:
        """Run under `scaler` from now on; the model is patched with it already.

        Args:
            length: of the sequences in tokens, where frequencies depend on it, else None.
        """
        self._rope_state = scaler, length

    @property
    def rope_state(self) -> RopeState:
        """The scaler in use, and the length that it is for where it depends on that."""
        return self._rope_state

    def rotate_cached_keys(self, cache: Cache, before: RopeState) -> bool:
        """Turn the keys of a cache from `before` to the setting in use, in place; False if it has to be read anew."""
        return False

    @property
    def sink_window(self) -> tuple[int, int] | None:
        """The first and last keys that later tokens see, where caches need no others; None where they hold everything.

        A temperature, or a scaler that grows, asks for true positions.
        """
        scaler, length = self._rope_state
        map_ = scaler.member("positions")
        if length is not None or scaler.depends_on_length or scaler.member("temperature") is not None:
            return None
        return map_.sink_window if isinstance(map_, PositionScaler) else None

    def _room(self, tokens: int) -> int:
        """Keys that a cache of `tokens` tokens comes to hold."""
        return tokens if self.sink_window is None else min(tokens, most_held(self.sink_window) + CHUNK)

    def _evict(self, *caches: Cache) -> None:
        """Drop keys that no later token will see."""
        if (sink_window := self.sink_window) is not None:
            for cache in caches:
                evict(cache, sink_window)

    @property
    def weights(self) -> str:
        """The dtype that the weights are held in."""
        return str(self.hf.dtype).removeprefix("torch.")

    def check_room(self, *rows: int, owned: int = 0) -> None:
        """Raise ContextOverflow if room for caches of so many tokens is known to be lacking in memory.

        Args:
            owned: tokens whose room they take already.
        """

    def check(self, ids: Sequence[int]) -> None:
        """Raise DataError if the model has not all of these tokens: an embedding fails in ways of its own."""
        check_ids(ids, self._rows)

    def readable(self, logits: Tensor) -> Tensor:
        """Logits [..., V] of the tokens that the model can read too: no other is ever drawn."""
        return logits[..., : self._rows]

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for one sequence of about `capacity` tokens."""
        return new_cache(self.hf.config, self._room(capacity))

    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        """Run `ids` on top of `cache` and return the last `logits_to_keep` logits, [logits_to_keep, V].

        Raises:
            DataError: the model has no such token.
        """
        self.check(ids)
        batch = torch.tensor([ids], device=input_device(self.hf))
        logits: Tensor = self.hf(
            input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep
        ).logits
        self._evict(cache)
        return logits[0, -logits_to_keep:]

    @property
    def runs_trees(self) -> bool:
        """True if `tree` can be asked for: without a position map, transformers' attention takes a mask of any form."""
        own = self.hf.config.get_text_config()._attn_implementation in ("sdpa", ATTENTION_NAME)
        return own and not is_replaced(self.hf)

    def tree(self, paths: Sequence[Path], cache: Cache) -> Tensor:
        """Logits after each of the paths that go on from what the cache holds, [paths, V], in one forward.

        The cache is left as it was.

        Args:
            paths: token sequences, every beginning of each among them and before it.
        """
        self.check([path[-1] for path in paths])
        held = cache.get_seq_length()
        place = {path: n for n, path in enumerate(paths)}
        seen = torch.zeros(len(paths), held + len(paths), dtype=torch.bool)
        seen[:, :held] = True
        for path, n in place.items():
            seen[n, [held + place[path[: k + 1]] for k in range(len(path))]] = True
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

    def step(self, rows: Sequence[tuple[Sequence[int], Cache]]) -> Tensor:
        """Run a few tokens of several sequences, each on top of its own cache: the logits after each, [rows, V].

        A row's logits do not depend on the others.
        """
        return torch.cat([self.forward(ids, cache, logits_to_keep=1) for ids, cache in rows])

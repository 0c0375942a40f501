"""The interface of a model that is measured, the cost of its forward passes, and plain functions as
models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ...engine.cache import common_window
from ...engine.hf_model import weight_count
from ...engine.model import Model
from ...errors import ConfigError, UnsupportedModel
from ...scaling.rope import Scaler
from ...tokenizer_tools.encode import start_ids
from ...tokenizer_tools.vocabulary import check_ids
from ..retrieval.task import Trial, TrialOutput
from ..runs.result import Losses
from ..speed.memory import peak_memory_mb

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from ...tokenizer_tools.vocabulary import Vocabulary


Advance = Callable[[int, int], None]
"""Called as tokens are read, with the number of tokens in the cache and the number of new tokens."""


_WINDOWED = "sliding_attention"  # one of a config's layer_types


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """Operations of a forward pass.

    Args:
        dense: per token.
        attention: per pair of token and key, in the layers that read all keys.
        windowed: per pair of token and key, in the layers with a sliding window.
        window: keys that those layers read.
    """

    dense: float
    attention: float
    windowed: float = 0.0
    window: int = 0

    @classmethod
    def of(cls, model: Model) -> ForwardCost:
        """The cost of a loaded model, from the shapes of its weights."""
        rows = model.hf.get_input_embeddings()
        return cls._of(model.hf.config, weight_count(model.hf) - rows.num_embeddings * rows.embedding_dim)

    @classmethod
    def of_config(cls, config: Any) -> ForwardCost:
        """An estimate without the weights: each layer counts as 12 square matrices of the hidden
        size."""
        text = config.get_text_config()
        return cls._of(config, 12 * text.num_hidden_layers * text.hidden_size**2)

    @classmethod
    def _of(cls, config: Any, weights: int) -> ForwardCost:
        config = config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layer = 4 * config.num_attention_heads * head_dim
        layers, window = config.num_hidden_layers, common_window(config)
        kinds = getattr(config, "layer_types", None) or [_WINDOWED if window is not None else None] * layers
        windowed = kinds.count(_WINDOWED)
        return cls(
            dense=2 * weights,
            attention=layer * (layers - windowed),
            windowed=layer * windowed,
            window=(window or 0) if windowed else 0,
        )

    def step(self, past: int, tokens: int) -> float:
        """Operations of `tokens` new tokens after `past` tokens in the cache."""
        return self._until(past + tokens) - self._until(past)

    def passes(self, windows: Iterable[int]) -> float:
        """Operations of forward passes over windows of these lengths."""
        return sum(map(self._until, windows))

    def _until(self, tokens: int) -> float:
        """Operations of a pass over `tokens` tokens."""
        begun = min(tokens, self.window)  # tokens that the window does not limit
        pairs = begun**2 / 2 + (tokens - begun) * self.window
        return tokens * self.dense + self.attention * tokens**2 / 2 + self.windowed * pairs


Tokens = list[int]

Logits = Callable[[Tokens], Any]
"""A function from token ids [n] to logits [n, V], as a torch tensor or a numpy array."""

_ROWS = 256  # rows of a function's logits that are converted to losses at once


@dataclass(frozen=True, kw_only=True)
class Start:
    """The tokens before a text.

    Args:
        prefix: the tokens that the tokenizer adds.
        token: the start token, or the end token if the tokenizer has no start token; None if it has
            neither.
    """

    prefix: Tokens
    token: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Start:
        """The tokens before a text, for a transformers tokenizer."""
        token = tokenizer.bos_token_id
        return cls(
            prefix=start_ids(tokenizer),
            token=tokenizer.eos_token_id if token is None else token,
        )


class MeasuredModel(ABC):
    """A model under one scaler: a local model (`LocalModel`), a served one (`ServedModel`) or a
    function (`FunctionModel`).

    Attributes:
        name: the model's name in its rows.
        precision: the dtype in which it computes.
        device: the device or the server on which it runs.
        trained_length: tokens that it was trained to read; None if unknown.
        metadata: further fields of its recipes, JSON scalars.
        tokenizer: a transformers tokenizer; None if unknown.
        rope: the scaler.
        cache: the cache of the text that was scored last; None if there is none.
    """

    name: str
    precision: str
    device: str
    trained_length: int | None
    metadata: Mapping[str, Any] = MappingProxyType({})
    tokenizer: Any = None
    rope: Scaler = Scaler()
    cache: Cache | None = None

    @abstractmethod
    def under(self, scaler: Scaler) -> MeasuredModel:
        """The same model under another scaler. Both may be used alternately.

        Raises:
            ConfigError: the scaler cannot work on this model, or the model's scaler is fixed.
        """

    def restore(self) -> None:  # noqa: B027  (only a loaded model has a scaler to restore)
        """Put `rope` back into the model after other scalers were used."""

    def rope_at(self, length: int) -> Scaler:
        """The scaler for `length` tokens: `rope`, or the scaler that `auto` chooses."""
        return self.rope

    @property
    def memory_mb(self) -> float | None:
        """Peak memory of this process so far, MB; None if the model runs elsewhere."""
        return peak_memory_mb()

    @property
    @abstractmethod
    def cost(self) -> ForwardCost:
        """The cost of its forward passes."""

    def check(self, length: int) -> None:  # noqa: B027  (most models read any length)
        """Raise ContextOverflow if the model cannot hold `length` tokens of prompt and answer."""

    def check_scoring(self, length: int) -> None:
        """Raise ContextOverflow or ConfigError if the model cannot score a text of `length`
        tokens."""
        self.check(length)

    @abstractmethod
    def losses(self, ids: Tokens, first: int, advance: Advance, length: int | None = None) -> Losses:
        """Losses of `ids[first:]` in nats, each given all tokens before it, float32 [len(ids) -
        first].

        Args:
            length: tokens that the scaler is for, if it depends on them; None: those of `ids`.
        """

    @abstractmethod
    def logits(self, ids: Tokens, first: int, advance: Advance) -> Iterator[Tensor]:
        """The logits that predict `ids[first:]`, float32 [tokens, V], in pieces."""

    @abstractmethod
    def run_trial(self, trial: Trial, advance: Advance) -> TrialOutput:
        """Score the right answer after the trial's prompt, and let the model write its own answer."""

    @abstractmethod
    def count_bytes(self, ids: Sequence[int]) -> int | None:
        """Bytes of the text of these tokens; None if the tokenizer is unknown."""

    @abstractmethod
    def time_forward(self, length: int) -> None:
        """Read `length` tokens and score the last, so that the caller can time it."""

    @abstractmethod
    def needs(self, longest: int) -> str:
        """A phrase that says what prompts of up to `longest` tokens need besides time."""


def bytes_of(ids: Sequence[int], tokenizer: Any, vocabulary: Callable[[], Vocabulary]) -> int:
    """Bytes of the text of these tokens, from the bytes of each token if the vocabulary has them."""
    try:
        return len(vocabulary().text_bytes(list(ids)))
    except (UnsupportedModel, IndexError):  # no bytes per token, or an id that only pads the embedding
        return len(tokenizer.decode(list(ids)).encode())


class FunctionModel(MeasuredModel):
    """A function from token ids to logits, such as another engine. It can be scored; it cannot
    generate.

    Args:
        function: token ids [n] to logits [n, V].
        name: the name in the rows.
        tokenizer: counts the bytes of a text; None if unknown.
        trained_length: tokens; None if unknown.
    """

    precision, device = "unknown", "unknown"

    def __init__(
        self, function: Logits, *, name: str, tokenizer: Any = None, trained_length: int | None = None
    ) -> None:
        self._function, self.tokenizer = function, tokenizer
        self.name, self.trained_length = name, trained_length

    def under(self, scaler: Scaler) -> FunctionModel:
        if scaler.parts:
            raise ConfigError(
                f"{self.name} is a function from tokens to logits, whose positions cannot be scaled by {scaler}; "
                "give a ropewalk or transformers model"
            )
        return self

    def losses(self, ids: Tokens, first: int, advance: Advance, length: int | None = None) -> Losses:
        import torch

        rows, targets = self._read(ids, first, advance), torch.tensor(ids[first:])
        parts = []
        for start in range(0, len(targets), _ROWS):
            logits = torch.as_tensor(rows[start : start + _ROWS]).detach().cpu().float()
            chosen = logits.gather(-1, targets[start : start + _ROWS, None])[:, 0]
            parts.append((logits.logsumexp(-1) - chosen).numpy())
        return np.concatenate(parts)

    def logits(self, ids: Tokens, first: int, advance: Advance) -> Iterator[Tensor]:
        raise ConfigError(f"{self.name}: its logits cannot be compared with another scaler's; load it with ropewalk")

    def count_bytes(self, ids: Sequence[int]) -> int | None:
        return None if self.tokenizer is None else len(self.tokenizer.decode(list(ids)).encode())

    @property
    def cost(self) -> ForwardCost:
        self._refuse("a time estimate")

    def run_trial(self, trial: Trial, advance: Advance) -> TrialOutput:
        self._refuse("a retrieval trial")

    def time_forward(self, length: int) -> None:
        self._refuse("a time estimate")

    def needs(self, longest: int) -> str:
        self._refuse("a time estimate")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{self.name} is a function from tokens to logits, which is not enough for {what}; load it with ropewalk"
        )

    def _read(self, ids: Tokens, first: int, advance: Advance) -> Any:
        """The function's logits for all tokens except the last, from the row that predicts
        `ids[first]`."""
        rows = self._function(ids[:-1])
        shape = tuple(rows.shape)
        if len(shape) != 2 or shape[0] != len(ids) - 1:
            raise ConfigError(
                f"{self.name} gave logits of shape {list(shape)} for {len(ids) - 1} tokens; [{len(ids) - 1}, V] needed"
            )
        check_ids(ids[first:], shape[1])
        advance(0, len(ids) - 1)
        return rows[first - 1 :]

"""An answer as it is written: tokens in, text out, and why it ended."""

from __future__ import annotations

import time

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tokenizer_tools.characters import first_characters
from ..tokenizer_tools.stream import StopStringMatcher
from ..tokenizer_tools.vocab import Vocabulary
from .completion import Completion, Usage
from .decode import HealedToken, Token
from .prompt import Prompt
from .sampling import SamplingParams
from .token_healing import Continuation


def stop_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-text tokens of a model's generation config and of its tokenizer."""
    configured = getattr(hf.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


class Answer:
    """The text of one answer, its tokens, and its end.

    Attributes:
        prompt_ids: tokens read before the first of the answer.
        tokens: the answer's.
        finish_reason: "stop", "length" or "time" once `done`.
    """

    def __init__(
        self, prompt: Prompt, params: SamplingParams, vocabulary: Vocabulary, stop_ids: frozenset[int]
    ) -> None:
        self._params, self._stop_ids = params, stop_ids
        self._text, self._watch = prompt.text_stream(vocabulary), StopStringMatcher(params.stops)
        self._ends = None if params.max_time is None else time.monotonic() + params.max_time
        self._pieces: list[str] = []
        self._pending = prompt.pending
        self.prompt_ids = prompt.ids
        self.tokens: list[Token] = []
        self.continuation: Continuation | None = None
        self.finish_reason = "length"
        self.done = False

    def push(self, token: Token) -> str:
        """Take the next token; returns the text that is certain now."""
        overlap = 0
        if isinstance(token, HealedToken):
            self.continuation, overlap = token.continuation, token.continuation.overlap
            self.prompt_ids = token.continuation.prompt_ids
        self.tokens.append(token)
        if token.id in self._stop_ids:
            return self._end("stop")
        piece = self._watch.push(self._text.push(token.id, overlap))
        if self._watch.stopped:  # what comes before the stop string is in the piece; nothing is to follow
            self.finish_reason, self.done = "stop", True
        elif len(self.tokens) == self._params.max_new_tokens:
            return self._say(piece) + self._end("length")
        elif self._ends is not None and time.monotonic() > self._ends:
            return self._say(piece) + self._end("time")
        return self._say(piece)

    def _end(self, reason: str) -> str:
        self.finish_reason, self.done = reason, True
        return self._say(self._watch.finish())

    def _say(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece

    @property
    def text(self) -> str:
        """What was written, in whole characters; one that the prompt ends inside is shown whole here."""
        return "".join(self._pieces)

    @property
    def data(self) -> bytes:
        """What was written, in UTF-8, without what is in the prompt; it may begin and end inside a character."""
        every = self._pending + self._text.data
        return (first_characters(every, len(self.text)) if self._watch.cuts else every)[len(self._pending) :]

    def completion(self) -> Completion:
        """What `generate` returns."""
        return Completion(
            text=self.text,
            unfinished=b"" if self._watch.cuts else self._text.unfinished,
            token_ids=[token.id for token in self.tokens],
            finish_reason=self.finish_reason,
            usage=Usage(prompt_tokens=len(self.prompt_ids), completion_tokens=len(self.tokens)),
            logprobs=self.tokens if self._params.logprobs is not None else None,
            continuation=self.continuation,
            sources=[token.source for token in self.tokens if token.source is not None] or None,
        )

"""A conversation with a chat model. What was read stays in a cache, so that a question reads only what is new."""

from __future__ import annotations

from collections import abc
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .cached_session import CachedSession, completed
from .chat_template import Message, chat_ids
from .completion import Completion
from .generation import stream_on_cache
from .prefill import Progress
from .sampling import SamplingParams, with_settings
from .scaled_model import ScaledModel
from .sequence import Sequence


class ChatSession(CachedSession):
    """Messages, with the keys and values of what was read of them. `Model.chat_session` makes one.

        chat = model.chat_session(system="You answer in one sentence.")
        for piece in chat.stream("What is the capital of France?", temperature=0):
            print(piece, end="", flush=True)
        print(chat.ask("And of Italy?").text)

    A question reads only what is new. The model's answers stay in the cache if the template writes them as they were
    generated. When `model.rope` changes, the cached keys are rotated in place.

    Attributes:
        messages: the conversation so far, as dicts with "role" and "content". It may be edited. Its unchanged
            beginning is not read again.
        unread: tokens that the last question had to read.
    """

    _format = "ropewalk chat 3"  # 2 did not say which engine wrote the keys

    def __init__(self, model: ScaledModel, messages: abc.Sequence[Message] = ()) -> None:
        super().__init__(model)
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self.unread = 0

    def __repr__(self) -> str:
        return f"<ChatSession with {self._model.name}, {len(self.messages)} messages, {self.tokens:,} tokens held>"

    def ask(self, text: str, params: SamplingParams | None = None, **settings: Any) -> Completion:
        """Send `text` and return the model's answer. Both become messages.

        Args:
            settings: fields of `SamplingParams`, in place of those of `params`.

        Raises:
            ContextOverflow: the conversation is longer than the scaler reaches, or than memory holds. It stays as it
                was before the question.
        """
        return completed(*self._answer(text, with_settings(params, settings)))

    def stream(
        self, text: str, params: SamplingParams | None = None, *, progress: Progress | None = None, **settings: Any
    ) -> abc.Iterator[str]:
        """The text of `ask`, piece by piece. If it is closed or interrupted, the text so far is the answer. If there is
        none, the question is dropped, too.

        Args:
            progress: as in `Model.stream`, for `unread` tokens in all.
        """
        return self._answer(text, with_settings(params, settings), progress)[1]

    def reset(self) -> None:
        """Remove all messages but a system message at the beginning, and what the cache holds of them."""
        self._end_stream()
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        if not self.messages:
            self._cached.clear()
        elif self._cached.ids:
            model, question = self._model, {"role": "user", "content": "?"}
            beginning = chat_ids([*self.messages, question], model.tokenizer, model.vocabulary)
            self._cached.truncate_to(beginning[: self._cached.shared(beginning)])

    def _answer(
        self, text: str, params: SamplingParams, progress: Progress | None = None
    ) -> tuple[Sequence, abc.Iterator[str]]:
        self._end_stream()
        model = self._model
        if not isinstance(text, str):
            raise ConfigError(f"a message is text, not {type(text).__name__}")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = model.read(chat_ids(messages, model.tokenizer, model.vocabulary), params.continuation)
        answer = self._start(prompt, params, progress, partial(self._stream_answer, messages))
        self.unread = len(prompt.certain_ids) - self._cached.shared(prompt.certain_ids)
        return answer

    def _stream_answer(
        self, messages: list[dict[str, Any]], sequence: Sequence, length: int
    ) -> abc.Generator[str, None, None]:
        finished = False
        try:
            yield from stream_on_cache(self._model, self._cached, sequence, length)
            finished = True
        finally:
            if finished or sequence.text:
                self.messages = [*messages, {"role": "assistant", "content": sequence.text}]

    def _content(self) -> dict[str, Any]:
        return {"messages": self.messages}

    def _restore(self, content: dict[str, Any], path: str | Path) -> None:
        messages = content.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise DataError(f"{path} cannot be read as a chat: its messages are damaged")
        self.messages = messages

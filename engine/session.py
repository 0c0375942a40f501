"""A text that grows, with the keys and values of everything read so far."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..tokenizer_tools.characters import finished_text, first_characters, invalid_runs, unfinished
from ..tokenizer_tools.cover import shared_length
from ..tokenizer_tools.vocabulary import check_text
from .cache import can_rewind
from .cached_session import CachedSession, completed
from .completion import Completion
from .generation import stream_on_cache
from .kv_cache import KVCache
from .prefill import Progress, prefill
from .prompt import Prompt
from .sampling import SamplingParams, with_settings
from .scaled_model import ScaledModel
from .sequence import Sequence

_SHOWN = 60  # characters of the end of the text in `print(session)`


class Session(CachedSession):
    """A text in progress: append to it, continue it, fork it, crop it, save it. `Model.session` makes one.

        with model.session() as chat:
            chat.append(report)
            print(chat.generate("\n\nIn one sentence:", max_new_tokens=40).text)

    Its answers are those that `Model.generate` gives after the whole text, which is not read again. When `model.rope`
    changes, or the length that it depends on, the cached keys are rotated in place. Upper layers keep what they
    computed under the earlier scaler. Every call ends a stream that is in progress; the text of the stream stays.

    An answer may end inside a character. The session holds its bytes and continues after them; `text` shows the
    character when it is whole.
    """

    _format = "ropewalk session 3"  # 2 did not say which engine wrote the keys

    def __init__(self, model: ScaledModel) -> None:
        super().__init__(model)
        self._data = b""  # the text in UTF-8

    @property
    def text(self) -> str:
        """What was appended and what was answered, in whole characters."""
        return finished_text(self._data)

    @text.setter
    def text(self, text: str) -> None:
        check_text(text)
        self._data = text.encode()

    def __str__(self) -> str:
        """The model and scaler, how much is held, and how the text ends."""
        text = self.text
        end = ("..." if len(text) > _SHOWN else "") + text[-_SHOWN:]
        lines = {
            "model": self._model.name,
            "rope": str(self._model.rope),
            "held": f"{self.tokens:,} tokens in the cache, {len(text):,} characters of text",
            "ends": repr(end),
        }
        return "\n".join(f"{name:<5}  {value}" for name, value in lines.items())

    def __repr__(self) -> str:
        return f"<Session of {self._model.name}, {self.tokens:,} tokens held>"

    def append(self, text: str, *, progress: Progress | None = None) -> None:
        """Read more text. The last few tokens are read later, when the text after them is known.

        After an interruption the text is as it was before. What was read of it is not read again.

        Raises:
            ContextOverflow: the text is longer than the scaler reaches, or than memory holds.
        """
        self._end_stream()
        data = self._data_with(text)
        certain_ids = self._read(data).certain_ids
        length = self._model.check_length(len(certain_ids), SamplingParams(max_new_tokens=1), self._cached.cache)
        with self._model.running(length) as runner:  # the scaler must not change between the two
            cache = self._cached.prepare_for(runner, certain_ids, length)
            if not can_rewind(cache):
                certain_ids = certain_ids[:-1]  # an answer runs the last token again, to see what follows it
            if (held := len(self._cached.ids)) < len(certain_ids):
                try:
                    prefill(runner, certain_ids[held:], cache, progress)
                except BaseException:
                    self._cached.truncate_to(certain_ids, interrupted=True)
                    raise
                self._cached.ids = certain_ids
        self._data = data

    def generate(self, text: str = "", params: SamplingParams | None = None, **settings: Any) -> Completion:
        """Append `text` and continue; the answer becomes part of the session.

        After an interruption the text holds what was generated before it.

        Args:
            settings: fields of `SamplingParams`, in place of those of `params`.

        Raises:
            ContextOverflow: the text is longer than the scaler reaches, or than memory holds.
        """
        return completed(*self._answer(text, with_settings(params, settings)))

    def stream(
        self,
        text: str = "",
        params: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece. If it is closed, the text so far stays in the session.

        Args:
            settings: fields of `SamplingParams`, in place of those of `params`.
            progress: as in `Model.stream`.
        """
        return self._answer(text, with_settings(params, settings), progress)[1]

    def _answer(
        self, text: str, params: SamplingParams, progress: Progress | None = None
    ) -> tuple[Sequence, Iterator[str]]:
        self._end_stream()
        data = self._data_with(text)
        prompt = self._read(data, params)
        return self._start(prompt, params, progress, partial(self._stream_answer, data))

    def _stream_answer(self, data: bytes, sequence: Sequence, length: int) -> Generator[str, None, None]:
        before, self._data = self._data, data
        interrupted = True
        try:
            yield from stream_on_cache(self._model, self._cached, sequence, length)
            interrupted = False
        except GeneratorExit:
            interrupted = False
            raise
        finally:
            self._data = data + sequence.data if sequence.tokens or not interrupted else before

    def fork(self) -> Session:
        """An independent session that continues from here. Buffers are copied when one of the two writes."""
        self._end_stream()
        other = Session(self._model)
        other._data = self._data
        if isinstance(self._cached.cache, KVCache):  # transformers' caches are not shared: the fork reads again
            other._cached.hold(self._cached.cache.fork(), list(self._cached.ids), self._cached.rope_state)
        return other

    def crop(self, length: int) -> None:
        """Cut the text to its first `length` characters. An incomplete character at the end is dropped."""
        self._end_stream()
        characters = len(self.text)
        if not 0 <= length <= characters:
            raise ConfigError(f"crop {length} must be between 0 and the session's {characters} characters")
        self._data = first_characters(self._data, length)
        certain_ids = self._read(self._data).certain_ids if self._data else []
        self._cached.truncate_to(self._cached.ids[: shared_length(self._cached.ids, certain_ids)])

    def _content(self) -> dict[str, Any]:
        return {"text": self._data.decode(errors="surrogateescape")}

    def _restore(self, content: dict[str, Any], path: str | Path) -> None:
        try:
            self._data = content["text"].encode(errors="surrogateescape")
        except (KeyError, AttributeError, UnicodeEncodeError) as error:
            raise DataError(f"{path} cannot be read as a session: its text is damaged") from error

    def _data_with(self, text: str) -> bytes:
        check_text(text)
        return self._data + text.encode()

    def _read(self, data: bytes, params: SamplingParams | None = None) -> Prompt:
        continuation = (params or SamplingParams()).continuation
        runs = invalid_runs(data)
        prompt = data if runs or unfinished(data) else data.decode()
        return self._model.read(prompt, continuation, broken=bool(runs))

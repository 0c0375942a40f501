"""A text that grows, with the keys and values of everything read so far."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from pathlib import Path

from ..errors import ConfigError, DataError
from ..tokenizer_tools.characters import finished_text, first_characters, invalid_runs, unfinished
from ..tokenizer_tools.cover import shared_length
from ..tokenizer_tools.vocabulary import check_text
from .cache import can_rewind
from .completion import Completion
from .generation import stream_on_cache
from .kv_cache import KVCache
from .prefill import Progress, prefill
from .prefix_cache import PrefixCache
from .prompt import Prompt
from .sampling import SamplingParams
from .scaled_model import ScaledModel
from .sequence import Sequence
from .session_file import read_session_file, write_session_file

_FORMAT = "ropewalk session 1"
_SHOWN = 60  # characters of the end of the text in `print(session)`


class Session:
    """A text in progress: append to it, continue it, fork it, crop it, save it. `Model.session` makes one.

        with model.session() as chat:
            chat.append(report)
            print(chat.generate("\n\nIn one sentence:").text)

    Its answers are those that `Model.generate` gives after the whole text, which is not read again. When `model.rope`
    changes, or the length that it depends on, the cached keys are rotated in place. Upper layers keep what they
    computed under the earlier scaler. Every call ends a stream that is in progress; the text of the stream stays.

    An answer may end inside a character. The session holds its bytes and continues after them; `text` shows the
    character when it is whole.
    """

    def __init__(self, model: ScaledModel) -> None:
        self._model = model
        self._data = b""  # the text in UTF-8
        self._cached = PrefixCache()
        self._stream: weakref.ref[Generator[str, None, None]] | None = None  # dropping a stream closes it

    @property
    def text(self) -> str:
        """What was appended and what was answered, in whole characters."""
        return finished_text(self._data)

    @text.setter
    def text(self, text: str) -> None:
        check_text(text)
        self._data = text.encode()

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached.ids)

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

    def append(self, text: str, progress: Progress | None = None) -> None:
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

    def generate(self, text: str = "", params: SamplingParams | None = None) -> Completion:
        """Append `text` and continue; the answer becomes part of the session.

        After an interruption the text holds what was generated before it.

        Raises:
            ContextOverflow: the text is longer than the scaler reaches, or than memory holds.
        """
        sequence, pieces = self._start(text, params or SamplingParams())
        for _ in pieces:
            pass
        return sequence.completion()

    def stream(
        self, text: str = "", params: SamplingParams | None = None, progress: Progress | None = None
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece. If it is closed, the text so far stays in the session.

        Args:
            progress: as in `Model.stream`.
        """
        return self._start(text, params or SamplingParams(), progress)[1]

    def _start(
        self, text: str, params: SamplingParams, progress: Progress | None = None
    ) -> tuple[Sequence, Iterator[str]]:
        self._end_stream()
        data = self._data_with(text)
        prompt = self._read(data, params)
        length = self._model.check_length(len(prompt.ids), params, self._cached.cache)
        sequence = Sequence(prompt, params, self._model.vocabulary, self._model.stop_ids, progress=progress)
        pieces = self._stream_answer(data, sequence, length)
        self._stream = weakref.ref(pieces)
        return sequence, pieces

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

    def _end_stream(self) -> None:
        if self._stream is not None and (stream := self._stream()) is not None:
            stream.close()
        self._stream = None

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

    def save(self, path: str | Path) -> None:
        """Write text, keys and values to a `.safetensors` file. `Model.session(path)` continues from it.

        A file at `path` is replaced when the new one is complete.

        Raises:
            ConfigError: the model is not run by the compiled kernels; only their caches can be saved.
            DataError: the file cannot be written.
        """
        self._end_stream()
        content = {"text": self._data.decode(errors="surrogateescape")}
        write_session_file(self._model, path, self._cached, _FORMAT, content)

    def load(self, path: str | Path) -> None:
        """Replace this session's text and cache by those of a file that `save` wrote.

        Raises:
            ConfigError: the model is not run by the compiled kernels.
            ContextOverflow: the session does not fit into memory.
            DataError: the file is not a session, or belongs to another model or kv_dtype. Nothing has changed then.
        """
        self._end_stream()
        header, cached = read_session_file(self._model, path, _FORMAT)
        try:
            data = header["text"].encode(errors="surrogateescape")
        except (KeyError, AttributeError, UnicodeEncodeError) as error:
            raise DataError(f"{path} cannot be read as a session: its text is damaged") from error
        self._data, self._cached = data, cached

    def close(self) -> None:
        """Free the cache; the text stays."""
        self._end_stream()
        self._cached.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _data_with(self, text: str) -> bytes:
        check_text(text)
        return self._data + text.encode()

    def _read(self, data: bytes, params: SamplingParams | None = None) -> Prompt:
        continuation = (params or SamplingParams()).continuation
        runs = invalid_runs(data)
        prompt = data if runs or unfinished(data) else data.decode()
        return self._model.read(prompt, continuation, broken=bool(runs))

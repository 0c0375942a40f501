"""The model object: text in, text out."""

from __future__ import annotations

from collections import abc
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..errors import ConfigError, DataError, Setting
from ..scaling.rope import Scaler
from ..tokenizer_tools.cover import Cover, cover
from ..tokenizer_tools.vocabulary import check_text
from . import tuned_scalers
from .batch import Batch, generate_tokens
from .cache import tokens_read
from .chat_session import ChatSession
from .chat_template import Message, chat_ids
from .completion import Completion, Score
from .generation import complete_all
from .nbce import NBCE, PooledSequence, check_pooling, complete_pooled
from .prefill import Progress, score
from .prefix_cache import ContextCaches
from .prompt import token_ids
from .rope_plan import RopePlan
from .rotary_site import rotary_sites
from .runners.choose import RunnerOptions, choose_runner
from .runners.runner import RopeState
from .sampling import SamplingParams, with_settings
from .scaled_model import ScaledModel
from .sequence import Sequence
from .session import Session
from .token_healing import text_logprob, weigh

Pooling = Literal["entropy", "mean", "max"] | NBCE


class Model(ScaledModel):
    """A causal language model with its tokenizer and a position scaler. `ropewalk.load` makes one."""

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        rope: str | Scaler | None = None,
        max_length: int | None = None,
        options: RunnerOptions | None = None,
        special_tokens: bool = False,
    ) -> None:
        sites = rotary_sites(hf)
        runner = choose_runner(hf, sites, options or RunnerOptions(compile=False))
        super().__init__(
            hf, tokenizer, sites, runner, name=name, rope=rope, max_length=max_length, special_tokens=special_tokens
        )
        self._written_under: WeakKeyDictionary[Cache, RopeState] = WeakKeyDictionary()  # the callers' caches

    @cached_property
    def _contexts(self) -> ContextCaches:
        return ContextCaches()

    @overload
    def generate(
        self,
        prompt: str | bytes,
        params: SamplingParams | None = None,
        *,
        contexts: abc.Sequence[str] | None = None,
        pooling: Pooling = "entropy",
        **settings: Any,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        params: SamplingParams | None = None,
        *,
        contexts: abc.Sequence[str] | None = None,
        pooling: Pooling = "entropy",
        **settings: Any,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: str | bytes | list[str],
        params: SamplingParams | None = None,
        *,
        contexts: abc.Sequence[str] | None = None,
        pooling: Pooling = "entropy",
        **settings: Any,
    ) -> Completion | list[Completion]:
        """Continue `prompt`; a list in, a list out. Bytes may end inside a character.

            model.generate("Once upon a time", max_new_tokens=20, temperature=0).text
            model.generate("Question: Who found it?\nAnswer:", contexts=[report, diary, letter]).sources

        Args:
            contexts: texts that are read separately, each followed by the prompt as a question; see `NBCE`. Their
                caches are reused for the next question, until it has other contexts or another scaler, or
                `clear_contexts` is called.
            pooling: how their answers become one: "entropy", "mean", "max", or an `NBCE` with its parameters.
            settings: fields of `SamplingParams`, in place of those of `params`.

        Raises:
            ContextOverflow: prompt and `max_new_tokens` exceed `max_length`.
            OutOfMemory: memory ran out; its `finished` holds the answers of a list that were complete.
        """
        params = with_settings(params, settings)
        check_pooling(pooling, contexts)
        if contexts is not None:
            questions = prompt if isinstance(prompt, list) else [prompt]
            answers = complete_pooled(self.over_contexts(each, contexts, pooling, params) for each in questions)
            return answers if isinstance(prompt, list) else answers[0]
        if isinstance(prompt, list):
            return complete_all(self, [self.read(text, params.continuation) for text in prompt], params)
        sequence = self._sequence(prompt, params)
        length = self.check_length(len(sequence.prompt.ids), params)
        for _ in generate_tokens(Batch(self, [sequence], length)):
            pass
        return sequence.completion()

    def stream(
        self,
        prompt: str | bytes,
        params: SamplingParams | None = None,
        *,
        contexts: abc.Sequence[str] | None = None,
        pooling: Pooling = "entropy",
        progress: Progress | None = None,
        **settings: Any,
    ) -> abc.Iterator[str]:
        """The text of `generate`, piece by piece.

        Args:
            settings: fields of `SamplingParams`, in place of those of `params`.
            progress: called while the prompt is read, with the tokens in the cache before a step and those of the step.
        """
        params = with_settings(params, settings)
        check_pooling(pooling, contexts)
        if contexts is not None:
            return self.over_contexts(prompt, contexts, pooling, params, progress).pieces()
        sequence = self._sequence(prompt, params, progress=progress)
        length = self.check_length(len(sequence.prompt.ids), params)
        return _texts(Batch(self, [sequence], length))

    def chat(
        self, messages: abc.Sequence[Message], params: SamplingParams | None = None, **settings: Any
    ) -> Completion:
        """The assistant's answer to messages, by the model's chat template.

            model.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0).text

        Args:
            messages: dicts with "role" ("system", "user", "assistant") and "content". Names of special tokens in them
                are plain text.
            settings: fields of `SamplingParams`, in place of those of `params`.

        Raises:
            ConfigError: the model has no chat template, or it refuses the messages.
            ContextOverflow: as `generate`.
        """
        return self.generate_ids(chat_ids(messages, self.tokenizer, self.vocabulary), with_settings(params, settings))

    def stream_chat(
        self,
        messages: abc.Sequence[Message],
        params: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> abc.Iterator[str]:
        """The text of `chat`, piece by piece. Arguments as for `chat` and `stream`."""
        params, ids = with_settings(params, settings), chat_ids(messages, self.tokenizer, self.vocabulary)
        sequence = self._sequence(ids, params, progress=progress)
        return _texts(Batch(self, [sequence], self.check_length(len(ids), params)))

    def chat_session(self, system: str | None = None, *, path: str | Path | None = None) -> ChatSession:
        """A conversation that stays in a cache, so that a question reads only what is new.

        Args:
            system: the system message, which tells the model how to answer.
            path: a file of `ChatSession.save` to continue from. It has its own system message.

        Raises:
            ConfigError: both are given.
            DataError: the file is not a chat of this model.
        """
        if system is not None and path is not None:
            raise ConfigError("a stored chat has its own system message; leave out ", Setting("system", form="name"))
        session = ChatSession(self, [] if system is None else [{"role": "system", "content": system}])
        if path is not None:
            session.load(path)
        return session

    def over_contexts(
        self,
        question: str | bytes,
        contexts: abc.Sequence[str],
        pooling: Pooling,
        params: SamplingParams,
        progress: Progress | None = None,
        plan: RopePlan | None = None,
    ) -> PooledSequence:
        """An answer over contexts that has not begun. Iterate over its `pieces()`; `tokens` then have their sources."""
        if not isinstance(question, str):
            raise ConfigError(f"with contexts the prompt is text, not {type(question).__name__}")
        nbce = pooling if isinstance(pooling, NBCE) else NBCE(pooling=pooling)
        return PooledSequence(self, question, contexts, nbce, params, self._contexts, progress, plan)

    def clear_contexts(self) -> None:
        """Free the caches of the last question's contexts."""
        self._contexts.clear()

    def session(self, path: str | Path | None = None) -> Session:
        """A text that grows and is not read twice. `path` is a file of `Session.save`; None begins an empty text.

        Raises:
            DataError: the file is not a session of this model.
        """
        session = Session(self)
        if path is not None:
            session.load(path)
        return session

    def remember(self, tuned: tuned_scalers.TunedScaler) -> Path:
        """Store a tuned scaler, which "auto" uses for this model from now on. Returns the file.

            result = rw.tune(model, "2x", text="book.txt")
            model.remember(result.as_stored(text="book.txt"))
            model.rope = "auto"

        Args:
            tuned: replaces what is stored for the same target.

        Raises:
            AssetError: the cache folder cannot be written.
            DataError: the existing file is damaged.
        """
        path = tuned_scalers.store(self.checkpoint_fingerprint, self.name, tuned)
        if self.plan.choice is not None:
            self.rope = self.rope
        return path

    def next_byte_logprobs(self, text: str | bytes) -> Tensor:
        """Log-probabilities of the next byte after `text`, over all tokenizations: float32 [257], nats.

        Index 256 is the end of the text. Exact as `logprob` is.
        """
        covers = self._cover(text)
        length = len(covers.prompt) + 1
        with self.running(length) as runner:
            distribution = weigh(runner, covers, self.tokenizer.bos_token_id, self.new_cache(length), self.vocabulary)
            return distribution.next_byte_logprobs(self.vocabulary)

    def logprob(self, text: str | bytes, given: str | bytes = "") -> float:
        """Log-probability that a text which begins with `given` continues with `text`, nats.

        The sum over all token sequences that the tokenizer can make of such texts, so it depends on the text alone.
        Divided by the bytes of the text it compares models with different tokenizers. If no token of `given` is
        certain, the texts begin with the tokenizer's start token.
        """
        beginning = _utf8(given)
        before, after = self._cover(beginning), self._cover(beginning + _utf8(text))
        start = None if before.common_prefix else self.tokenizer.bos_token_id
        length = len(after.prompt) + 1
        with self.running(length) as runner:
            whole, beginning_alone = (  # a text that begins with `given` begins with its certain tokens
                text_logprob(runner, covers, start, len(before.common_prefix), self.new_cache(length), self.vocabulary)
                for covers in (after, before)
            )
        return whole - beginning_alone

    def score(self, text: str) -> Score:
        """Log-probability of every token of `text` but the first, given all before it.

        Any length is scored, also beyond `max_length`.
        """
        ids = self._encode(text)
        if len(ids) < 2:
            raise DataError(f"{text!r} is {len(ids)} token(s); scoring needs at least 2")
        return Score(token_ids=ids, logprobs=self.score_ids(ids), text_bytes=len(text.encode()))

    def score_ids(
        self,
        ids: list[int],
        first: int = 1,
        progress: Progress | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Log-probabilities of `ids[first:]` given all before each, float32 [len(ids) - first] on the CPU.

        An empty `cache` (`new_cache`) holds `ids[:-1]` afterwards.

        Raises:
            ConfigError: the cache is not empty.
            DataError: there are fewer than 2 ids, none from `first` on, or one that the model does not have.
        """
        ids = token_ids(ids, self.vocabulary_size)
        if not 1 <= first < len(ids):
            raise DataError(f"first {first} of {len(ids)} token ids: it must be at least 1 and below their number")
        with self.running(len(ids)) as runner:
            if cache is None:
                cache = self.new_cache(len(ids))
            if held := tokens_read(cache):
                raise ConfigError(f"the cache holds {held} tokens, and scoring begins at the first; give an empty one")
            self._written_under[cache] = runner.rope_state
            return score(runner, ids, first, cache, progress).cpu()

    def generate_ids(self, ids: list[int], params: SamplingParams, cache: Cache | None = None) -> Completion:
        """Continue token ids. `cache` may hold their beginning, written under the scaler in use.

        The answer begins where the ids end, unless `params.continuation` is "exact".

        Raises:
            ConfigError: the cache was written under another scaler, or for another length where the scaler depends on
                it.
            DataError: the model has no such token.
        """
        sequence = self._sequence(ids, params, cache)
        length = self.check_length(len(sequence.prompt.ids), params, cache)
        if cache is not None:
            self._check_written(cache, length)
        for _ in generate_tokens(Batch(self, [sequence], length)):
            pass
        return sequence.completion()

    def _check_written(self, cache: Cache, length: int) -> None:
        """Refuse a cache whose keys are rotated for other positions than those of a text of `length` tokens."""
        with self.running(length) as runner:
            before, now = self._written_under.get(cache), runner.rope_state
            if before is not None and before != now and tokens_read(cache):
                raise ConfigError(
                    f"the cache was written under {_shown(before)}, and a text of {length} tokens is read under "
                    f"{_shown(now)}; give an empty one, or use model.session(), which rotates its keys"
                )
            self._written_under[cache] = now

    def _sequence(
        self,
        prompt: str | bytes | list[int],
        params: SamplingParams,
        cache: Cache | None = None,
        progress: Progress | None = None,
    ) -> Sequence:
        read = self.read(prompt, params.continuation)
        return Sequence(read, self.resolved(params), self.vocabulary, self.stop_ids, cache, progress)

    def _cover(self, text: str | bytes) -> Cover:
        covers = cover(self.vocabulary, text)
        self.vocabulary.checked(list(covers.prompt))
        return covers

    def _encode(self, text: str) -> list[int]:
        check_text(text)
        return self.vocabulary.encode(text)


def _texts(batch: Batch) -> abc.Iterator[str]:
    return (piece for pieces in generate_tokens(batch) for _, piece in pieces if piece)


def _shown(state: RopeState) -> str:
    scaler, length = state
    return str(scaler) if length is None else f"{scaler} for {length} tokens"


def _utf8(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    check_text(text)
    return text.encode()

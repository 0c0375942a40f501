"""The model object: text in, text out."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..errors import ConfigError, ContextOverflow, DataError
from ..scaling.auto import Auto
from ..scaling.lengths import format_length
from ..scaling.rope import RopeSpec, Scaler
from ..scaling.spec import parse
from ..tokenizer_tools.cover import Cover, cover
from ..tokenizer_tools.vocab import Vocabulary, check_text, vocabulary
from . import identity, tuned_scalers
from .answer import Answer, stop_ids
from .auto import Choice
from .completion import Completion, Score
from .generation import generate_all, pieces
from .nbce import NBCE
from .patches.scaler_slot import ScalerSlot
from .pooled import ContextCaches, PooledAnswer, answer_all
from .prefill import Progress
from .prompt import Prompt, token_ids
from .rotary_site import primary_rotary, rotary_sites
from .runners.choose import RunnerOptions, choose_runner
from .runners.runner import token_rows
from .sampling import Continuing, SamplingParams
from .score import score
from .session import Session
from .token_healing import text_logprob, weigh

Pooling = Literal["entropy", "mean", "max"] | NBCE

_LONGEST_MARK = 64  # characters of the name of a special token, which the vocabulary's trie does not hold


class Model:
    """A causal language model with its tokenizer and a position scaler. `ropewalk.load` makes one.

    Attributes:
        hf: the transformers model underneath.
        tokenizer: its tokenizer.
        network: what runs it: our compiled kernels, or the model's own modules.
        name: what it was loaded as.
        sites: its rotary modules, verified against its config.
        turn: held while the network runs under what was prepared for a request, so that threads take turns.
    """

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
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self._max_length, self._special_tokens = max_length, special_tokens
        self.sites = rotary_sites(hf)
        self.runner = choose_runner(hf, self.sites, options or RunnerOptions(compile=False))
        self._scaler_slot = ScalerSlot(hf, self.sites, self.runner)
        self.lock = threading.RLock()
        self.rope = rope
        self._contexts = ContextCaches(self)

    @property
    def rope(self) -> Scaler:
        """The scaler in use. Assign a scaler or a spec string to change it: `model.rope = "yarn:4"`.

        "auto" chooses one for the length of every request; see `rope_at`.
        """
        return self._rope

    @rope.setter
    def rope(self, scaler: str | Scaler | None) -> None:
        wanted, choice = parse(scaler, self.trained_length), None
        with self.lock:
            if isinstance(wanted, Auto):
                choice = Choice.of(
                    self.spec, self.trained_length, tuned_scalers.read(self.identity), self._scaler_slot.takes
                )
            else:
                self._scaler_slot.put(wanted)
            self._rope, self._choice = wanted, choice
            self.prepare(None)

    def rope_at(self, length: int | None) -> Scaler:
        """The scaler for a request of `length` tokens: `rope`, or what "auto" stands for there."""
        return self._rope if self._choice is None else self._choice.at(length)

    @property
    def spec(self) -> RopeSpec:
        """The model's rotary geometry: dimension, base, trained length."""
        return primary_rotary(self.sites).configured.rope

    @property
    def vocabulary_size(self) -> int:
        """Tokens that the model has; the tokenizer may make fewer, or more."""
        return token_rows(self.hf)

    @property
    def trained_length(self) -> int:
        """Tokens that the model reads without any scaler of ours; what `2x` is a multiple of."""
        return primary_rotary(self.sites).configured.max_length

    @property
    def max_length(self) -> int:
        """Most tokens `generate` accepts, prompt and answer together: the scaler's reach unless set."""
        if self._max_length is not None:
            return self._max_length
        return int(self._reach) if math.isfinite(self._reach) else 2**31

    @property
    def _reach(self) -> float:
        return primary_rotary(self.sites).configured.reach(self._rope) if self._choice is None else math.inf

    def describe(self) -> str:
        """What runs the model, in a few lines."""
        reach, configured = self._reach, primary_rotary(self.sites).configured
        rope = str(self.rope) if self._choice is None else f"{self.rope}: {self._choice}"
        if configured.own:
            rope += (
                f", {'in place of' if self.rope.member('frequencies') else 'over'} the config's own {configured.own}"
            )
        lines = {
            "model": f"{self.name} ({type(self.hf).__name__}, {self.hf.num_parameters() / 1e6:.0f}M parameters)",
            "run by": self.runner.how,
            "rope": rope,
            "reach": "any length" if math.isinf(reach) else f"{format_length(int(reach))} tokens",
            "trained": f"{format_length(configured.rope.trained_length)} tokens{configured.stretched}",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens as bytes.

        Raises:
            UnsupportedModel: they are not pieces of the text's bytes.
        """
        return vocabulary(self.tokenizer, special_tokens=self._special_tokens, rows=self.vocabulary_size)

    @overload
    def generate(
        self,
        prompt: str | bytes,
        params: SamplingParams | None = None,
        *,
        contexts: Sequence[str] | None = None,
        pooling: Pooling = "entropy",
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        params: SamplingParams | None = None,
        *,
        contexts: Sequence[str] | None = None,
        pooling: Pooling = "entropy",
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: str | bytes | list[str],
        params: SamplingParams | None = None,
        *,
        contexts: Sequence[str] | None = None,
        pooling: Pooling = "entropy",
    ) -> Completion | list[Completion]:
        """Continue `prompt`; a list in, a list out. Bytes may end inside a character.

            model.generate("Question: Who found it?\nAnswer:", contexts=[report, diary, letter]).sources

        Args:
            contexts: texts that are read one by one, each with the prompt as a question behind it; see `NBCE`. What was
                read of them is kept for the next question, until other contexts come or `clear_contexts` is called.
            pooling: how their answers become one: "entropy", "mean", "max", or an `NBCE` with all that can be set.

        Raises:
            ContextOverflow: prompt and `max_new_tokens` exceed `max_length`.
            OutOfMemory: memory ran out; its `finished` holds the answers to a list that were done.
        """
        params = params or SamplingParams()
        if contexts is not None:
            questions = prompt if isinstance(prompt, list) else [prompt]
            answers = answer_all(self.over_contexts(question, contexts, pooling, params) for question in questions)
            return answers if isinstance(prompt, list) else answers[0]
        if isinstance(prompt, list):
            return generate_all(self, [self.read(one, params.continuation) for one in prompt], params)
        return self._complete(self.read(prompt, params.continuation), params)

    def stream(
        self,
        prompt: str | bytes,
        params: SamplingParams | None = None,
        *,
        contexts: Sequence[str] | None = None,
        pooling: Pooling = "entropy",
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece as it is decided."""
        params = params or SamplingParams()
        if contexts is not None:
            return self.over_contexts(prompt, contexts, pooling, params).pieces()
        read = self.read(prompt, params.continuation)
        return pieces(self, read, params, Answer(read, params, self.vocabulary, self.stop_ids))

    def over_contexts(
        self, question: str | bytes, contexts: Sequence[str], pooling: Pooling, params: SamplingParams
    ) -> PooledAnswer:
        """An answer over contexts, to be written: what `generate` and `stream` do with it shows each token's source."""
        if not isinstance(question, str):
            raise ConfigError(f"with contexts the prompt is text, not {type(question).__name__}")
        nbce = pooling if isinstance(pooling, NBCE) else NBCE(pooling=pooling)
        return PooledAnswer(self, question, contexts, nbce, params, self._contexts)

    def clear_contexts(self) -> None:
        """Give back the memory that the contexts of the last question hold."""
        self._contexts.clear()

    def session(self, path: str | Path | None = None) -> Session:
        """A text that grows and is never read twice; from a file that `Session.save` wrote, if one is given.

        Raises:
            DataError: the file is no session of this model.
        """
        session = Session(self)
        if path is not None:
            session.load(path)
        return session

    @cached_property
    def fingerprint(self) -> str:
        """What tells this model's caches from those of others: a hash of its config and of some of all its weights."""
        return identity.fingerprint(self.hf, self.runner.weights)

    @cached_property
    def identity(self) -> str:
        """What tells this model from others, in whatever dtype it runs: a hash as `fingerprint` is."""
        return identity.identity(self.hf)

    def remember(self, found: tuned_scalers.TuningResult, *, text: str) -> Path:
        """Keep what `tune` found, so that "auto" takes it for this model from now on; returns the file.

            found = rw.tune(model, "2x", text="book.txt")
            model.remember(found, text="book.txt")
            model.rope = "auto"

        Args:
            found: replaces what is kept for the same target.
            text: what it was measured on, as `describe` shall tell it.

        Raises:
            AssetError: the cache folder cannot be written.
            DataError: the file that is there is damaged.
        """
        path = tuned_scalers.store(self.identity, self.name, tuned_scalers.TunedScaler.of(found, text))
        if self._choice is not None:
            self.rope = self._rope
        return path

    def next_byte_logprobs(self, text: str | bytes) -> Tensor:
        """The law of the byte that follows `text`, whatever tokens it takes: float32 [257], nats.

        Index 256 is the end of the text. Exact as `logprob` is.
        """
        covers = self._cover(text)
        length = len(covers.prompt) + 1
        with self.lock, torch.inference_mode():
            self.prepare(length)
            weighed = weigh(self.runner, covers, self.tokenizer.bos_token_id, self.new_cache(length), self.vocabulary)
            return weighed.next_byte_logprobs(self.vocabulary)

    def logprob(self, continuation: str | bytes, given: str | bytes = "") -> float:
        """Log-probability that a text which begins with `given` goes on with `continuation`, nats.

        The sum over all token sequences of such texts that the tokenizer can make, so it depends on the text alone:
        divided by its bytes it compares models with different tokenizers. Where no token of `given` is certain, the
        texts begin with the tokenizer's start token.
        """
        text = [_utf8(part) for part in (given, continuation)]
        before, after = self._cover(text[0]), self._cover(b"".join(text))
        start = None if before.common_prefix else self.tokenizer.bos_token_id
        length = len(after.prompt) + 1
        with self.lock, torch.inference_mode():
            self.prepare(length)
            long, short = (  # a text that begins with `given` begins with its trunk
                text_logprob(
                    self.runner, one, start, len(before.common_prefix), self.new_cache(length), self.vocabulary
                )
                for one in (after, before)
            )
        return long - short

    def score(self, text: str) -> Score:
        """Log-probability of every token of `text` but the first, given all before it.

        Any length is scored: past `max_length` too, which is how one sees what happens there.
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

        Give an empty `cache` (`new_cache`) to go on from there: it holds `ids[:-1]` afterwards.

        Raises:
            DataError: there are fewer than 2 ids, none from `first` on, or one that the model has not.
        """
        ids = token_ids(ids, self.vocabulary_size)
        if not 1 <= first < len(ids):
            raise DataError(
                f"first {first} of {len(ids)} token ids: there has to be one before it, and it has to exist"
            )
        with self.lock, torch.inference_mode():
            self.prepare(len(ids))
            if cache is None:
                cache = self.new_cache(len(ids))
            return score(self.runner, ids, first, cache, progress).cpu()

    def new_cache(self, capacity: int) -> Cache:
        """An empty key-value cache for one sequence of about `capacity` tokens."""
        return self.runner.new_cache(capacity)

    def generate_ids(self, ids: list[int], params: SamplingParams, cache: Cache | None = None) -> Completion:
        """Continue token ids. `cache` may hold their beginning, written under the scaler in use.

        The answer begins where the ids end, unless `params.continuation` is "exact".

        Raises:
            DataError: the model has no such token.
        """
        return self._complete(self.read(ids, params.continuation), params, cache)

    def _complete(self, prompt: Prompt, params: SamplingParams, cache: Cache | None = None) -> Completion:
        answer = Answer(prompt, params, self.vocabulary, self.stop_ids)
        for _ in pieces(self, prompt, params, answer, cache):
            pass
        return answer.completion()

    def _cover(self, text: str | bytes) -> Cover:
        found = cover(self.vocabulary, text)
        self.vocabulary.checked(list(found.prompt))
        return found

    def _encode(self, text: str) -> list[int]:
        check_text(text)
        return self.vocabulary.encode(text)

    def read(self, prompt: str | bytes | list[int], continuation: Continuing, *, broken: bool = False) -> Prompt:
        """A prompt as the decode loop takes it.

        Args:
            broken: as for `Prompt.read`.

        Raises:
            ContextOverflow: its text is longer than `max_length` tokens can be. Tokenizing that might take minutes.
            ConfigError: it is neither text nor token ids.
            DataError: the model has no such token.
        """
        longest = max(self.vocabulary.trie.longest, _LONGEST_MARK)
        if not isinstance(prompt, str | bytes | bytearray | memoryview):
            prompt = token_ids(prompt, self.vocabulary_size)
        elif len(prompt) > self.max_length * longest:
            raise ContextOverflow(
                f"the prompt has {len(prompt):,} characters, more than {format_length(self.max_length)} tokens of at "
                f"most {longest} bytes can hold, which {self.name} reaches with rope {str(self.rope)!r}; shorten it"
            )
        return Prompt.read(prompt, self.tokenizer, self.vocabulary, continuation, broken=broken)

    def prepare(self, length: int | None) -> None:
        """Make the scaler in use ready for a sequence of `length` tokens."""
        scaler = self.rope_at(length)
        if scaler != self._scaler_slot.scaler:
            self._scaler_slot.put(scaler, remember=True)
        self._scaler_slot.prepare(length)

    @property
    def stop_ids(self) -> frozenset[int]:
        """End-of-text tokens of the model's generation config and of its tokenizer."""
        return stop_ids(self.hf, self.tokenizer)


def _utf8(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    check_text(text)
    return text.encode()

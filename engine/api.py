"""The model object: text in, text out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..errors import ContextOverflow, DataError, PatchError
from ..scaling.lengths import format_length
from ..scaling.rope import RopeSpec, Scaler
from ..scaling.spec import parse
from ..tokenizer_tools.cover import cover
from ..tokenizer_tools.stream import StopWatch
from ..tokenizer_tools.vocab import Vocabulary, vocabulary
from .completion import Completion, Score, Usage
from .decode import OpeningToken, Token, decode
from .networks import Settings, network
from .opening import Continuation, text_logprob, weigh
from .patch import install
from .prefill import Progress
from .prompt import Prompt
from .rotary import headline, rotary_sites
from .sampling import SamplingParams
from .score import score


@dataclass
class _Outcome:
    """Filled in while a completion is streamed."""

    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = "length"
    continuation: Continuation | None = None


class Model:
    """A causal language model with its tokenizer and a position scaler. `ropewalk.load` makes one.

    Attributes:
        hf: the transformers model underneath.
        tokenizer: its tokenizer.
        network: what runs it: our compiled kernels, or the model's own modules.
        name: what it was loaded as.
        sites: its rotary modules, verified against its config.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        rope: str | Scaler | None = None,
        max_length: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self._max_length = max_length
        self.sites = rotary_sites(hf)
        self.network = network(hf, self.sites, settings or Settings(compile=False))
        self._installed = install(hf, self.sites, parse(rope), grows=False)
        self._write(None)

    @property
    def rope(self) -> Scaler:
        """The scaler in use. Assign a scaler or a spec string to change it: `model.rope = "yarn:4"`."""
        return self._installed.scaler

    @rope.setter
    def rope(self, scaler: str | Scaler | None) -> None:
        wanted, before = parse(scaler), self.rope
        self._installed.restore()
        try:
            self._installed = install(self.hf, self.sites, wanted, grows=False)
        except BaseException:  # Ctrl-C too, or the model would run under none while `rope` names another
            self._installed = install(self.hf, self.sites, before, grows=False)
            raise
        self._write(None)

    @property
    def spec(self) -> RopeSpec:
        """The model's rotary geometry: dimension, base, trained length."""
        return headline(self.sites).configured.rope

    @property
    def trained_length(self) -> int:
        """Tokens that the model reads without any scaler of ours; what `2x` is a multiple of."""
        return headline(self.sites).configured.max_length

    @property
    def max_length(self) -> int:
        """Most tokens `generate` accepts, prompt and answer together: the scaler's reach unless set."""
        if self._max_length is not None:
            return self._max_length
        reach = headline(self.sites).reach(self.rope)
        return int(reach) if math.isfinite(reach) else 2**31

    def describe(self) -> str:
        """What runs the model, in a few lines."""
        reach = headline(self.sites).reach(self.rope)
        lines = {
            "model": f"{self.name} ({type(self.hf).__name__}, {self.hf.num_parameters() / 1e6:.0f}M parameters)",
            "run by": self.network.how,
            "rope": str(self.rope),
            "reach": "any length" if math.isinf(reach) else f"{format_length(int(reach))} tokens",
            "trained": f"{format_length(self.trained_length)} tokens",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens as bytes.

        Raises:
            UnsupportedModel: they are not pieces of the text's bytes.
        """
        return vocabulary(self.tokenizer)

    @overload
    def generate(self, prompt: str | bytes, params: SamplingParams | None = None) -> Completion: ...
    @overload
    def generate(self, prompt: list[str], params: SamplingParams | None = None) -> list[Completion]: ...
    def generate(
        self, prompt: str | bytes | list[str], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """Continue `prompt`; a list in, a list out. Bytes may end inside a character.

        Raises:
            ContextOverflow: prompt and `max_new_tokens` exceed `max_length`.
        """
        params = params or SamplingParams()
        if isinstance(prompt, list):
            return [self.generate(one, params) for one in prompt]
        return self._complete(self._prompt(prompt, params), params)

    def stream(self, prompt: str | bytes, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of `generate`, piece by piece as it is decided."""
        params = params or SamplingParams()
        return self._pieces(self._prompt(prompt, params), params, _Outcome())

    def next_byte_logprobs(self, text: str | bytes) -> Tensor:
        """The law of the byte that follows `text`, whatever tokens it takes: float32 [257], nats.

        Index 256 is the end of the text. Exact as `logprob` is.
        """
        covers = cover(self.vocabulary, text)
        length = len(covers.prompt) + 1
        self._write(length)
        with torch.inference_mode():
            weighed = weigh(self.network, covers, self.tokenizer.bos_token_id, self.new_cache(length), self.vocabulary)
            return weighed.next_byte_logprobs(self.vocabulary)

    def logprob(self, continuation: str | bytes, given: str | bytes = "") -> float:
        """Log-probability that a text which begins with `given` goes on with `continuation`, nats.

        The sum over all token sequences of such texts that the tokenizer can make, so it depends on the text alone:
        divided by its bytes it compares models with different tokenizers. Where no token of `given` is certain, the
        texts begin with the tokenizer's start token.
        """
        text = [part.encode() if isinstance(part, str) else part for part in (given, continuation)]
        before, after = cover(self.vocabulary, text[0]), cover(self.vocabulary, b"".join(text))
        start = None if before.trunk else self.tokenizer.bos_token_id
        length = len(after.prompt) + 1
        self._write(length)
        with torch.inference_mode():
            long, short = (  # a text that begins with `given` begins with its trunk
                text_logprob(self.network, one, start, len(before.trunk), self.new_cache(length), self.vocabulary)
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
        """
        self._write(len(ids))
        if cache is None:
            cache = self.new_cache(len(ids))
        with torch.inference_mode():
            return score(self.network, ids, first, cache, progress).cpu()

    def new_cache(self, capacity: int) -> Cache:
        """An empty key-value cache for one sequence of about `capacity` tokens."""
        return self.network.new_cache(capacity)

    def generate_ids(self, ids: list[int], params: SamplingParams, cache: Cache | None = None) -> Completion:
        """Continue token ids. `cache` may hold their beginning, written under the scaler in use.

        The answer begins where the ids end, unless `params.continuation` is "exact".
        """
        return self._complete(self._prompt(ids, params), params, cache)

    def _complete(self, prompt: Prompt, params: SamplingParams, cache: Cache | None = None) -> Completion:
        outcome = _Outcome()
        text = "".join(self._pieces(prompt, params, outcome, cache))
        continuation = outcome.continuation
        read = prompt.ids if continuation is None else continuation.prompt_ids
        return Completion(
            text=text,
            token_ids=[token.id for token in outcome.tokens],
            finish_reason=outcome.finish_reason,
            usage=Usage(prompt_tokens=len(read), completion_tokens=len(outcome.tokens)),
            logprobs=outcome.tokens if params.logprobs is not None else None,
            continuation=continuation,
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False).input_ids
        return ids

    def _prompt(self, prompt: str | bytes | list[int], params: SamplingParams) -> Prompt:
        return Prompt.read(prompt, self.tokenizer, self.vocabulary, params.continuation)

    def _write(self, length: int | None) -> None:
        """Make the scaler in use ready for a sequence of `length` tokens."""
        self._installed.write(length)
        self.network.use(self.rope, length)

    def _check_length(self, ids: list[int], params: SamplingParams) -> int:
        """Tokens of prompt and answer together; ContextOverflow if they are too many."""
        total = len(ids) + params.max_new_tokens
        if total > self.max_length:
            factor = math.ceil(total / self.spec.trained_length)
            raise ContextOverflow(
                f"{len(ids)} prompt tokens and max_new_tokens {params.max_new_tokens} make {total}, more than the "
                f"{format_length(self.max_length)} that {self.name} reaches with rope {str(self.rope)!r}; set "
                f'model.rope = "yarn:{factor}", shorten the prompt, or load with max_length={total} to go there anyway'
            )
        return total

    def _stop_ids(self) -> frozenset[int]:
        """End-of-text tokens of the model's generation config and of its tokenizer."""
        configured = getattr(self.hf.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def _pieces(
        self, prompt: Prompt, params: SamplingParams, outcome: _Outcome, cache: Cache | None = None
    ) -> Iterator[str]:
        length, installed = self._check_length(prompt.ids, params), self._installed
        stop_ids = self._stop_ids()
        text, watch = prompt.text_stream(self.vocabulary), StopWatch(params.stops)
        weigh = prompt.weigher(self.network, self.vocabulary, params.repetition_penalty)
        tokens = decode(self.network, prompt.ids, params, stop_ids, cache, weigh)
        while True:
            if self._installed is not installed:
                raise PatchError(
                    f"the scaler was changed from {installed.scaler} to {self.rope} while a text was being streamed; "
                    "finish the stream first, or start it again"
                )
            self._write(length)  # another request may have run since, and its frequencies are not ours
            with torch.inference_mode():
                token = next(tokens, None)
            if token is None:
                break
            overlap = 0
            if isinstance(token, OpeningToken):
                outcome.continuation, overlap = token.continuation, token.continuation.overlap
            outcome.tokens.append(token)
            if token.id in stop_ids:
                outcome.finish_reason = "stop"
                break
            if piece := watch.push(text.push(token.id, overlap)):
                yield piece
            if watch.stopped:
                outcome.finish_reason = "stop"
                return
        if piece := watch.push(text.finish()) + watch.finish():
            yield piece

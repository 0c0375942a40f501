"""A model with its tokenizer and the scaler in use: the only way to its runner."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..errors import ConfigError, ContextOverflow, PatchError, Setting
from ..scaling.lengths import format_length
from ..scaling.rope import RopeSpec, Scaler
from ..scaling.spec import Auto, parse
from ..tokenizer_tools.vocabularies import vocabulary
from ..tokenizer_tools.vocabulary import Vocabulary
from . import hf_model, tuned_scalers
from .auto import Choice
from .hf_model import stop_ids
from .kv_cache import owned_tokens
from .patches.scaler_slot import ScalerSlot
from .prompt import Prompt, token_ids
from .rope_plan import RopePlan
from .rotary_site import RotarySite, depends_on_length, primary_rotary
from .runners.runner import RopeState, Runner, token_rows
from .sampling import ContinuationMode, ResolvedParams, SamplingParams, resolved

_LONGEST_NAME = 64  # characters of the name of a special token, which the vocabulary's trie does not hold


class ScaledModel:
    """A transformers model, its tokenizer, and one scaler at a time.

    Four lengths, in tokens: `trained_length` is what the model reads without a scaler of ours, `reach` what it reads
    with the scaler in use, `given_max_length` the limit that the user set, and `max_length` the limit of a request,
    which is `given_max_length` or else `reach`.

    Attributes:
        hf: the transformers model underneath.
        tokenizer: its tokenizer.
        name: what it was loaded as.
        sites: its rotary modules, verified against its config.
        given_max_length: the `max_length` that the model was loaded with, or None.
        plan: the scaler in use, at every length.
        weights_at_load: `weights_state` of a model that was in memory already; None if it was read from files.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sites: list[RotarySite],
        runner: Runner,
        *,
        name: str,
        rope: str | Scaler | None = None,
        max_length: int | None = None,
        special_tokens: bool = False,
    ) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self.given_max_length, self._special_tokens = max_length, special_tokens
        self.sites = sites
        self._runner = runner
        self._slot = ScalerSlot(hf, self.sites, self._runner)
        self._lock = threading.RLock()
        self.weights_at_load: list[tuple[int, int, int, bytes]] | None = None
        self.rope = rope

    @contextmanager
    def running(
        self, length: int | None, expected_rope: Scaler | None = None, rope: Scaler | None = None
    ) -> Iterator[Runner]:
        """The runner, prepared for sequences of `length` tokens and locked for this thread.

            with model.running(len(ids)) as runner:
                logits = prefill(runner, ids, cache)

        Args:
            length: None is within the trained length.
            expected_rope: the scaler under which a text was begun that goes on now. None begins one.
            rope: a scaler for this block alone; None is the model's.

        Raises:
            PatchError: the scaler is no longer `expected_rope`; or, where it is None, a transformers model was changed
                after it was loaded; or its modules run, and another patch was put into them.
        """
        with self._lock, torch.inference_mode():
            asked = self.rope if rope is None else rope
            if expected_rope is None:
                self._check_weights()  # 2 ms, too much for every token
            elif asked is not expected_rope:
                raise PatchError(
                    f"the scaler was changed from {expected_rope} to {asked} while a text was being streamed; "
                    "finish the stream first, or start it again"
                )
            if not self.is_compiled:
                self._slot.check_own()
            scaler = self.plan.at(length) if rope is None else rope
            if self._slot.follows_length or scaler is not self._slot.installed.scaler:
                self._slot.prepare(scaler, length)
            yield self._runner

    @contextmanager
    def running_under(self, length: int | None, rope: Scaler) -> Iterator[Runner]:
        """`running`, after `rope` is assigned. It stays assigned afterwards, and its patch is kept: a measurement
        changes between few scalers often."""
        with self._lock:
            if self.rope != rope:
                self._assign(rope, remember=True)
            with self.running(length) as runner:
                yield runner

    def replace_runner(self, runner: Runner) -> None:
        """Replace the model's runner, for example by a stand-in that gives known logits."""
        self._runner = runner

    @property
    def rope(self) -> Scaler:
        """The scaler in use. Assign a scaler or a spec string to change it: `model.rope = "yarn:4"`.

        "auto" chooses one for the length of every request; see `rope_at`.
        """
        return self.plan.rope

    @rope.setter
    def rope(self, scaler: str | Scaler | None) -> None:
        self._assign(parse(scaler, self.trained_length), remember=False)

    def _assign(self, scaler: Scaler, *, remember: bool) -> None:
        with self._lock:
            if not isinstance(scaler, Auto):
                self._slot.put(scaler, remember=remember)
            self.plan = self._plan(scaler)
            self._slot.prepare(self.plan.at(None), None)

    def plan_for(self, rope: str | Scaler) -> RopePlan:
        """The plan of a request with a scaler of its own. The model's scaler stays; asked for, it gives `plan`.

        Raises:
            ConfigError, UnsupportedModel: the spec is wrong, or the model does not take the scaler.
        """
        parsed = parse(rope, self.trained_length)
        with self._lock:
            if parsed == self.rope:
                return self.plan
            if not isinstance(parsed, Auto):
                self._slot.prepare(parsed, None)
            return self._plan(parsed)

    def _plan(self, parsed: Scaler) -> RopePlan:
        if not isinstance(parsed, Auto):
            reach = primary_rotary(self.sites).configured.reach(parsed)
            return RopePlan(rope=parsed, reach=reach, given_max_length=self.given_max_length)
        stored = tuned_scalers.read(self.checkpoint_fingerprint)
        choice = Choice.of(self.spec, self.trained_length, stored, self._slot.takes)
        return RopePlan(rope=parsed, choice=choice, reach=math.inf, given_max_length=self.given_max_length)

    def rope_at(self, length: int | None) -> Scaler:
        """The scaler for a request of `length` tokens: `rope`, or what "auto" chooses for that length."""
        return self.plan.at(length)

    @property
    def reach(self) -> float:
        """Tokens that the scaler in use reaches; infinity for any length."""
        return self.plan.reach

    def follows_length(self, scaler: Scaler) -> bool:
        """True if the frequencies under `scaler` depend on the length of a text."""
        return depends_on_length(self.sites, scaler)

    @property
    def spec(self) -> RopeSpec:
        """The model's rotary geometry before any scaling: dimension, base, and the length of the plain frequencies."""
        return primary_rotary(self.sites).configured.rope

    @property
    def trained_length(self) -> int:
        """Tokens that the model reads without any scaler of ours, with the scaling that its config may have.

        `2x` is a multiple of it. It is longer than `spec.trained_length` where the config has a scaling.
        """
        return primary_rotary(self.sites).configured.max_length

    @property
    def max_length(self) -> int:
        """Most tokens that a request may have, prompt and answer together: `given_max_length`, else `reach`."""
        return self.plan.max_length

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens of the model. The tokenizer may have fewer or more."""
        return token_rows(self.hf)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens as bytes.

        Raises:
            UnsupportedModel: they are not pieces of the text's bytes.
        """
        return vocabulary(self.tokenizer, special_tokens=self._special_tokens, rows=self.vocabulary_size)

    @property
    def stop_ids(self) -> frozenset[int]:
        """End-of-text tokens of the model's generation config and of its tokenizer."""
        return stop_ids(self.hf, self.tokenizer)

    @property
    def default_params(self) -> ResolvedParams:
        """The parameters of a request that gives none: what the model's generation config recommends, else the
        likeliest token.

        Raises:
            ConfigError: the recommendation is not valid.
        """
        return self.resolved(SamplingParams())

    def resolved(self, params: SamplingParams) -> ResolvedParams:
        """`params`, with the recommendation of the model's generation config where they leave how to draw to it.

        Raises:
            ConfigError: the recommendation is needed, and it is not valid.
        """
        return resolved(params, self.hf.generation_config)

    @property
    def run_by(self) -> str:
        """What runs the model, in a few words, and why the compiled kernels do not."""
        return self._runner.how

    @property
    def is_compiled(self) -> bool:
        """True if compiled kernels run the model, False if transformers' modules do."""
        return self._runner.is_compiled

    @property
    def rope_state(self) -> RopeState:
        """The scaler in place, and the length that it is prepared for, if it depends on the length."""
        return self._runner.rope_state

    @property
    def precision(self) -> str:
        """The dtypes of the arithmetic, as results are labelled with them."""
        return self._runner.precision

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of a token take."""
        return self._runner.bytes_per_token

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model as it runs, its dtype included: saved sessions and rows of results belong to one."""
        return hf_model.fingerprint(self.hf, self._runner.weights)

    @cached_property
    def checkpoint_fingerprint(self) -> str:
        """A hash of the checkpoint, the same in every dtype: tuned scalers belong to one."""
        return hf_model.checkpoint_fingerprint(self.hf)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """A hash of the tokenizer: rows of results belong to one."""
        return hf_model.tokenizer_fingerprint(self.tokenizer)

    def describe(self) -> str:
        """The model, its runner, scaler, reach, trained length, and how it answers by default, one a line."""
        reach, configured = self.reach, primary_rotary(self.sites).configured
        rope = str(self.plan)
        if configured.scaling_text:
            method = self.rope.member("frequencies")
            relation = "over" if method is None else "in place of"
            if method is not None and method.differs_by_layer:
                relation = "in its layers in place of"
            rope += f", {relation} the config's own {configured.scaling_text}"
        lines = {
            "model": f"{self.name} ({type(self.hf).__name__}, {hf_model.weight_count(self.hf) / 1e6:.0f}M parameters)",
            "run by": self.run_by,
            "rope": rope,
            "reach": ("any length" if math.isinf(reach) else f"{format_length(int(reach))} tokens")
            + (f"; requests may have {format_length(given)} (max_length)" if (given := self.given_max_length) else ""),
            "trained": f"{format_length(configured.rope.trained_length)} tokens{configured.scaling_note}",
            **({"temperature": f"{own}, the model's own"} if (own := configured.temperature) is not None else {}),
            "answers": self._answers(),
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    def _answers(self) -> str:
        try:
            return f"{self.default_params.drawing}, unless a request says how to draw"
        except ConfigError as error:
            return str(error)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, rope {str(self.rope)!r}>"

    def new_cache(self, capacity: int) -> Cache:
        """An empty key-value cache for one sequence of about `capacity` tokens."""
        return self._runner.new_cache(capacity)

    def read(
        self,
        prompt: str | bytes | list[int],
        continuation: ContinuationMode,
        *,
        broken: bool = False,
        plan: RopePlan | None = None,
    ) -> Prompt:
        """The tokens of a prompt, and the covers of its end.

        Args:
            broken: as for `Prompt.read`.
            plan: the scaler of the request; None is the model's.

        Raises:
            ContextOverflow: its text is longer than `max_length` tokens can be. Tokenizing that might take minutes.
            ConfigError: it is neither text nor token ids.
            DataError: the model has no such token.
        """
        longest, plan = max(self.vocabulary.trie.longest, _LONGEST_NAME), plan or self.plan
        if not isinstance(prompt, str | bytes | bytearray | memoryview):
            prompt = token_ids(prompt, self.vocabulary_size)
        elif len(prompt) > plan.max_length * longest:
            raise ContextOverflow(
                f"the prompt has {len(prompt):,} characters, more than {format_length(plan.max_length)} tokens of at "
                f"most {longest} bytes can hold, which {self.name} reaches with rope {str(plan.rope)!r}; shorten it",
                *((", or ", Setting("rope", "auto", "model")) if self.given_max_length is None else ()),
            )
        return Prompt.read(prompt, self.tokenizer, self.vocabulary, continuation, broken=broken)

    def check_length(
        self, tokens: int, params: SamplingParams, *caches: Cache | None, plan: RopePlan | None = None
    ) -> int:
        """Refuse a request that is too long, and return the tokens of prompt and answer together.

        Args:
            tokens: of the prompt.
            caches: what holds a part of them already.
            plan: the scaler of the request; None is the model's.

        Raises:
            ContextOverflow: they are more than the scaler reaches, or than memory holds.
        """
        total, plan = self.check_reach(tokens, params, plan), plan or self.plan
        self.check_room(total, length=total, caches=caches, rope=plan.at(total))
        return total

    def check_reach(self, tokens: int, params: SamplingParams, plan: RopePlan | None = None) -> int:
        """`check_length` without a look at the memory.

        Raises:
            ContextOverflow: prompt and answer are more than the scaler reaches.
        """
        (plan or self.plan).check(tokens, params, self.name)
        return tokens + params.max_new_tokens

    def _check_weights(self) -> None:
        """Refuse a transformers model that was changed after it was loaded."""
        if self.weights_at_load is not None and self.weights_at_load != hf_model.weights_state(self.hf):
            raise PatchError(
                f"the weights of {self.name} have changed since it was loaded; load it again: rw.load(model)"
            )

    def check_room(
        self,
        *rows: int,
        length: int,
        caches: Iterable[Cache | None] = (),
        rope: Scaler | None = None,
        reserved: int = 0,
    ) -> None:
        """Raise ContextOverflow if memory is known to lack room for caches of so many tokens.

        Args:
            length: tokens of the longest sequence; how much room a token takes depends on the scaler for it.
            caches: what holds a part of them already.
            rope: the scaler of the sequences; None is the model's.
            reserved: bytes that other caches will take.
        """
        with self.running(length, rope=rope) as runner:
            runner.check_room(*rows, owned=owned_tokens(caches), reserved=reserved)

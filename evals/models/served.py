"""A model behind an OpenAI-compatible server, as it is measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.checkpoints.checkpoint import read_tokenizer
from ...engine.checkpoints.config import find_config, served_length
from ...errors import ConfigError, ContextOverflow, EndpointError
from ...scaling.rope import Scaler
from ...tokenizer_tools.encode import text_ids
from ...tokenizer_tools.vocabularies import vocabulary
from ...tokenizer_tools.vocabulary import Vocabulary, check_ids
from ..retrieval.task import Trial, TrialOutput
from ..runs.result import Losses
from .measured import Advance, ForwardCost, MeasuredModel, Tokens, bytes_of
from .openai_server import RefusedRequest, Server

if TYPE_CHECKING:
    from torch import Tensor


Scored = tuple[float, bool | None]
"""Log-probability of a token in nats, and whether it was the likeliest one; None if the server does
not say."""

Choice = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LogprobForm:
    """A way to request log-probabilities of the prompt, and to read them from the answer.

    Args:
        name: for display.
        fields: fields of the request.
        read: takes a choice and the prompt's ids. Returns the scores of all ids except the first;
            None if the choice has none.
    """

    name: str
    fields: dict[str, Any]
    read: Callable[[Choice, Sequence[int]], list[Scored] | None]


def _read_prompt_logprobs(choice: Choice, ids: Sequence[int]) -> list[Scored] | None:
    places = choice.get("prompt_logprobs")
    if not isinstance(places, list) or len(places) != len(ids):
        return None
    scored: list[Scored] = []
    for token, place in zip(ids[1:], places[1:], strict=True):
        entry = (place or {}).get(str(token)) or {}
        if entry.get("logprob") is None:
            return None
        scored.append((float(entry["logprob"]), entry["rank"] == 1 if entry.get("rank") else None))
    return scored


def _read_echo(choice: Choice, ids: Sequence[int]) -> list[Scored] | None:
    logprobs = choice.get("logprobs") or {}
    nats = logprobs.get("token_logprobs")
    if not isinstance(nats, list) or len(nats) not in (len(ids), len(ids) + 1):  # including the token that was written
        return None
    nats = nats[1 : len(ids)]
    if None in nats:
        return None
    tops = (logprobs.get("top_logprobs") or [None] * len(ids))[1 : len(ids)]
    return [(float(n), n >= max(top.values()) if top else None) for n, top in zip(nats, tops, strict=True)]


FORMS = (
    LogprobForm(name="prompt_logprobs", fields={"prompt_logprobs": 1}, read=_read_prompt_logprobs),
    LogprobForm(name="echo", fields={"echo": True, "logprobs": 1}, read=_read_echo),
)
"""The field of vLLM, and the `echo` of OpenAI's completions, which SGLang has too. The first one
that works is used."""


class ServedModel(MeasuredModel):
    """A model behind an OpenAI-compatible server, under the scaler with which the server runs it.

    Args:
        model: built-in name, hub id or folder of the served model. Its tokenizer and config are
            read.
        url: the root of the API, such as http://localhost:8000/v1.
        served_as: the model's name at the server. None: the only model there.

    Attributes:
        limit: the server's limit for prompt and answer together, tokens; None if it does not say.
        form: how the server gives log-probabilities of a prompt; None if it does not.

    Raises:
        AssetError: there is no such model.
        ConfigError: `url` is no address, or the server has other models.
        EndpointError: the server cannot be reached, or refuses prompts of token ids.
    """

    precision = "served"
    trained_length: int

    def __init__(self, model: str, url: str, served_as: str | None = None) -> None:
        source, config = find_config(model)
        self.trained_length = served_length(source, config)
        self._cost = ForwardCost.of_config(config)
        self.tokenizer: Any = read_tokenizer(source)
        self._rows = int(config.get_text_config().vocab_size)
        self.metadata = {"tokenizer": model}
        self._server = Server(url)
        listed = self._server.model(served_as)
        self._served = str(listed["id"])
        self.limit: int | None = listed.get("max_model_len")
        # written after what is scored. ropewalk's scaler may depend on the length with it; vLLM refuses to write none
        self._spare = 0 if listed.get("owned_by") == "ropewalk" else 1
        self.device = self._server.address
        self.name = f"{self._served} at {self._server.host}"
        self.form = self._find_form()

    def under(self, scaler: Scaler) -> ServedModel:
        if scaler.parts:
            raise ConfigError(
                f"{self.name} runs under the scaler of its server, not under {scaler}: leave out "
                "--rope (for longppl: --judge none), or serve a model that `ropewalk export` wrote under that scaler"
            )
        return self

    @property
    def cost(self) -> ForwardCost:
        return self._cost

    @property
    def memory_mb(self) -> None:
        """None: the server's memory is unknown."""
        return None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens as bytes. UnsupportedModel if they are not pieces of the text."""
        return vocabulary(self.tokenizer)

    def describe(self) -> str:
        """A sentence about the server: model, limit and log-probabilities."""
        limit = "" if self.limit is None else f", at most {self.limit:,} tokens"
        form = "no log-probabilities of prompts" if self.form is None else f"log-probabilities: {self.form.name}"
        return f"{self._served} is served at {self.device}{limit}; {form}"

    def check_scoring(self, length: int) -> None:
        if self.form is None:
            raise ConfigError(
                f"{self.device} gives no log-probabilities of a prompt's tokens (neither `prompt_logprobs` nor `echo` "
                "with `logprobs`), which losses need, and tasks that choose the likeliest of some answers (many-shot): "
                "serve the model with vLLM or SGLang, or leave out --endpoint; passkey, niah, kv and ruler work with "
                "this server too"
            )
        self.check(length, spare=self._spare)

    def losses(self, ids: Tokens, first: int, advance: Advance, length: int | None = None) -> Losses:
        self.check_scoring(len(ids))
        scored = self.score(ids, first)
        advance(0, len(ids) - 1)
        losses: Losses = np.array([-nats for nats, _ in scored], dtype=np.float32)
        return losses

    def logits(self, ids: Tokens, first: int, advance: Advance) -> Iterator[Tensor]:
        raise ConfigError(
            f"{self.name}: a server gives the log-probability of one token, and this protocol compares the "
            "logits of all; leave out --endpoint, and load the model here"
        )

    def count_bytes(self, ids: Sequence[int]) -> int:
        return bytes_of(ids, self.tokenizer, lambda: self.vocabulary)

    def run_trial(self, trial: Trial, advance: Advance) -> TrialOutput:
        """Two requests: one scores the right answer after the prompt, the other continues the
        prompt greedily. Each choice is another one."""
        ids = [*trial.prompt_ids, *trial.answer_ids]
        check_ids(ids, self._rows)
        first, length = len(trial.prompt_ids), len(trial.prompt_ids) + trial.new_tokens
        scored = None if self.form is None else self.score(ids, first, length)
        written = self._server.complete(
            self._served,
            trial.prompt_ids,
            max_tokens=trial.new_tokens,
            repetition_penalty=1,  # else vLLM and SGLang take it from the model's generation_config.json
        )
        advance(0, len(ids) - 1)
        text = str(written.get("text") or "")
        if scored is None:
            return TrialOutput(logprobs=None, is_likeliest=None, written=text)
        nats, likeliest = [token[0] for token in scored], [token[1] for token in scored]
        choices = [self.score([*trial.prompt_ids, *choice], first, length) for choice in trial.choices]
        return TrialOutput(
            logprobs=nats,
            is_likeliest=None if None in likeliest else all(likeliest),
            written=text,
            choice_logprobs=[sum(token[0] for token in choice) for choice in choices],
        )

    def score(self, ids: Tokens, first: int, length: int = 0) -> list[Scored]:
        """The score of each of `ids[first:]`, given all tokens before it.

        `first` is at least 1, and the server must give log-probabilities.

        Args:
            length: tokens that ropewalk's scaler is for, if it depends on them and they are more than `ids`.
        """
        assert self.form is not None and first >= 1
        check_ids(ids, self._rows)
        self.check(len(ids), spare=self._spare)
        most = self._spare or max(0, length - len(ids))
        choice = self._server.complete(self._served, ids, max_tokens=most, **self.form.fields)
        scored = self.form.read(choice, ids)
        if scored is None:
            raise EndpointError(
                f"{self.device} answered a prompt of {len(ids):,} tokens without the {self.form.name} of each of them, "
                "which it gave for a short one; see the server's log"
            )
        return scored[first - 1 :]

    def check(self, length: int, spare: int = 0) -> None:
        """Raise ContextOverflow if `length` tokens, and `spare` tokens that must be written, exceed
        `limit`."""
        if self.limit is not None and length + spare > self.limit:
            most = f"{length:,} tokens" + (f" and the {spare} that a server must write after them" if spare else "")
            raise ContextOverflow(
                f"{most} exceed the {self.limit:,} that {self.name} was launched for; use fewer, or launch "
                f"it with {length + spare} (--max-model-len of vLLM, --context-length of SGLang)"
            )

    def time_forward(self, length: int) -> None:
        length = length if self.limit is None else min(length, self.limit - 1)
        tokens = min(self._rows, len(self.tokenizer))
        ids = [random.randrange(tokens) for _ in range(length)]  # random, so that no prefix cache has them
        self._server.complete(self._served, ids, max_tokens=1)

    def needs(self, longest: int) -> str:
        return f"{self.device} reads prompts of up to {longest:,} tokens"

    def _find_form(self) -> LogprobForm | None:
        """The first form in which the server gives log-probabilities of a short prompt."""
        ids = text_ids("The quick brown fox jumps over the lazy dog.", self.tokenizer)
        self._server.complete(self._served, ids, max_tokens=1)  # a server that takes no token ids refuses here
        for form in FORMS:
            try:
                choice = self._server.complete(self._served, ids, max_tokens=1, **form.fields)
            except RefusedRequest as refusal:
                if refusal.status not in (400, 422):  # these are the statuses for unknown fields
                    raise
                continue
            if form.read(choice, ids) is not None:
                return form
        return None

"""A served model as the harness measures it: no weights here, and a request or two for every
prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.checkpoints.checkpoint import read_tokenizer
from ...engine.checkpoints.config import find_config, primary_rope
from ...errors import ConfigError, ContextOverflow, EndpointError
from ...scaling.rope import Scaler
from ...tokenizer_tools.encode import text_ids
from ...tokenizer_tools.vocabularies import vocabulary
from ...tokenizer_tools.vocabulary import Vocabulary, check_ids
from ..retrieval.trial import Trial, TrialOutput
from ..runs.result import Losses
from .measured import Advance, ForwardCost, MeasuredModel, Tokens, bytes_of
from .server import FORMS, LogprobForm, RefusedRequest, Scored, Server

if TYPE_CHECKING:
    from torch import Tensor


class ServedModel(MeasuredModel):
    """A model behind an OpenAI-compatible server, under the scaler that the server runs it with.

    Args:
        model: names the tokenizer and the config of what is served: built-in name, hub id or
            folder.
        url: the root of the protocol, such as http://localhost:8000/v1.
        served_as: the model's name there; None is the only one that there is.

    Attributes:
        limit: tokens that the server was launched for, prompt and answer together; None if it does
            not say.
        form: how it tells log-probabilities of a prompt; None if it does not.

    Raises:
        AssetError: there is no such model.
        ConfigError: `url` is no address, or the server has other models.
        EndpointError: the server cannot be reached, or refuses prompts of token ids.
    """

    precision = "served"
    trained_length: int

    def __init__(self, model: str, url: str, served_as: str | None = None) -> None:
        source, config = find_config(model)
        self.trained_length = primary_rope(config).max_length
        self._cost = ForwardCost.of_config(config)
        self.tokenizer: Any = read_tokenizer(source)
        self._rows = int(config.get_text_config().vocab_size)
        self.metadata = {"tokenizer": model}
        self._server = Server(url)
        listed = self._server.model(served_as)
        self._served = str(listed["id"])
        self.limit: int | None = listed.get("max_model_len")
        self.device = self._server.address
        self.name = f"{self._served} at {self._server.host}"
        self.form = self._find_form()

    def under(self, scaler: Scaler) -> ServedModel:
        if scaler.parts:
            raise ConfigError(
                f"{self.name} is measured under the scaler that it is served with, not under {scaler}: leave out "
                "--rope (for longppl: --judge none), or serve what `ropewalk export` writes under that scaler"
            )
        return self

    @property
    def cost(self) -> ForwardCost:
        return self._cost

    @property
    def memory_mb(self) -> None:
        """None: the memory is the server's."""
        return None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens as bytes; UnsupportedModel if they are not pieces of the
        text's."""
        return vocabulary(self.tokenizer)

    def describe(self) -> str:
        """What was found at the server, in a sentence."""
        limit = "" if self.limit is None else f", at most {self.limit:,} tokens"
        how = "no log-probabilities of prompts: answers are only written" if self.form is None else self.form.name
        return f"{self._served} is served at {self.device}{limit}; log-probabilities: {how}"

    def check_scoring(self, length: int) -> None:
        if self.form is None:
            raise ConfigError(
                f"{self.device} tells no log-probabilities of a prompt's tokens (neither `prompt_logprobs` nor `echo` "
                "with `logprobs`), which losses are made of: serve the model with vLLM or SGLang, or leave out "
                "--endpoint; passkey, niah, kv and ruler work with this server too"
            )
        self.check(length, spare=1)

    def losses(self, ids: Tokens, first: int, advance: Advance) -> Losses:
        self.check_scoring(len(ids))
        scored = self.score(ids, first)
        advance(0, len(ids) - 1)
        losses: Losses = np.array([-nats for nats, _ in scored], dtype=np.float32)
        return losses

    def logits(self, ids: Tokens, first: int, advance: Advance) -> Iterator[Tensor]:
        raise ConfigError(
            f"{self.name}: a server tells the log-probability of a token, not the logits of all, which this protocol "
            "compares; leave out --endpoint, and load the model here"
        )

    def count_bytes(self, ids: Sequence[int]) -> int:
        return bytes_of(ids, self.tokenizer, lambda: self.vocabulary)

    def run_trial(self, trial: Trial, advance: Advance) -> TrialOutput:
        """Two requests: the right answer scored behind the prompt, and the prompt continued
        greedily."""
        ids = [*trial.prompt_ids, *trial.answer_ids]
        check_ids(ids, self._rows)
        scored = None if self.form is None else self.score(ids, len(trial.prompt_ids))
        written = self._server.complete(
            self._served,
            trial.prompt_ids,
            max_tokens=trial.new_tokens,
            repetition_penalty=1,  # vLLM and SGLang take the default from the model's generation_config.json
        )
        advance(0, len(ids) - 1)
        text = str(written.get("text") or "")
        if scored is None:
            return TrialOutput(logprobs=None, is_likeliest=None, written=text)
        nats, likeliest = [token[0] for token in scored], [token[1] for token in scored]
        return TrialOutput(logprobs=nats, is_likeliest=None if None in likeliest else all(likeliest), written=text)

    def score(self, ids: Tokens, first: int) -> list[Scored]:
        """Of each of `ids[first:]`, given all before it; `first` is at least 1, and the server
        tells."""
        assert self.form is not None and first >= 1
        check_ids(ids, self._rows)
        self.check(len(ids), spare=1)
        choice = self._server.complete(self._served, ids, max_tokens=1, **self.form.fields)
        scored = self.form.read(choice, ids)
        if scored is None:
            raise EndpointError(
                f"{self.device} answered a prompt of {len(ids):,} tokens without the {self.form.name} of each of them, "
                "which it gave for a short one; see what its log says"
            )
        return scored[first - 1 :]

    def check(self, length: int, spare: int = 0) -> None:
        """Raise ContextOverflow if `length` tokens, and `spare` more that must be written, are
        beyond `limit`."""
        if self.limit is not None and length + spare > self.limit:
            most = f"{length:,} tokens" + (f" and the {spare} that a server must write behind them" if spare else "")
            raise ContextOverflow(
                f"{most} are more than the {self.limit:,} that {self.name} was launched for; ask for less, or launch "
                f"it with {length + spare} (--max-model-len of vLLM, --context-length of SGLang)"
            )

    def time_forward(self, length: int) -> None:
        length = length if self.limit is None else min(length, self.limit - 1)
        tokens = min(self._rows, len(self.tokenizer))
        ids = [random.randrange(tokens) for _ in range(length)]  # nothing that it has in a prefix cache
        self._server.complete(self._served, ids, max_tokens=1)

    def needs(self, longest: int) -> str:
        return f"{self.device} reads prompts of up to {longest:,} tokens"

    def _find_form(self) -> LogprobForm | None:
        """The form in which the server gives log-probabilities of a prompt, found by a short
        request in each form."""
        ids = text_ids("The quick brown fox jumps over the lazy dog.", self.tokenizer)
        self._server.complete(self._served, ids, max_tokens=1)  # refused here: no server for token ids
        for form in FORMS:
            try:
                choice = self._server.complete(self._served, ids, max_tokens=1, **form.fields)
            except RefusedRequest as refusal:
                if refusal.status not in (400, 422):  # that is how servers refuse fields
                    raise
                continue
            if form.read(choice, ids) is not None:
                return form
        return None

"""A model in this process as it is measured. During a run no other file reads tokens with it."""

from __future__ import annotations

from collections import abc
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...engine.batch import Batch, generate_tokens
from ...engine.cache import can_rewind, rewind, tokens_read
from ...engine.hf_model import input_device, weight_bytes
from ...engine.model import Model
from ...engine.prefill import prefill, score, scored_logits
from ...engine.prefix_cache import PrefixCache
from ...engine.prompt import token_ids
from ...engine.runners.runner import Runner
from ...engine.sampling import ResolvedParams
from ...engine.sequence import Sequence
from ...scaling.rope import Scaler
from ...tokenizer_tools.vocabulary import check_ids
from ..retrieval.task import Trial, TrialOutput
from ..runs.result import Losses
from .measured import Advance, ForwardCost, MeasuredModel, Tokens, bytes_of

_SPARE = 1024  # tokens that the next prompt may be longer without a larger cache


class LocalModel(MeasuredModel):
    """A ropewalk model under one scaler.

    Several of them may share one `Model`. Each sets its scaler before it uses the model.

    Args:
        model: the loaded model.
        scaler: None: the current scaler of the model.
    """

    trained_length: int

    def __init__(self, model: Model, scaler: Scaler | None = None) -> None:
        self.model = model
        self.rope = model.rope if scaler is None else scaler
        self.name, self.precision = model.name, model.precision
        self.device, self.trained_length = input_device(model.hf).type, model.trained_length
        self.metadata = {  # distinguishes it from another model at the same path
            "weights": model.fingerprint[:16],
            "tokenizer_sha256": model.tokenizer_fingerprint[:16],
        }
        self.tokenizer = model.tokenizer
        self._last = PrefixCache()  # of the last trial

    def running(self, length: int) -> AbstractContextManager[Runner]:
        """The runner, prepared for `length` tokens under this scaler. Other threads wait until the
        block ends."""
        return self.model.running_under(length, self.rope)

    def under(self, scaler: Scaler) -> LocalModel:
        with self.model.running_under(None, scaler):
            return LocalModel(self.model, scaler)

    def restore(self) -> None:
        if self.model.rope != self.rope:
            self.model.rope = self.rope

    def rope_at(self, length: int) -> Scaler:
        with self.running(length):
            return self.model.rope_at(length)

    @cached_property
    def cost(self) -> ForwardCost:
        return ForwardCost.of(self.model)

    def losses(self, ids: Tokens, first: int, advance: Advance, length: int | None = None) -> Losses:
        ids = token_ids(ids, self.model.vocabulary_size)
        with self.running(length or len(ids)) as runner:
            self.cache = self.model.new_cache(len(ids))
            losses: Losses = -score(runner, ids, first, self.cache, advance).cpu().numpy()
        return losses

    def logits(self, ids: Tokens, first: int, advance: Advance, length: int | None = None) -> abc.Iterator[Tensor]:
        ids, length = token_ids(ids, self.model.vocabulary_size), length or len(ids)
        with self.running(length) as runner:
            self.cache = self.model.new_cache(len(ids))
            pieces = scored_logits(runner, ids, first, self.cache, advance)
        while True:
            with self.running(length):  # another scaler may have been set since the last piece
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def run_trial(self, trial: Trial, advance: Advance | None = None) -> TrialOutput:
        """Read the prompt once, score the right answer after it, and let the model write its own
        answer.

        What the last prompt began with too is not read again, in whole chunks, so that the numbers
        are the same bit for bit. If the cache cannot be rewound (sliding windows in transformers'
        own cache), the prompt is read twice.
        """
        length = len(trial.prompt_ids) + trial.new_tokens
        check_ids([*trial.prompt_ids, *trial.answer_ids], self.model.vocabulary_size)
        params = ResolvedParams(max_new_tokens=trial.new_tokens, temperature=0)
        with self.running(length) as runner:  # both parts use the scaler that is prepared for this length
            cache = self._trial_cache(runner, trial.prompt_ids, length)
            held = tokens_read(cache)
            if advance:
                advance(0, held)
            ids = trial.prompt_ids + trial.answer_ids[:-1]
            logits = prefill(runner, ids[held:], cache, advance, logits_to_keep=len(trial.answer_ids))
            logprobs = logits.float().log_softmax(-1).cpu()
            choice_logprobs = [self._choice_logprob(runner, trial, ids, logprobs[0], cache) for ids in trial.choices]
            prompt = self.model.read(trial.prompt_ids, params.continuation)
            sequence = Sequence(
                prompt, params, self.model.vocabulary, self.model.stop_ids, cache if can_rewind(cache) else None
            )
            self.model.check_room(length, length=length, caches=(sequence.cache,))
            for _ in generate_tokens(Batch(self.model, [sequence], length)):  # at any length, also beyond the reach
                pass
            self._last.hold(cache, trial.prompt_ids, runner.rope_state)
        chosen = logprobs.gather(-1, torch.tensor(trial.answer_ids)[:, None])[:, 0]
        return TrialOutput(
            logprobs=chosen.tolist(),
            is_likeliest=logprobs.argmax(-1).tolist() == trial.answer_ids,
            written=sequence.text,
            choice_logprobs=choice_logprobs,
        )

    def _trial_cache(self, runner: Runner, prompt_ids: Tokens, length: int) -> Cache:
        """A cache for `length` tokens that holds the whole chunks at the beginning of the prompt that
        the last prompt began with too."""
        last, self._last = self._last, PrefixCache()
        held = last.shared(prompt_ids[:-1]) // runner.chunk * runner.chunk
        if last.rope_state == runner.rope_state:
            last.truncate_to(prompt_ids[:held])
            if last.cache is not None:
                return last.cache
        last.clear()  # before another is allocated
        return self.model.new_cache(length + _SPARE)

    def _choice_logprob(self, runner: Runner, trial: Trial, ids: Tokens, first: Tensor, cache: Cache) -> float:
        """Log-probability of the tokens `ids` of a choice after the trial's prompt.

        Args:
            first: log-probabilities of the token after the prompt, [V].
            cache: begins with the prompt. If it can be rewound, it then ends with this choice.
        """
        nats = [float(first[ids[0]])]
        if len(ids) > 1:
            read = ids[:-1]
            if can_rewind(cache):
                rewind(cache, tokens_read(cache) - len(trial.prompt_ids))
            else:
                cache = self.model.new_cache(len(trial.prompt_ids) + len(read))
                read = trial.prompt_ids + read
            logits = prefill(runner, read, cache, logits_to_keep=len(ids) - 1).float().log_softmax(-1).cpu()
            nats += logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        return sum(nats)

    def count_bytes(self, ids: abc.Sequence[int]) -> int:
        return bytes_of(ids, self.model.tokenizer, lambda: self.model.vocabulary)

    def time_forward(self, length: int) -> None:
        self.losses([0] * length, length - 1, lambda past, tokens: None)

    def needs(self, longest: int) -> str:
        weights = weight_bytes(self.model.hf) / 1e6
        cache = self.model.bytes_per_token * longest / 1e6
        return f"memory about {weights:.0f} MB of weights and {cache:.0f} MB of cache at the longest context"

"""A ropewalk model as the harness measures it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from ...engine.cache import can_rewind
from ...engine.model import Model
from ...engine.placement import input_device
from ...engine.prefill import prefill
from ...engine.sampling import SamplingParams
from ...scaling.rope import Scaler
from ...tokenizer_tools.vocabulary import check_ids
from ..retrieval.trial import Trial
from ..retrieval.trial_output import TrialOutput
from ..runs.cell import Advance, Cost
from ..speed.memory import peak_memory_mb
from .reader import ModelReader, weight_metadata


class Local:
    """The `Subject` that is loaded in this process.

    Args:
        model: its scaler is what `rope` is.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def rope(self) -> Scaler:
        """The scaler in use."""
        return self.model.rope

    @rope.setter
    def rope(self, scaler: Scaler) -> None:
        self.model.rope = scaler

    def rope_at(self, length: int) -> Scaler:
        return self.model.rope_at(length)

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def precision(self) -> str:
        return self.model.precision

    @property
    def device(self) -> str:
        return input_device(self.model.hf).type

    @property
    def trained_length(self) -> int:
        return self.model.trained_length

    @property
    def metadata(self) -> Mapping[str, Any]:
        return weight_metadata(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @cached_property
    def cost(self) -> Cost:
        return Cost.of(self.model)

    @property
    def memory_mb(self) -> float:
        return peak_memory_mb()

    def reader(self) -> ModelReader:
        return ModelReader(self.model)

    def run_trial(self, trial: Trial, advance: Advance | None = None) -> TrialOutput:
        """Read the prompt once, score the right answer behind it, and let the model write its own from there.

        A cache that cannot forget (a sliding window in transformers' own cache) makes it read the prompt twice.
        """
        model, length = self.model, len(trial.prompt_ids) + trial.new_tokens
        check_ids([*trial.prompt_ids, *trial.answer_ids], model.vocabulary_size)
        params = SamplingParams(max_new_tokens=trial.new_tokens, temperature=0)
        with model.running(length) as runner:  # a dynamic scaler must not change below the cache
            cache = model.new_cache(length)
            ids = trial.prompt_ids + trial.answer_ids[:-1]
            logprobs = (
                prefill(runner, ids, cache, advance, logits_to_keep=len(trial.answer_ids)).float().log_softmax(-1).cpu()
            )
            completion = model.generate_ids(trial.prompt_ids, params, cache if can_rewind(cache) else None)
        chosen = logprobs.gather(-1, torch.tensor(trial.answer_ids)[:, None])[:, 0]
        return TrialOutput(
            logprobs=chosen.tolist(),
            is_likeliest=logprobs.argmax(-1).tolist() == trial.answer_ids,
            written=completion.text,
        )

    def check(self, length: int) -> None:
        """Any length may be tried: past the reach is what is looked at."""

    def time_forward(self, length: int) -> None:
        self.model.score_ids([0] * length)

    def needs(self, longest: int) -> str:
        weights = self.model.hf.get_memory_footprint() / 1e6
        cache = self.model.bytes_per_token * longest / 1e6
        return f"memory about {weights:.0f} MB of weights and {cache:.0f} MB of cache at the longest context"

"""Fake networks that check the evaluation itself: `--fake uniform` and `--fake oracle`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...engine.cache import ContiguousLayer
from ...engine.model import Model
from ...engine.runners.transformers import TransformersRunner
from ...tokenizer_tools.encode import text_ids
from ..retrieval.task import Trial

_CERTAIN = 1000.0  # among zeros, this logit has a log-probability of exactly 0 in float32


class Uniform(TransformersRunner):
    """All tokens have the same log-probability, -log V."""

    def new_cache(self, capacity: int) -> Cache:
        return Cache(layers=[ContiguousLayer(0)])

    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        cache.layers[0].length += len(ids)
        return torch.zeros(logits_to_keep, self.hf.get_input_embeddings().num_embeddings)


class Oracle(Uniform):
    """Writes the right answer of the trial given to `learn`, then an end token.

    It checks that the tokens it reads are those of the trial's prompt, at their positions.
    """

    truth: Sequence[int] = ()
    prompt: int = 0
    end: int = 0

    def learn(self, trial: Trial) -> None:
        """Set the next trial."""
        self.truth, self.prompt = [*trial.prompt_ids, *trial.answer_ids], len(trial.prompt_ids)

    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        start = cache.get_seq_length()
        known = self.truth[start : min(start + len(ids), self.prompt)]  # a choice may differ from the answer
        assert [*known] == [*ids][: len(known)], f"tokens from position {start} differ from the trial's"
        logits = super().forward(ids, cache, logits_to_keep)
        for row, position in enumerate(range(start + len(ids) - logits_to_keep, start + len(ids))):
            after = self.truth[position + 1] if position + 1 < len(self.truth) else self.end
            logits[row, after] = _CERTAIN
        return logits


FAKES: dict[str, type[Uniform]] = {"uniform": Uniform, "oracle": Oracle}


def replace_runner(model: Model, kind: str) -> Uniform:
    """Replace the model's network by a fake one. The model's name says so, in every row."""
    fake = FAKES[kind](model.hf)
    if isinstance(fake, Oracle):
        ends = sorted(model.stop_ids) or text_ids("\n", model.tokenizer)
        fake.end = ends[0]
    model.replace_runner(fake)
    model.name = f"{model.name} replaced by {kind}"
    return fake

"""The exact first step for plain transformers: prompts made ready for `hf_model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..tokenizer_tools.vocabularies import vocabulary
from ..tokenizer_tools.vocabulary import Vocabulary
from .cache import new_cache
from .completion import Continuation
from .placement import input_device
from .prompt import Prompt
from .runners.runner import token_rows
from .runners.transformers import TransformersRunner
from .sampling import SamplingParams, random_source
from .sequence import stop_ids
from .token_healing import draw_first_token, weigh


@dataclass(frozen=True, kw_only=True)
class Healed:
    """Prompts that may end inside a token, with their first new token drawn.

    Attributes:
        input_ids, attention_mask: int64 [prompts, length], padded on the left: arguments of `hf_model.generate`.
        continuations: what was done at the end of each prompt; None where nothing had to be.
        ended: for each prompt, whether the token that was drawn ends its text; `generate` writes on all the same.
    """

    input_ids: Tensor
    attention_mask: Tensor
    continuations: list[Continuation | None]
    ended: list[bool]
    prompts: list[Prompt]
    vocabulary: Vocabulary

    def texts(self, output_ids: Tensor) -> list[str]:
        """What follows each prompt in the output of `hf_model.generate`, [prompts, length or more]."""
        texts = []
        rows = zip(self.prompts, self.continuations, self.ended, output_ids.tolist(), strict=True)
        for prompt, continuation, ended, row in rows:
            if ended:
                texts.append("")
                continue
            drawn = continuation is not None
            new = row[self.input_ids.shape[1] - drawn :]
            stream = prompt.text_stream(self.vocabulary)
            skips = [continuation.overlap if continuation else 0, *[0] * len(new)]
            shown = [stream.push(token, skip) for token, skip in zip(new, skips, strict=False)]
            texts.append("".join(shown) + stream.finish())
        return texts


def heal(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | bytes | Sequence[str | bytes],
    params: SamplingParams | None = None,
    *,
    special_tokens: bool = False,
) -> Healed:
    """Make prompts that may end inside a token ready for transformers' own `generate`.

        healed = rw.heal(hf_model, tokenizer, "import nump")
        output = hf_model.generate(healed.input_ids, attention_mask=healed.attention_mask)
        print(healed.texts(output)[0])

    The first new token is drawn from the distribution of texts after the prompt's text, as `Model.generate` does. The
    model may be patched.

    Args:
        params: how to draw it; `hf_model.generate` draws the rest with its own settings.
        special_tokens: whether names of special tokens in the prompts stand for them, as a chat template means them.

    Raises:
        ConfigError: there are no prompts, or one is empty and the tokenizer has no start token.
        DataError: a prompt is not UTF-8, or holds half a surrogate pair, or a token that the model does not have.
    """
    if not prompts and not isinstance(prompts, str | bytes):
        raise ConfigError("prompts is empty; give at least one")
    params, known = (
        params or SamplingParams(),
        vocabulary(tokenizer, special_tokens=special_tokens, rows=token_rows(hf_model)),
    )
    device = input_device(hf_model)
    generator = random_source(params, device)
    read = [
        Prompt.read(prompt, tokenizer, known, params.continuation)
        for prompt in ([prompts] if isinstance(prompts, str | bytes) else prompts)
    ]
    rows: list[list[int]] = []
    continuations: list[Continuation | None] = []
    ended: list[bool] = []
    ends, runner = stop_ids(hf_model, tokenizer), TransformersRunner(hf_model)
    for prompt in read:
        if (cover := prompt.cover_to_weigh) is None:
            rows.append(prompt.ids)
            continuations.append(None)
            ended.append(False)
            continue
        cache = new_cache(hf_model.config, len(prompt.ids))
        with torch.inference_mode():
            covers = weigh(runner, cover, prompt.start, cache, known, params.repetition_penalty)
            first = draw_first_token(covers, cache, params, generator).token
        assert first.continuation is not None
        rows.append([*first.continuation.prompt_ids, first.id])
        continuations.append(first.continuation)
        ended.append(first.id in ends)
    length = max(map(len, rows))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Healed(
        input_ids=torch.tensor([[padding] * (length - len(row)) + row for row in rows], device=device),
        attention_mask=torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], device=device),
        continuations=continuations,
        ended=ended,
        prompts=read,
        vocabulary=known,
    )

"""Answers on a cache that is kept, and answers to several prompts together."""

from __future__ import annotations

from collections import abc

from ..errors import OutOfMemory
from .batch import Admission, Batch, generate_tokens
from .completion import Completion
from .prefix_cache import PrefixCache
from .prompt import Prompt
from .sampling import SamplingParams
from .scaled_model import ScaledModel
from .sequence import Sequence

ROWS = 8  # most sequences that are generated together; a step reads the weights once for all of them


def stream_on_cache(
    model: ScaledModel, cached: PrefixCache, sequence: Sequence, length: int
) -> abc.Generator[str, None, None]:
    """Generate a sequence on top of a cache. The cache is cropped and rotated first, and afterwards holds all tokens.

    Args:
        length: tokens of prompt and answer.

    Yields:
        The text, piece by piece.
    """
    rope, prompt, interrupted = model.rope, sequence.prompt, True
    with model.running(length, rope) as runner:
        sequence.cache = cached.prepare_for(runner, prompt.certain_ids, length)
    try:
        for pieces in generate_tokens(Batch(model, [sequence], length, expected_rope=rope)):
            for _, piece in pieces:
                if piece:
                    yield piece
        interrupted = False
    except GeneratorExit:  # is raised between two steps
        interrupted = False
        raise
    finally:
        cached.truncate_to(sequence.read_ids if sequence.tokens else prompt.certain_ids, interrupted)


def complete_all(
    model: ScaledModel,
    prompts: abc.Sequence[Prompt],
    params: SamplingParams,
    ended: abc.Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Answer several prompts. Those with the same scaler and the same frequencies are generated together.

    Args:
        ended: called with each answer as soon as it is complete, and the index of its prompt.

    Raises:
        OutOfMemory: a sequence alone does not fit, or one more token does not and the caches cannot be rewound.
            `finished` holds the answers that were complete.
    """
    lengths = [model.check_length(len(prompt.ids), params) for prompt in prompts]
    groups: dict[object, list[int]] = {}
    for index in range(len(prompts)):
        scaler = model.rope_at(lengths[index])
        alone = index if model.follows_length(scaler) else None  # every length has its own frequencies
        groups.setdefault((scaler, alone), []).append(index)
    resolved = model.resolved(params)
    sequences = [Sequence(prompt, resolved, model.vocabulary, model.stop_ids) for prompt in prompts]
    index_of = {id(sequence): index for index, sequence in enumerate(sequences)}
    admission = Admission(rows=ROWS)
    try:
        for members in groups.values():
            longest = max(lengths[index] for index in members)
            with model.running(longest):  # no other scaler between two tokens
                batch = Batch(model, [sequences[index] for index in members], longest, admission=admission)
                for pieces in generate_tokens(batch):
                    for sequence, _ in pieces:
                        if ended is not None and sequence.done:
                            ended(index_of[id(sequence)], sequence.completion())
    except OutOfMemory as error:
        error.finished = {index: sequence.completion() for index, sequence in enumerate(sequences) if sequence.done}
        raise
    return [sequence.completion() for sequence in sequences]

"""The loop that generates tokens, for one sequence or several together."""

from __future__ import annotations

from collections import abc, deque

from transformers.cache_utils import Cache

from ..errors import ContextOverflow, OutOfMemory
from ..scaling.rope import Scaler
from ..tokenizer_tools.cover import shared_length
from .cache import CacheLost, can_rewind, restoring, rewind, tokens_read
from .completion import Completion
from .kv_cache import KVCache
from .prompt import Prompt
from .sampling import SamplingParams
from .scaled_model import ScaledModel
from .sequence import Sequence

ROWS = 8  # most sequences that are generated together; a step reads the weights once for all of them
_SHARED = 32  # shortest common beginning, in tokens, that is worth copying


def generate_tokens(
    model: ScaledModel,
    sequences: abc.Iterable[Sequence],
    length: int,
    *,
    expected_rope: Scaler | None = None,
    rows: int = 1,
) -> abc.Iterator[tuple[Sequence, str]]:
    """Generate the answers of sequences, up to `rows` together. When one ends, the next begins.

    A row gets the tokens that it gets alone. A prompt that begins like that of a sequence in progress is read from
    where they differ. If memory runs out, the last sequence waits until another has ended, and then continues. Other
    threads may use the model between two tokens.

    Args:
        length: tokens of the longest sequence, prompt and answer.
        expected_rope: the scaler that the caches were prepared for; None is the scaler in use now. It is an error if
            another scaler is in use.

    Yields:
        The sequence of every new token, and the text that this token made certain.

    Raises:
        OutOfMemory: one more token of the only sequence does not fit, or its cache cannot be rewound.
        PatchError: the scaler was changed between two tokens.
    """
    waiting, running = deque(sequences), list[Sequence]()
    ended: Sequence | None = None  # the last to end: the next may share its beginning
    expected_rope = expected_rope or model.rope
    while waiting or running:
        pieces: list[tuple[Sequence, str]] = []
        with model.running(length, expected_rope) as runner:
            while waiting and len(running) < rows:
                sequence = waiting[0]
                if not sequence.caches:
                    sequence.cache = _shared_beginning(sequence, [*running, *([ended] if ended else [])])
                try:
                    with restoring(*sequence.caches):
                        pieces.append((sequence, sequence.first_token(runner)))
                except OutOfMemory:
                    if not running and ended is None:
                        raise
                    _release(sequence, ended)
                    rows, ended = max(1, len(running)), None
                else:
                    running.append(waiting.popleft())
            if not pieces:
                try:
                    with restoring(*(cache for sequence in running for cache in sequence.caches)):
                        logits = runner.step([row for sequence in running for row in sequence.rows])
                except OutOfMemory as error:
                    if isinstance(error, CacheLost) or (len(running) == 1 and ended is None):
                        raise
                    if len(running) > 1:
                        waiting.appendleft(running.pop())
                    _release(*waiting, ended)
                    rows, ended = len(running), None
                else:
                    for sequence in running:
                        count = len(sequence.caches)
                        pieces.append((sequence, sequence.next_token(runner, logits[:count])))
                        logits = logits[count:]
        yield from pieces
        for sequence in [sequence for sequence in running if sequence.done]:
            running.remove(sequence)
            _release(ended)
            ended = sequence if waiting and rows > 1 else None
            if ended is None:
                sequence.release()


def _release(*sequences: Sequence | None) -> None:
    """Free the caches of sequences."""
    for sequence in sequences:
        if sequence is not None:
            sequence.release()


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
    sequences = [Sequence(prompt, params, model.vocabulary, model.stop_ids) for prompt in prompts]
    index_of = {id(sequence): index for index, sequence in enumerate(sequences)}
    try:
        for members in groups.values():
            longest = max(lengths[index] for index in members)
            with model.running(longest):  # no other scaler between two tokens
                rows = _rows_that_fit(model, [lengths[index] for index in members])
                for sequence, _ in generate_tokens(model, [sequences[i] for i in members], longest, rows=rows):
                    if ended is not None and sequence.done:
                        ended(index_of[id(sequence)], sequence.completion())
    except OutOfMemory as error:
        error.finished = {index: sequence.completion() for index, sequence in enumerate(sequences) if sequence.done}
        raise
    return [sequence.completion() for sequence in sequences]


def _rows_that_fit(model: ScaledModel, lengths: list[int]) -> int:
    """How many rows fit into memory together, even the longest ones. One row is known to fit."""
    longest = sorted(lengths, reverse=True)
    for rows in range(min(ROWS, len(lengths)), 1, -1):
        try:
            model.check_room(*longest[: rows + 1], length=longest[0])  # the last sequence to end is held, too
        except ContextOverflow:
            continue
        return rows
    return 1


def _shared_beginning(sequence: Sequence, others: abc.Sequence[Sequence]) -> Cache | None:
    """A copy of another sequence's cache, cut to the beginning that both share; None if that is short."""
    best, longest = None, _SHARED - 1
    for other in others:
        if isinstance(other.cache, KVCache):
            shared = shared_length(other.prompt_ids, sequence.prompt.certain_ids[:-1])  # the last token is run again
            if shared > longest:
                best, longest = other.cache, shared
    if best is None:
        return None
    excess = max(0, tokens_read(best) - longest)
    if not can_rewind(best, excess):
        return None
    cache = best.fork()
    rewind(cache, excess)
    return cache

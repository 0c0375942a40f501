"""The loop that generates tokens, for one sequence or several together."""

from __future__ import annotations

import time
from collections import abc, deque

from transformers.cache_utils import Cache

from ..errors import ContextOverflow, OutOfMemory
from ..scaling.rope import Scaler
from ..tokenizer_tools.cover import shared_length
from .cache import CacheLost, restoring, tokens_read
from .completion import Completion
from .kv_cache import KVCache
from .prefix_cache import PrefixCache, PrefixStore, shared_cache
from .prompt import Prompt
from .runners.runner import CHUNK, Runner
from .sampling import SamplingParams
from .scaled_model import ScaledModel
from .sequence import Sequence

ROWS = 8  # most sequences that are generated together; a step reads the weights once for all of them
_TURN = 256  # tokens of a prompt that are read at a time while other sequences wait for their next token


class Batch:
    """Sequences that are generated together, under one scaler. `generate_tokens` runs them.

    Args:
        length: tokens of the longest sequence, prompt and answer.
        expected_rope: the model's scaler, which the caches were prepared for. It is an error if the model has another
            one. None is the scaler in use when the batch is made.
        rope: the scaler of the batch, in place of the model's.
        rows: most sequences that are generated together.
        store: caches of earlier sequences. A new sequence begins with what it shares with one of them. The cache of a
            sequence that ends is added.
        takes_turns: whether a long prompt is read in pieces, with steps of the other sequences between them that take
            as long. If False, a prompt is read at once.

    Attributes:
        waiting: sequences that wait for a place; more may be added at any time.
        running: the sequences in progress.
    """

    def __init__(
        self,
        model: ScaledModel,
        sequences: abc.Iterable[Sequence],
        length: int,
        *,
        expected_rope: Scaler | None = None,
        rope: Scaler | None = None,
        rows: int = 1,
        store: PrefixStore | None = None,
        takes_turns: bool = False,
    ) -> None:
        self.waiting, self.running = deque(sequences), list[Sequence]()
        self.model, self.length, self.rope = model, length, rope
        self.expected_rope = (expected_rope or model.rope) if rope is None else None
        self._rows, self._store, self._takes_turns = rows, store, takes_turns
        self._ended: Sequence | None = None  # the last to end; the next sequence may begin like it
        self._lead = 0.0  # seconds of reading prompts minus seconds of steps
        self._rope_state = model.rope_state

    def start_waiting(self, runner: Runner) -> list[tuple[Sequence, str]]:
        """Read the prompts of waiting sequences and draw their first tokens, if there is room and it is their turn.

        Raises:
            OutOfMemory: there is no room, and no cache that could be freed.
        """
        pieces: list[tuple[Sequence, str]] = []
        self._rope_state = runner.rope_state
        while self.waiting and len(self.running) < self._rows:
            sequence, others = self.waiting[0], self._takes_turns and bool(self.running)
            if sequence.done:  # cancelled, or there is nothing to generate
                self.waiting.popleft().release()
                pieces.append((sequence, ""))
                continue
            if others and (self._lead > 0 or not self._has_room(runner, sequence)):
                break
            began = time.monotonic()
            if not sequence.caches:
                self._share(sequence)
            try:
                with restoring(*sequence.caches):
                    is_read = sequence.read_ahead(runner, _TURN if others else CHUNK)
                    if is_read:
                        piece = "" if sequence.done else sequence.first_token(runner)
            except OutOfMemory:
                freed = self._free(sequence)
                if not (self.running or freed):
                    raise
                self._rows = max(1, len(self.running))
                continue
            finally:
                self._lead += time.monotonic() - began
            if not is_read:
                break
            pieces.append((sequence, piece))
            self.running.append(self.waiting.popleft())
        return pieces

    def recover(self, error: OutOfMemory) -> None:
        """Make room after memory ran out in a step: the last sequence waits, and caches not in use are freed.

        Raises:
            OutOfMemory: `error`, if that frees nothing.
        """
        alone = len(self.running) == 1
        if not alone:
            self.waiting.appendleft(self.running.pop())
        freed = self._free(*self.waiting)
        if isinstance(error, CacheLost) or (alone and not freed):
            raise error
        self._rows = len(self.running)

    def count_step(self, seconds: float) -> None:
        """Count the seconds of a step of the running sequences."""
        self._lead = max(0.0, self._lead - seconds)

    def remove_ended(self) -> None:
        """Remove the sequences that have ended."""
        for sequence in [sequence for sequence in self.running if sequence.done]:
            self.running.remove(sequence)
            if self._ended is not None:
                self._ended.release()
                self._ended = None
            if self._store is not None:
                self._store.give(sequence.read_ids, sequence.cache, self._rope_state)
            elif self.waiting and self._rows > 1:
                self._ended = sequence
                continue
            sequence.release()

    def _has_room(self, runner: Runner, sequence: Sequence) -> bool:
        """True if memory has room for a sequence beside those in progress; caches that nobody uses are freed for it."""
        needed = [each.length for each in [*self.running, sequence] for _ in each.caches or [None]]
        caches = [cache for each in [*self.running, sequence] for cache in each.caches]
        owned = sum(cache.owned for cache in caches if isinstance(cache, KVCache))
        for _ in range(2):
            try:
                runner.check_room(*needed, owned=owned)
            except ContextOverflow:
                if not (self._store is not None and self._store.clear()):
                    return False
            else:
                return True
        return False

    def _share(self, sequence: Sequence) -> None:
        """Give a sequence a cache with what others have read of its prompt."""
        if sequence.shares_prefix:
            ended = [] if self._ended is None else [self._ended]
            sequence.cache = _shared_beginning(sequence, [*self.running, *ended])
            if sequence.cache is None and self._store is not None:
                sequence.cache = self._store.take(sequence.prompt.certain_ids, self._rope_state)
            sequence.reused = 0 if sequence.cache is None else tokens_read(sequence.cache)

    def _free(self, *sequences: Sequence) -> bool:
        """Free the caches of sequences, and those of ended ones. True if there was an ended one."""
        freed = self._ended is not None or (self._store is not None and self._store.clear())
        for sequence in sequences:
            sequence.release()
        if self._ended is not None:
            self._ended.release()
            self._ended = None
        return freed


def generate_tokens(batch: Batch) -> abc.Iterator[list[tuple[Sequence, str]]]:
    """Generate the answers of a batch. When a sequence ends, the next begins. This is the only loop that generates.

    A row gets the tokens that it gets alone. A prompt that begins like that of a sequence in progress is read from
    where they differ. If memory runs out, the last sequence waits until another has ended, and then continues. Other
    threads may use the model between two steps.

    Yields:
        After every step the sequences that got a token or ended, each with the text that became certain.

    Raises:
        OutOfMemory: one more token of the only sequence does not fit, or its cache cannot be rewound.
        PatchError: the scaler was changed between two tokens.
    """
    while batch.waiting or batch.running:
        with batch.model.running(batch.length, batch.expected_rope, batch.rope) as runner:
            pieces, running = batch.start_waiting(runner), batch.running
            if running and not pieces:
                began = time.monotonic()
                try:
                    with restoring(*(cache for sequence in running for cache in sequence.caches)):
                        logits = runner.step([row for sequence in running for row in sequence.rows])
                except OutOfMemory as error:
                    batch.recover(error)
                else:
                    batch.count_step(time.monotonic() - began)
                    for sequence in running:
                        count = len(sequence.caches)
                        pieces.append((sequence, sequence.next_token(runner, logits[:count])))
                        logits = logits[count:]
        yield pieces
        batch.remove_ended()


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
    sequences = [Sequence(prompt, params, model.vocabulary, model.stop_ids) for prompt in prompts]
    index_of = {id(sequence): index for index, sequence in enumerate(sequences)}
    try:
        for members in groups.values():
            longest = max(lengths[index] for index in members)
            with model.running(longest):  # no other scaler between two tokens
                rows = _rows_that_fit(model, [lengths[index] for index in members])
                batch = Batch(model, [sequences[index] for index in members], longest, rows=rows)
                for pieces in generate_tokens(batch):
                    for sequence, _ in pieces:
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
    ids = sequence.prompt.certain_ids[:-1]  # the last token is run again
    caches = [(shared_length(other.prompt_ids, ids), other.cache) for other in others]
    length, cache = max(caches, key=lambda pair: pair[0], default=(0, None))
    return shared_cache(cache, length)

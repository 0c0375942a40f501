"""The loop that generates tokens, for one sequence or several together, and when the next of them may begin."""

from __future__ import annotations

import time
from collections import abc, deque
from itertools import islice
from weakref import WeakSet

from transformers.cache_utils import Cache

from ..errors import ContextOverflow, OutOfMemory
from ..scaling.rope import Scaler
from ..tokenizer_tools.cover import shared_length
from .cache import CacheLost, restoring, tokens_read
from .kv_cache import owned_tokens
from .prefix_cache import PrefixStore, shared_cache
from .runners.runner import Runner
from .scaled_model import ScaledModel
from .sequence import Sequence, next_tokens

_TURN = 256  # tokens of a prompt that are read at a time while others wait for their next token
_PATIENCE = 8  # sequences that end after memory ran out, until one more is tried; each trial may read a prompt in vain


class Admission:
    """Decides when a prompt is read beside the sequences in progress. All batches of a scheduler share one.

    Args:
        rows: most sequences in progress.
        shared: whether batches of several requests share it. A long prompt is then read in pieces while others are
            generated, with steps between them that take as long.

    Attributes:
        batches: the batches. Each enters itself.
        limit: most sequences in progress now. It falls when memory has no room for one more, and rises as sequences
            end.
        lead: seconds that prompts were read while others waited for a token, minus seconds of steps.
    """

    def __init__(self, rows: int, *, shared: bool = False) -> None:
        self.batches: WeakSet[Batch] = WeakSet()
        self.limit = self._rows = rows
        self.shared, self.lead = shared, 0.0
        self._patience = self._ends_left = _PATIENCE

    @property
    def in_progress(self) -> list[Sequence]:
        """The sequences of all batches that hold caches."""
        return [sequence for batch in self.batches for sequence in batch.in_progress]

    @property
    def others_wait(self) -> bool:
        """True if a prompt is read in pieces, because other sequences wait for their next token."""
        return self.shared and any(batch.running for batch in self.batches)

    @property
    def has_turn(self) -> bool:
        """True if a prompt may be read now, False if steps are due."""
        return self.lead <= 0 or not self.others_wait

    def reserved_beside(self, batch: Batch) -> int:
        """Bytes that caches of the other batches will take beside what they hold."""
        return sum(other.reserved for other in self.batches if other is not batch and other.in_progress)

    def count_reading(self, seconds: float) -> None:
        """Count the time of reading a prompt while others waited."""
        self.lead += seconds

    def count_step(self, seconds: float) -> None:
        """Count the time of a step of sequences in progress."""
        self.lead = max(0.0, self.lead - seconds)

    def lower_limit(self, patience: int) -> None:
        """Let no other sequence begin, until one of those in progress ends.

        Args:
            patience: sequences that end until one more is tried.
        """
        self.limit = max(1, len(self.in_progress))
        self._patience = self._ends_left = patience

    def count_ended(self) -> None:
        """Count a sequence that has ended."""
        self._ends_left -= 1
        if not self._ends_left:
            self.limit, self._ends_left = min(self._rows, self.limit + 1), self._patience


class Batch:
    """Sequences that are generated together, under one scaler. `generate_tokens` runs them.

    Args:
        length: tokens of the longest sequence, prompt and answer.
        expected_rope: the model's scaler, which the caches were prepared for. It is an error if the model has another
            one. None is the scaler in use when the batch is made.
        rope: the scaler of the batch, in place of the model's.
        admission: decides when a waiting sequence begins. None is one sequence at a time.
        store: caches of earlier sequences. A new sequence begins with what it shares with one of them. The cache of a
            sequence that ends is added.

    Attributes:
        waiting: sequences that wait for a place; more may be added at any time.
        running: the sequences that are generated.
        reserved: bytes that the caches of the sequences in progress will take beside what they hold, if others share
            the memory.
    """

    def __init__(
        self,
        model: ScaledModel,
        sequences: abc.Iterable[Sequence],
        length: int,
        *,
        expected_rope: Scaler | None = None,
        rope: Scaler | None = None,
        admission: Admission | None = None,
        store: PrefixStore | None = None,
    ) -> None:
        self.waiting, self.running = deque(sequences), list[Sequence]()
        self.model, self.length, self.rope = model, length, rope
        self.expected_rope = expected_rope or rope or model.rope
        self.reserved = 0
        self._store, self._admission = store, admission or Admission(rows=1)
        self._admission.batches.add(self)
        self._ended: Sequence | None = None  # the last to end; the next sequence may begin like it
        self._begins = False  # the first of `waiting` is about to begin
        self._rope_state = model.rope_state

    @property
    def in_progress(self) -> list[Sequence]:
        """The sequences that hold caches: those that are generated, and the one whose prompt is being read."""
        return [*self.running, *(sequence for sequence in islice(self.waiting, 1) if sequence.caches)]

    def start_waiting(self, runner: Runner) -> list[tuple[Sequence, str]]:
        """Read the prompts of waiting sequences and draw their first tokens, if there is room and it is their turn.

        Raises:
            OutOfMemory: there is no room, although no other sequence is in progress.
            ContextOverflow: the same, known before it is read.
        """
        pieces: list[tuple[Sequence, str]] = []
        self._rope_state = runner.rope_state
        while self.waiting:
            self._begins = True
            try:
                piece = self._begin_first(runner)
            except Exception:
                if not pieces:
                    raise
                piece = None  # the error comes again in the next call, after these pieces were reported
            if piece is None:
                break
            pieces.append(piece)
        self._begins = False
        if self._admission.shared:
            self.reserved = runner.needed_bytes(*self._row_lengths, owned=owned_tokens(self._caches))
        return pieces

    def _begin_first(self, runner: Runner) -> tuple[Sequence, str] | None:
        """Read the prompt of the first waiting sequence and draw its first token.

        Returns:
            The sequence, and the text that became certain; None if the sequence still waits.
        """
        sequence = self.waiting[0]
        held_back = sequence.end_if_late()
        if sequence.done:  # late, cancelled, or there is nothing to generate
            self.waiting.popleft().release()
            return sequence, held_back
        if not (self._admission.has_turn and (sequence.caches or self._may_begin(sequence))):
            return None
        if not sequence.caches:
            self._share(sequence)
        others_wait, began = self._admission.others_wait, time.monotonic()
        is_read = is_freed = False
        try:
            with restoring(*sequence.caches):
                is_read = sequence.read_ahead(runner, _TURN if others_wait else runner.chunk)
                if is_read:
                    piece = "" if sequence.done else sequence.first_token(runner)
        except OutOfMemory:
            sequence.release()
            is_read, is_freed = False, self._free_unused()
            if not is_freed:
                if not self._admission.in_progress:
                    raise
                self._admission.lower_limit(_PATIENCE)
        finally:
            if others_wait:
                self._admission.count_reading(time.monotonic() - began)
        if is_freed:
            return self._begin_first(runner)
        if not is_read:
            return None
        self.running.append(self.waiting.popleft())
        return sequence, piece

    def recover(self, error: OutOfMemory) -> None:
        """Make room after memory ran out in a step: free caches that are not in use, else let the last sequence wait.

        Raises:
            OutOfMemory: `error`, if no other sequence is in progress, or a cache could not be rewound.
        """
        if isinstance(error, CacheLost):
            raise error
        if self._free_unused():
            return
        if len(self._admission.in_progress) == 1:
            raise error
        if len(self.in_progress) == len(self.running):
            self.waiting.appendleft(self.running.pop())
        self.waiting[0].release()
        self._admission.lower_limit(_PATIENCE)

    def count_step(self, seconds: float) -> None:
        """Count the seconds of a step of the running sequences."""
        self._admission.count_step(seconds)

    def remove_ended(self) -> None:
        """Remove the sequences that have ended."""
        for sequence in [sequence for sequence in self.running if sequence.done]:
            self.running.remove(sequence)
            self._admission.count_ended()
            if self._ended is not None:
                self._ended.release()
                self._ended = None
            if self._store is not None:
                self._store.give(sequence.read_ids, sequence.cache, self._rope_state)
            elif self.waiting and self._admission.limit > 1:
                self._ended = sequence
                continue
            sequence.release()

    def remove_failed(self) -> list[Sequence]:
        """Remove the sequences that an error of `generate_tokens` ends, and return them: the one that was about to
        begin, else all that are generated. Those that wait give up their caches."""
        if self._begins or not self.running:
            failed = [self.waiting.popleft()] if self.waiting else []
        else:
            failed = list(self.running)
            self.running.clear()
        self._begins = False
        for sequence in [*failed, *self.waiting]:
            sequence.release()
        return failed

    def _may_begin(self, sequence: Sequence) -> bool:
        """True if a sequence may begin: the limit and memory have room for one more, or no other is in progress.

        Raises:
            ContextOverflow: of a request of a scheduler, which has no room although no other is in progress.
        """
        count = len(self._admission.in_progress)
        if count >= self._admission.limit:
            return False
        if not count and self._store is None and self._ended is None:  # nothing could be freed for it
            return True
        try:
            self._make_room(sequence)
        except ContextOverflow:
            if not count and self._admission.shared:  # `Scheduler.check_room` counted on memory that others now use
                raise
            if count:
                self._admission.lower_limit(patience=1)
                return False
        return True

    def _make_room(self, sequence: Sequence) -> None:
        """Free caches that are not in use, if memory has no room for a sequence beside those in progress.

        Raises:
            ContextOverflow: there is none even then.
        """
        rows = [*self._row_lengths, *sequence.row_lengths]
        reserved = self._admission.reserved_beside(self)
        try:
            self.model.check_room(*rows, length=self.length, caches=self._caches, rope=self.rope, reserved=reserved)
        except ContextOverflow:
            if not self._free_unused():
                raise
            self._make_room(sequence)

    @property
    def _row_lengths(self) -> list[int]:
        return [length for sequence in self.in_progress for length in sequence.row_lengths]

    @property
    def _caches(self) -> list[Cache]:
        return [cache for sequence in self.in_progress for cache in sequence.caches]

    def _share(self, sequence: Sequence) -> None:
        """Give a sequence a cache with what others have read of its prompt."""
        if sequence.shares_prefix:
            ended = [] if self._ended is None else [self._ended]
            sequence.cache = _shared_beginning(sequence, [*self.running, *ended])
            if sequence.cache is None and self._store is not None:
                sequence.cache = self._store.take(sequence.prompt.certain_ids, self._rope_state)
            sequence.reused = 0 if sequence.cache is None else tokens_read(sequence.cache)

    def _free_unused(self) -> bool:
        """Free the caches of sequences that have ended. True if there were any."""
        freed = self._store is not None and self._store.clear()
        if self._ended is not None:
            self._ended.release()
            self._ended, freed = None, True
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
                    pieces = list(zip(running, next_tokens(runner, running, logits), strict=True))
        yield pieces
        batch.remove_ended()


def _shared_beginning(sequence: Sequence, others: abc.Sequence[Sequence]) -> Cache | None:
    """A copy of another sequence's cache, cut to the beginning that both share; None if that is short."""
    ids = sequence.prompt.certain_ids[:-1]  # the last token is run again
    caches = [(shared_length(other.prompt_ids, ids), other.cache) for other in others]
    length, cache = max(caches, key=lambda pair: pair[0], default=(0, None))
    return shared_cache(cache, length)

"""Many requests on one model: a thread that generates all answers in batches.

Requests begin in the order in which they arrive, and join and leave between two steps. Those with the same frequencies
are one batch, and batches take turns. Up to rounding, no answer depends on the other requests.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from transformers.cache_utils import Cache

from ..errors import ConfigError, RopewalkError
from ..scaling.rope import Scaler
from .batch import Admission, Batch, generate_tokens
from .completion import Completion, Token
from .generation import ROWS
from .kv_cache import owned_tokens
from .prefix_cache import PrefixStore
from .scaled_model import ScaledModel
from .sequence import Sequence

_LOG = logging.getLogger("ropewalk.scheduler")


class QueueFull(RopewalkError):
    """More requests are waiting than the scheduler holds."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What happened to a request.

    Attributes:
        text: the text that became certain.
        tokens: the tokens drawn since the last update.
        completion: set in the last update.
        error: set in the last update of a request that failed.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    completion: Completion | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.completion is not None or self.error is not None


class Request:
    """A sequence to generate.

    Args:
        sequence: prompt and parameters.
        scaler: the scaler to generate it under.
        length: tokens of prompt and answer together.
        report: called with every `Update`, in the scheduler's thread. If it raises an error, the request is cancelled.
    """

    def __init__(self, sequence: Sequence, scaler: Scaler, length: int, report: Callable[[Update], None]) -> None:
        self.sequence, self.scaler, self.length, self.report = sequence, scaler, length, report
        self.reported = 0  # tokens in updates so far


class Scheduler:
    """Generates the answers of requests in a thread, until it is closed.

    Args:
        rows: most requests that are answered at a time, whatever their scalers.
        waiting: most requests that wait for a place.
        cache_bytes: most bytes of keys and values of ended requests, which later requests that begin alike reuse.
    """

    def __init__(self, model: ScaledModel, *, rows: int = ROWS, waiting: int = 64, cache_bytes: int = 1 << 30) -> None:
        self.model = model
        self.store = PrefixStore(cache_bytes)
        self._rows, self._limit = rows, rows + waiting
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._cancelled: set[Request] = set()
        self._requests: dict[Sequence, Request] = {}  # those that are in a batch
        self._admission = Admission(rows, shared=True)
        self._batches: dict[object, tuple[Batch, Iterator[list[tuple[Sequence, str]]]]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ropewalk scheduler", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Number of requests that wait or are being answered."""
        return len(self._requests) + len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""
        return sum(len(batch.running) for batch, _ in list(self._batches.values()))

    def check_room(self, sequence: Sequence, scaler: Scaler) -> None:
        """Refuse a sequence that memory could not hold if no other were answered. It waits for the step in progress.

        Raises:
            ContextOverflow: with the numbers.
        """
        with self.model.running(sequence.length, rope=scaler) as runner:
            held = owned_tokens(self._held_caches()) * runner.bytes_per_token
            runner.check_room(*sequence.row_lengths, reserved=-held)

    def check_count(self, requests: int) -> None:
        """Refuse a number of requests that the scheduler never takes at once.

        Raises:
            ConfigError: with the numbers.
        """
        if requests > self._limit:
            raise ConfigError(
                f"{requests:,} answers at once are more than the {self._limit} that this server takes; ask for "
                "fewer (n times the prompts), or serve with a larger --queue"
            )

    def submit(self, *requests: Request) -> None:
        """Accept requests, all of them or none.

        Raises:
            ConfigError: they are more than the scheduler ever takes.
            QueueFull: too many are waiting, or the scheduler is closed.
        """
        self.check_count(len(requests))
        with self._changed:
            if self._closed:
                raise QueueFull("the server is shutting down; send the request to another one")
            if self.active + len(requests) > self._limit:
                raise QueueFull(
                    f"{self.active} requests are waiting or being answered, and this server takes {self._limit}; "
                    "try again later, or serve with a larger --queue"
                )
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, *requests: Request) -> None:
        """Stop requests whose answers are no longer needed. It does nothing to those that have ended."""
        with self._changed:
            self._cancelled.update(requests)
            self._changed.notify()

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.store.clear()

    def _held_caches(self) -> Iterator[Cache]:
        """The caches of the requests that are being answered, and of the store."""
        for batch, _ in list(self._batches.values()):
            for sequence in [*batch.running, *batch.waiting]:
                yield from sequence.caches
        yield from self.store.caches

    def _run(self) -> None:
        while self._take():
            for key in list(self._batches):
                lead = self._admission.lead
                if not self._step(key):
                    del self._batches[key]
                elif self._admission.lead > lead:  # it has read a prompt: next, another batch may
                    self._batches[key] = self._batches.pop(key)

    def _take(self) -> bool:
        """Wait for work, report what ended while it waited, and put the other requests into batches.

        Returns:
            False when the scheduler is closed and all are answered.
        """
        with self._changed:
            while not (self._waiting or self._batches or self._closed):
                self._changed.wait()
            cancelled, self._cancelled = self._cancelled, set()
            self._waiting = deque(request for request in self._waiting if request not in cancelled)
            for request in cancelled:
                if self._requests.pop(request.sequence, None) is not None:
                    request.sequence.end("cancelled")  # its batch skips it from now on
            for request in self._waiting:
                request.sequence.end_if_late()
            ended = [request for request in self._waiting if request.sequence.done]
            self._waiting = deque(request for request in self._waiting if not request.sequence.done)
            while self._waiting and self._has_place():
                request = self._waiting.popleft()
                self._requests[request.sequence] = request
                self._batch_of(request).waiting.append(request.sequence)
        for request in ended:
            self._send(request, Update(completion=request.sequence.completion()))
        return bool(self._batches) or not self._closed

    def _has_place(self) -> bool:
        """True if one more request may enter its batch. Where memory is short, those before it have to begin first."""
        admission = self._admission
        all_began = admission.limit == self._rows or self._requests.keys() <= set(admission.in_progress)
        return all_began and len(self._requests) < self._rows

    def _batch_of(self, request: Request) -> Batch:
        """The batch of the requests with the same frequencies."""
        alone = request if self.model.follows_length(request.scaler) else None
        key = (request.scaler, alone)
        if key not in self._batches:
            batch = Batch(
                self.model, [], request.length, rope=request.scaler, admission=self._admission, store=self.store
            )
            self._batches[key] = batch, generate_tokens(batch)
        return self._batches[key][0]

    def _step(self, key: object) -> bool:
        """Run a step of a batch and report it; False if the batch has ended.

        An error ends the sequence that was about to begin, else those in progress. The others go on.
        """
        batch, steps = self._batches[key]
        try:
            pieces = next(steps, None)
        except Exception as error:
            self.store.clear()
            for sequence in batch.remove_failed():
                if sequence in self._requests:
                    self._end(sequence, Update(error=error))
            self._batches[key] = batch, generate_tokens(batch)
            return bool(batch.waiting or batch.running)
        for sequence, piece in pieces or []:
            if sequence in self._requests:
                self._report(sequence, piece)
        return pieces is not None

    def _report(self, sequence: Sequence, piece: str) -> None:
        request = self._requests[sequence]
        tokens = sequence.tokens[request.reported :]
        request.reported += len(tokens)
        if sequence.done:
            self._end(sequence, Update(text=piece, tokens=tokens, completion=sequence.completion()))
        else:
            self._send(request, Update(text=piece, tokens=tokens))

    def _end(self, sequence: Sequence, update: Update) -> None:
        with self._changed:
            request = self._requests.pop(sequence)
        self._send(request, update)

    def _send(self, request: Request, update: Update) -> None:
        try:
            request.report(update)
        except Exception:  # must not end the thread, which other requests wait for
            _LOG.exception("a request was cancelled, because its answer could not be reported")
            self.cancel(request)

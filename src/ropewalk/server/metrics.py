"""What `/metrics` tells, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine.completion import Usage
from ..engine.scheduler import Scheduler

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """Counters of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ropewalk_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("ropewalk_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            "ropewalk_cached_prompt_tokens", "Tokens of prompts whose keys and values were cached.", registry=registry
        )
        self.written_tokens = Counter("ropewalk_completion_tokens", "Tokens written.", registry=registry)
        self.cancelled = Counter("ropewalk_cancelled", "Answers that a client did not wait for.", registry=registry)
        self.first_token_seconds = Histogram(
            "ropewalk_time_to_first_token_seconds",
            "From a request to the first token of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "ropewalk_request_seconds", "From a request to the end of its answer.", buckets=_SECONDS, registry=registry
        )
        for name, text, value in (
            ("ropewalk_requests_running", "Requests that are being answered.", lambda: scheduler.running),
            ("ropewalk_requests_waiting", "Requests that wait.", lambda: scheduler.active - scheduler.running),
            ("ropewalk_prefix_cache_bytes", "Bytes of the caches of ended requests.", lambda: scheduler.store.bytes),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def count(self, usage: Usage, cached: int) -> None:
        """Count the tokens of an answer.

        Args:
            cached: tokens of its prompt that an earlier request had read.
        """
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(cached)
        self.written_tokens.inc(usage.completion_tokens)

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self._registry)

"""One HTTP request: its sequences, what the scheduler reports of them, and the answer to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from ..engine.chat_template import chat_ids
from ..engine.completion import Completion, Token
from ..engine.model import Model
from ..engine.prompt import Prompt
from ..engine.prompt_score import ScoredSequence
from ..engine.rope_plan import RopePlan
from ..engine.sampling import SamplingParams
from ..engine.scheduler import Request, Scheduler, Update
from ..engine.sequence import Sequence
from ..tokenizer_tools.stream import TextStream
from ..tokenizer_tools.token_texts import TokenTexts
from . import answers
from .metrics import Metrics
from .requests import Asked

PATIENCE = 0.5  # seconds between two looks whether a client is still there

IsGone = Callable[[], Awaitable[bool]]
"""Tells whether the client went away."""


class _Choice:
    """One of the answers, while it is written."""

    def __init__(self, index: int, sequence: Sequence) -> None:
        self.index, self.sequence = index, sequence
        self.request: Request
        self.texts: list[str] = []
        self.tokens: list[Token] = []
        self.completion: Completion | None = None
        self.has_ended = False


class Job:
    """The answers to one HTTP request.

    To make one is to tokenize the prompts, which may take seconds: call it in a thread. Then, in the event loop,
    `submit`, and `answer` or `events`, and `cancel` in any case.

    Args:
        name: what the client calls the model.
        has_left: tells whether the client went away; it is asked before each prompt.

    Attributes:
        asked: the request.

    Raises:
        ClientDisconnect: the client went away.
        RopewalkError: the model cannot answer it, for example because a prompt is too long.
    """

    def __init__(
        self,
        asked: Asked,
        model: Model,
        scheduler: Scheduler,
        metrics: Metrics,
        name: str,
        has_left: Callable[[], bool],
    ) -> None:
        self._started = time.monotonic()
        self.asked, self._vocabulary, self._scheduler, self._metrics = asked, model.vocabulary, scheduler, metrics
        self._texts = TokenTexts(model.vocabulary, model.tokenizer)
        self._own_name = model.name
        self._header = answers.Header.new("chatcmpl" if asked.is_chat else "cmpl", name)
        self._plan = model.plan if asked.rope is None else model.plan_for(asked.rope)
        scheduler.check_count(asked.count * max(1, len(asked.prompts)))
        sequences = _sequences(asked, model, self._plan, has_left)
        for sequence in sequences:
            scheduler.check_room(sequence, self._plan.at(sequence.length))
        self._choices = [_Choice(*pair) for pair in enumerate(sequences)]
        self._updates: asyncio.Queue[tuple[_Choice, Update]] = asyncio.Queue()

    def submit(self) -> None:
        """Ask the scheduler for the answers.

        Raises:
            QueueFull: too many requests wait.
        """
        loop = asyncio.get_running_loop()

        def report(choice: _Choice, update: Update) -> None:
            """Called by the scheduler's thread."""
            loop.call_soon_threadsafe(self._updates.put_nowait, (choice, update))

        for choice in self._choices:
            length = choice.sequence.length
            choice.request = Request(choice.sequence, self._plan.at(length), length, partial(report, choice))
        self._scheduler.submit(*(choice.request for choice in self._choices))

    def cancel(self) -> None:
        """Stop the answers that have not ended."""
        unfinished = [choice.request for choice in self._choices if not choice.has_ended]
        self._metrics.cancelled.inc(len(unfinished))
        self._scheduler.cancel(*unfinished)

    async def answer(self, is_gone: IsGone) -> bytes:
        """The whole answer as JSON. It is written in a thread: one with many log-probabilities takes seconds.

        Raises:
            ClientDisconnect: the client went away.
            RopewalkError: an answer failed.
        """
        async for choice, update in self._reported(is_gone):
            choice.texts.append(update.text)
            choice.tokens += update.tokens
        return await run_in_threadpool(self._written)

    def _written(self) -> bytes:
        choices = [
            self._chat_choice(choice) if self.asked.is_chat else self._choice(choice) for choice in self._choices
        ]
        form = "chat.completion" if self.asked.is_chat else "text_completion"
        return answers.encoded(self._header.object(form, choices, self._usage()))

    async def events(self, is_gone: IsGone) -> AsyncIterator[bytes]:
        """The answers as server-sent events. An error is an event, too; it is the last."""
        asked = self.asked
        form = "chat.completion.chunk" if asked.is_chat else "text_completion"
        tables = {choice: self._logprobs_table(choice) for choice in self._choices}
        for choice in self._choices:
            if asked.is_chat:
                begin = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield answers.sse(self._header.object(form, [begin]))
            elif asked.echo:
                text = self._prompt_text(choice.sequence)
                yield answers.sse(self._header.object(form, [answers.text_chunk(choice.index, text)]))
        try:
            async for choice, update in self._reported(is_gone):
                if update.text or update.completion or (update.tokens and asked.wants_logprobs):
                    table = tables[choice]
                    chunk = self._chat_chunk(choice, update) if asked.is_chat else self._chunk(choice, update, table)
                    yield answers.sse(self._header.object(form, [chunk]))
        except ClientDisconnect:
            return
        except Exception as error:
            _, body = answers.described(error, self._own_name, self._header.model)
            yield answers.sse(body)
            return
        if asked.stream_usage:
            yield answers.sse(self._header.object(form, [], self._usage()))
        yield answers.sse("[DONE]")

    async def _reported(self, is_gone: IsGone) -> AsyncIterator[tuple[_Choice, Update]]:
        """What happens to the answers, until all have ended.

        Raises:
            ClientDisconnect: the client went away.
        """
        is_first, looked = True, self._started
        while not all(choice.has_ended for choice in self._choices):
            if (now := time.monotonic()) > looked + PATIENCE:
                looked = now
                if await is_gone():
                    raise ClientDisconnect
            try:
                choice, update = await asyncio.wait_for(self._updates.get(), PATIENCE)
            except TimeoutError:
                continue
            choice.has_ended = update.is_last
            if update.error is not None:
                raise update.error
            if is_first and update.tokens:
                self._metrics.first_token_seconds.observe(time.monotonic() - self._started)
                is_first = False
            if update.completion is not None:
                choice.completion = update.completion
                self._metrics.count(update.completion.usage, choice.sequence.reused)
            yield choice, update
        self._metrics.seconds.observe(time.monotonic() - self._started)

    def _usage(self) -> dict[str, Any]:
        """Token counts. A prompt with several answers counts once."""
        counts = [choice.completion.usage for choice in self._choices if choice.completion is not None]
        each = self.asked.count
        return answers.usage(
            sum(count.prompt_tokens for count in counts[::each]),
            sum(count.completion_tokens for count in counts),
            sum(choice.sequence.reused for choice in self._choices[::each]),
        )

    def _chat_choice(self, choice: _Choice) -> dict[str, Any]:
        """A whole answer of a chat."""
        assert choice.completion is not None
        return {
            "index": choice.index,
            "finish_reason": answers.finish_reason(choice.completion),
            "message": {"role": "assistant", "content": "".join(choice.texts)},
            "logprobs": answers.chat_logprobs(self._texts, choice.tokens) if self.asked.wants_logprobs else None,
        }

    def _choice(self, choice: _Choice) -> dict[str, Any]:
        """A whole completion, with what its prompt was asked for."""
        asked, completion, sequence = self.asked, choice.completion, choice.sequence
        assert completion is not None
        answer = answers.text_chunk(choice.index, "".join(choice.texts), answers.finish_reason(completion))
        if completion.sources is not None:
            answer["sources"] = completion.sources
        if asked.echo:
            answer["text"] = self._prompt_text(sequence) + answer["text"]
        scored = sequence.scored if isinstance(sequence, ScoredSequence) else []
        if asked.prompt_logprobs is not None:
            answer["prompt_logprobs"] = answers.prompt_logprobs(self._texts, scored)
        if asked.wants_logprobs:
            table = self._logprobs_table(choice)
            if asked.echo:
                table.add(sequence.prompt.ids[0], None, None)
                for token in scored:
                    table.add(token.id, token.logprob, dict(list(token.top.items())[: asked.params.logprobs]))
            for written in choice.tokens:
                table.add_written(written)
            answer["logprobs"] = table.take()
        return answer

    def _chat_chunk(self, choice: _Choice, update: Update) -> dict[str, Any]:
        """A choice of an event of a chat."""
        reason = None if update.completion is None else answers.finish_reason(update.completion)
        delta = {} if reason and not update.text else {"content": update.text}
        chunk = {"index": choice.index, "delta": delta, "finish_reason": reason}
        if self.asked.wants_logprobs:
            chunk["logprobs"] = answers.chat_logprobs(self._texts, update.tokens)
        return chunk

    def _chunk(self, choice: _Choice, update: Update, table: answers.CompletionLogprobs) -> dict[str, Any]:
        """A choice of an event of a completion."""
        reason = None if update.completion is None else answers.finish_reason(update.completion)
        chunk = answers.text_chunk(choice.index, update.text, reason)
        if self.asked.wants_logprobs:
            for token in update.tokens:
                table.add_written(token)
            chunk["logprobs"] = table.take()
        return chunk

    def _logprobs_table(self, choice: _Choice) -> answers.CompletionLogprobs:
        """An empty table for an answer, with the prompt if that is echoed."""
        if self.asked.echo:
            stream = TextStream(self._vocabulary, starts_text=True)
        else:
            stream = choice.sequence.prompt.text_stream(self._vocabulary)
        return answers.CompletionLogprobs(self._texts, stream, self.asked.params.logprobs or 0)

    def _prompt_text(self, sequence: Sequence) -> str:
        data = self._vocabulary.text_bytes(sequence.prompt.ids)
        if self._vocabulary.adds_space:
            data = data.removeprefix(b" ")
        if self.asked.writes:  # the answer begins with the character that the prompt ends in
            data = data.removesuffix(sequence.prompt.unfinished)
        return data.decode(errors="replace")


def _sequences(asked: Asked, model: Model, plan: RopePlan, has_left: Callable[[], bool]) -> list[Sequence]:
    """A sequence for every answer, `asked.count` for each prompt."""
    params = asked.params
    if asked.scores_prompt:
        params = replace(params, continuation="off")  # the prompt's tokens are shown as they are scored
    if params.seed is None:
        each = [params] * asked.count
    else:
        each = [replace(params, seed=params.seed + number) for number in range(asked.count)]
    prompts: list[str | list[int]] = asked.prompts
    if asked.is_chat:
        prompts = [chat_ids(asked.messages, model.tokenizer, model.vocabulary)]
    if asked.contexts:
        return [
            model.over_contexts(str(prompt), asked.contexts, "entropy", params, plan=plan)
            for prompt in _until_left(prompts, has_left)
            for params in each
        ]
    read = [model.read(prompt, params.continuation, plan=plan) for prompt in _until_left(prompts, has_left)]
    asked.check_scores(sum(len(prompt.ids) for prompt in read))
    return [_sequence(asked, prompt, params, model, plan) for prompt in read for params in each]


def _until_left(prompts: list[str | list[int]], has_left: Callable[[], bool]) -> Iterator[str | list[int]]:
    for prompt in prompts:
        if has_left():
            raise ClientDisconnect
        yield prompt


def _sequence(asked: Asked, read: Prompt, params: SamplingParams, model: Model, plan: RopePlan) -> Sequence:
    model.check_reach(len(read.ids) - (not asked.writes), params, plan)  # `params` counts one token at least
    parts = (read, model.resolved(params), model.vocabulary, model.stop_ids)
    if asked.scores_prompt:
        return ScoredSequence(*parts, alternatives=asked.scored_alternatives, writes=asked.writes)
    sequence = Sequence(*parts)
    if not asked.writes:
        sequence.end("length")
    return sequence

"""`ropewalk generate --input`: many prompts from a file, and their answers in another, which a second run completes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
import filelock

from ..errors import DataError, RopewalkError, first_line
from .messages import shell_message, warn_of_unused_seed
from .waiting import waiting

if TYPE_CHECKING:
    from ..engine.chat_template import Message
    from ..engine.completion import Completion
    from ..engine.model import Model
    from ..engine.prompt import Prompt
    from ..engine.sampling import SamplingParams

Id = str | int


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """A line of the input: a prompt or the messages of a chat, or why it has none."""

    id: Id
    prompt: str = ""
    messages: list[Message] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def sha256(self) -> str:
        """The beginning of a hash of what is asked: an answer belongs to it, whatever its line is called."""
        return hashlib.sha256(json.dumps(self.messages or self.prompt, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """That the lines are chats.

    Attributes:
        system: the system message of each.
    """

    system: str | None = None


def answer_all(
    source: Path,
    target: Path,
    settings: dict[str, Any],
    chat: Chat | None,
    params: SamplingParams,
    open_model: Callable[[], Model],
) -> None:
    """Answer the prompts of `source` that have no answer in `target` yet, and append the answers as they are complete.

    Args:
        settings: what the answers depend on beside `params`, `chat` and the model as it runs, as JSON has it.
        chat: each line is a message or a list of them; None continues prompts.
        open_model: loads the model, once the files are found to go together.

    Raises:
        DataError: a file cannot be read, two lines have the same id, `target` has answers of another model, of other
            settings or to other prompts, or another run is writing it.
        click.exceptions.Exit: some prompts cannot be answered; exit code 1.
        click.Abort: Ctrl-C.
    """
    settings = {**settings, "chat": None if chat is None else dataclasses.asdict(chat)}
    requests = list(_requests(source, chat))
    with _locked(target):
        answered, found = _answered(target)
        _check_same(found, settings, target)
        _check_prompts(answered, requests, target)
        todo = [request for request in requests if request.id not in answered]
        model = open_model()  # also where nothing is left to answer: the weights may have changed
        settings |= _settings_of_run(model, params)
        _check_same(found, settings, target)
        if len(todo) < len(requests):
            click.echo(f"ropewalk: {len(requests) - len(todo)} of {len(requests)} are in {target} already", err=True)
        if todo:
            _answer_missing(todo, target, settings, params, model)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other runs from writing to `target`.

    Raises:
        DataError: another run does, or its folder cannot be written.
    """
    from ..engine import tensor_parallel

    if not tensor_parallel.is_first():  # the first process of the launch writes
        yield
        return
    file = target.with_name(f".{target.name}.lock")
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DataError(f"another run is writing {target}; wait for it, or name another --output") from None
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def _answer_missing(
    todo: list[PromptLine], target: Path, settings: dict[str, Any], params: SamplingParams, model: Model
) -> None:
    errors = []
    warn_of_unused_seed(model, params)
    _remove_unfinished(target)
    try:
        with (
            # half of a surrogate pair, in an id, is escaped as JSON does
            target.open("a", encoding="utf-8", errors="backslashreplace") as file,
            waiting("answering", len(todo), "prompts") as advance,
        ):

            def write(request: PromptLine, fields: dict[str, Any]) -> None:
                _write(file, {"id": request.id, **settings, **fields})
                advance(1)

            prompts: list[tuple[PromptLine, Prompt]] = []
            for request in todo:
                prompt = _read(model, request, params)
                if isinstance(prompt, str):
                    write(request, {"error": prompt})
                    errors.append(prompt)
                else:
                    prompts.append((request, prompt))
            _answer(model, prompts, params, write)
    except KeyboardInterrupt:
        raise click.Abort(f"; complete answers are in {target}, run the same command again to continue") from None
    if errors:
        click.echo(
            f"ropewalk: {len(errors)} of {len(todo)} have an error in {target} instead of an answer; the first: "
            f"{errors[0]}",
            err=True,
        )
        raise click.exceptions.Exit(1)


def _settings_of_run(model: Model, params: SamplingParams) -> dict[str, Any]:
    """What is known of the settings when the model is loaded, as JSON has it: names of results of an evaluation, and
    the sampling parameters: the temperature, and what differs from the defaults."""
    resolved = model.resolved(params)
    usual = type(resolved)()
    sampling: dict[str, Any] = {"temperature": resolved.temperature}
    for field in dataclasses.fields(resolved):
        if (value := getattr(resolved, field.name)) != getattr(usual, field.name):
            sampling[field.name] = list(value) if isinstance(value, tuple) else value
    chosen = {} if model.plan.choice is None else {"chosen": str(model.plan.choice)}
    fingerprints = {"weights": model.fingerprint[:16], "tokenizer_sha256": model.tokenizer_fingerprint[:16]}
    return {"dtype": model.precision, **chosen, "sampling": sampling, **fingerprints}


def _answer(
    model: Model,
    prompts: list[tuple[PromptLine, Prompt]],
    params: SamplingParams,
    write: Callable[[PromptLine, dict[str, Any]], None],
) -> None:
    from ..engine.generation import complete_all

    def ended(index: int, completion: Completion) -> None:
        request, prompt = prompts[index]
        scaler = model.rope_at(len(prompt.ids) + params.max_new_tokens)
        chosen = {} if model.plan.choice is None else {"scaler": str(scaler)}
        write(request, {"prompt_sha256": request.sha256, **chosen, **answer_fields(model, completion)})

    complete_all(model, [prompt for _, prompt in prompts], params, ended)


def _read(model: Model, request: PromptLine, params: SamplingParams) -> Prompt | str:
    """The prompt's tokens, or why it cannot be answered."""
    from ..engine.chat_template import chat_ids

    if request.error is not None:
        return request.error
    try:
        text = chat_ids(request.messages, model.tokenizer, model.vocabulary) if request.messages else request.prompt
        prompt = model.read(text, params.continuation)
        model.check_length(len(prompt.ids), params)
    except RopewalkError as error:
        return shell_message(error.args, click.get_current_context().command)
    return prompt


def _write(file: TextIO, line: dict[str, Any]) -> None:
    from ..engine import tensor_parallel

    if not tensor_parallel.is_first():
        return
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _requests(source: Path, chat: Chat | None) -> Iterator[PromptLine]:
    from ..engine.texts import read_prompt

    text = read_prompt(source.read_bytes(), str(source))
    if isinstance(text, bytes):
        raise DataError(f"{source} ends inside a character; it is cut off")
    seen: set[Id] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            request = _request(line, number, chat)
            if request.id in seen:
                raise DataError(f"{source}, line {number}: the id {request.id!r} is that of an earlier line too")
            seen.add(request.id)
            yield request
    if not seen:
        raise DataError(f'{source} has no prompts; write one JSON object a line, such as {{"prompt": "Once"}}')


def _request(line: str, number: int, chat: Chat | None) -> PromptLine:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return PromptLine(id=number, error=f"line {number} is not JSON ({first_line(error)})")
    if not isinstance(record, dict):
        return PromptLine(id=number, error=f"line {number} is not a JSON object with a field prompt")
    given = record.get("id", number)
    if not isinstance(given, str | int):
        return PromptLine(id=number, error=f"the id {given!r} of line {number} must be a string or a whole number")
    known = ("prompt",) if chat is None else ("prompt", "messages")
    if len(fields := record.keys() & set(known)) > 1:
        return PromptLine(id=given, error=f"line {number} has a prompt and messages; leave out one of them")
    content = record[fields.pop()] if fields else None
    if isinstance(content, str):
        return (
            PromptLine(id=given, prompt=content) if chat is None else _chat_line(given, number, [_user(content)], chat)
        )
    if isinstance(content, list) and "messages" in record and chat is not None:
        return _chat_line(given, number, content, chat)
    has = f"has {', '.join(map(repr, record))}" if record else "is empty"
    wanted = "prompt that is a string" + ("" if chat is None else ", and no list of messages")
    hint = "; add --chat" if chat is None and "messages" in record else ""
    return PromptLine(id=given, error=f"line {number} has no field {wanted}; it {has}{hint}")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _chat_line(given: Id, number: int, messages: list[Any], chat: Chat) -> PromptLine:
    if not messages:
        return PromptLine(id=given, error=f"line {number} has an empty list of messages")
    if chat.system is None:
        return PromptLine(id=given, messages=messages)
    if isinstance(messages[0], dict) and messages[0].get("role") == "system":
        return PromptLine(id=given, error=f"line {number} has a system message of its own; leave out --system")
    return PromptLine(id=given, messages=[{"role": "system", "content": chat.system}, *messages])


def _answered(target: Path) -> tuple[dict[Id, str | None], list[dict[str, Any]]]:
    """The ids that have an answer, with the hash of what was asked, and the settings of the answers, each once. A last
    line that a killed run left unfinished is not read.

    Raises:
        DataError: the file holds something else.
    """
    answered: dict[Id, str | None] = {}
    found: list[dict[str, Any]] = []
    lines, rest = _lines(target)
    if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
        raise DataError(f"the last line of {target} is not the beginning of an answer; name another --output")
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            record = json.loads(line)
            if "error" in record:
                continue
            answered[record["id"]] = record.get("prompt_sha256")
            settings = {name: value for name, value in record.items() if name not in _ANSWER}
            if settings not in found:
                found.append(settings)
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{target}, line {number} is not an answer of this command; name another --output"
            ) from None
    return answered, found


def _check_same(found: list[dict[str, Any]], settings: dict[str, Any], target: Path) -> None:
    """Refuse to add answers under other settings than those of the answers in `target`.

    Raises:
        DataError: with the setting.
    """
    for there in found:
        for name, value in settings.items():
            if name not in there:
                raise DataError(f"{target} has lines without {name}; name another --output")
            if there[name] != value:
                raise DataError(
                    f"{target} has answers under {name} {there[name]}, and this run has {value}; name another --output"
                )


def _check_prompts(answered: dict[Id, str | None], requests: list[PromptLine], target: Path) -> None:
    """Refuse to take an answer for that to another prompt, as where a line was put before others without ids.

    Raises:
        DataError: with the id.
    """
    for request in requests:
        if request.id not in answered or request.error is not None:
            continue
        there = answered[request.id]
        if there is None:
            raise DataError(f"{target} has lines without prompt_sha256; name another --output")
        if there != request.sha256:
            raise DataError(
                f"{target} has an answer {request.id!r} to another prompt than this input has; name another --output, "
                "or give each prompt an id of its own"
            )


_BEGINNING = b'{"id": '  # of every answer


def _lines(target: Path) -> tuple[bytes, bytes]:
    """The whole lines of a file, and what follows them."""
    raw = target.read_bytes() if target.exists() else b""
    end = raw.rfind(b"\n") + 1
    return raw[:end], raw[end:]


def _remove_unfinished(target: Path) -> None:
    """Remove a last line that a killed run left unfinished."""
    from ..engine import tensor_parallel

    lines, rest = _lines(target)
    if rest and tensor_parallel.is_first():
        click.echo(f"ropewalk: the last line of {target} is unfinished; it is removed, and answered again", err=True)
        with target.open("r+b") as file:
            file.truncate(len(lines))


_ANSWER = ("id", "prompt_sha256", "scaler", "text", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs")
"""Fields of a line that are no settings."""


def answer_fields(model: Model, completion: Completion) -> dict[str, Any]:
    """What JSON says of an answer."""
    fields: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.usage.prompt_tokens,
        "completion_tokens": completion.usage.completion_tokens,
    }
    if completion.logprobs is not None:
        from ..tokenizer_tools.token_texts import TokenTexts

        texts = TokenTexts(model.vocabulary, model.tokenizer)
        fields["logprobs"] = [
            {
                "token": texts.text(token.id),
                "id": token.id,
                "logprob": token.logprob,
                "top": [
                    {"token": texts.text(other), "id": other, "logprob": logprob}
                    for other, logprob in (token.top or {}).items()
                ],
            }
            for token in completion.logprobs
        ]
    return fields

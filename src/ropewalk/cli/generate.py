"""`ropewalk generate`: a prompt continued, or answered over the contexts of some files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..errors import DataError
from .answers import answer_over_files, continue_text
from .batch import Chat, answer_all
from .help_page import EXAMPLES, command
from .messages import warn_of_unused_seed
from .options import (
    chosen_rope,
    given_max_length,
    is_given,
    json_option,
    loads_a_model,
    refuse_without_template,
    rope_option,
    sampling_options,
)
from .waiting import fetch_model, load_model, waiting

if TYPE_CHECKING:
    from ..engine.model import Model
    from ..engine.sampling import SamplingParams

_QUESTION_MARKS = ("?", "\uff1f", "\u061f")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@command(
    epilog=EXAMPLES + '  ropewalk generate smollm2-135m "Once upon a time" --rope auto\n'
    "  ropewalk generate ./my-model --file book.txt --max-new-tokens 100 --temperature 0\n"
    "  ropewalk generate ./my-model --input prompts.jsonl --output answers.jsonl\n"
    '  ropewalk generate smollm2-135m "The captain of the ship is" --window 2k --contexts moby-dick.txt'
)
@click.argument("model")
@click.argument("prompt", required=False)
@click.argument("files", nargs=-1)
@rope_option(note=" auto is what to take without time to tune.")
@click.option("--file", type=_FILE, help="Read the prompt from this file.")
@click.option("--chat", "as_chat", is_flag=True, help="PROMPT is a message to a chat model, which gets its template.")
@click.option("--system", help="With --chat: the system message, which tells the model how to answer.")
@sampling_options
@click.option(
    "--logprobs", type=int, help="With --json or --output: log-probabilities of each token and this many alternatives."
)
@click.option(
    "--continuation",
    type=click.Choice(["auto", "exact", "off"]),
    default="auto",
    show_default=True,
    help="Whether the first token may begin inside PROMPT; off begins one at its end.",
)
@click.option(
    "--contexts",
    "over_contexts",
    is_flag=True,
    help="PROMPT is a question over the FILES that follow, each read by itself (NBCE).",
)
@click.option(
    "--window",
    help="Split FILES into windows of this many tokens, such as 2k, at sentences; they overlap by an eighth.",
)
@click.option(
    "--pooling",
    type=click.Choice(["entropy", "mean", "max"]),
    default="entropy",
    show_default=True,
    help="How the answers of contexts become one: that of the least uncertain one, the mean, or the largest.",
)
@click.option(
    "--input",
    "prompts",
    type=_FILE,
    help="Answer many prompts: JSON lines with a field prompt (with --chat also messages, a list) and, if wanted, id "
    "(else the number of the line).",
)
@click.option(
    "--output",
    "answers",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --input: the answers, a JSON line each. Run again, it answers what is missing.",
)
@click.option(
    "--special-tokens",
    is_flag=True,
    help="Names of special tokens in PROMPT stand for them, as a chat template means it; else they are plain text.",
)
@loads_a_model
@click.option("--max-length", help="Go past the scaler's reach, up to this length.")
@json_option("model, rope, text, finish_reason, prompt_tokens, completion_tokens; logprobs and sources if asked for")
def generate(
    model: str,
    prompt: str | None,
    files: tuple[str, ...],
    rope: str,
    file: Path | None,
    as_chat: bool,
    system: str | None,
    sampling: dict[str, Any],
    logprobs: int | None,
    continuation: Literal["auto", "exact", "off"],
    over_contexts: bool,
    window: str | None,
    pooling: Literal["entropy", "mean", "max"],
    prompts: Path | None,
    answers: Path | None,
    special_tokens: bool,
    loading: dict[str, Any],
    max_length: str | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with MODEL.

    MODEL is a built-in name, a folder, a .gguf file or a hub id. PROMPT is the text itself, or - to read it from
    standard input; --file and --input take its place. The text is printed as it is written.

    With --contexts, the next token is drawn from one distribution: those after every one of FILES, each with PROMPT
    after it, are pooled. In a terminal every context has its color, and so has what it answered. Contexts have no
    order, a part of the answer comes from one of them, and a confident answer from a context that does not know may
    win.

    With --input, answers are written as they are complete, in any order. A prompt that cannot be answered gets a line
    with its error, and is tried again by the next run.
    """
    if over_contexts and prompt is not None and file is not None:
        files = (prompt, *files)  # the first of the files is in the place of the prompt
        prompt = None
    _check_usage(prompt, files, file, over_contexts, window, prompts, answers)
    if logprobs is not None and not (as_json or prompts):
        raise click.UsageError("--logprobs are part of the JSON; add --json")
    if as_json and prompts:
        raise click.UsageError("--json prints one answer, and --output has a JSON line for each; leave out --json")
    if system is not None and not as_chat:
        raise click.UsageError("--system is a message of a chat; add --chat")
    if as_chat and over_contexts:
        raise click.UsageError("--chat takes messages; leave out --contexts")
    if as_chat and special_tokens:
        raise click.UsageError("names of special tokens in a message are plain text; leave out --special-tokens")
    if prompts is None:
        text = _read_prompt(prompt, file, over_contexts)
        if as_chat and isinstance(text, bytes):
            raise DataError("the prompt ends inside a character; a message to a chat model is a whole text")
    with waiting("starting"):
        from ..engine.sampling import SamplingParams

        params = SamplingParams(**sampling, logprobs=logprobs, continuation=continuation)
    longest = given_max_length(model, max_length)
    rope = chosen_rope(model, rope)
    settings = {**loading, "rope": rope, "max_length": longest, "special_tokens": special_tokens}

    def load() -> Model:
        loaded = load_model(model, **settings)
        if as_chat:
            refuse_without_template(loaded, "leave out --chat")
        return loaded

    if prompts is not None and answers is not None:
        chat = Chat(system=system) if as_chat else None
        known = {"model": model, "rope": rope, "special_tokens": special_tokens}
        answer_all(prompts, answers, known, chat, params, load)
        return
    if not (over_contexts or special_tokens):
        _refuse_too_long(model, text, params, rope, longest)
    loaded = load()
    warn_of_unused_seed(loaded, params)

    from ..engine.chat_template import chat_ids, has_chat_template

    if over_contexts:
        from ..scaling.lengths import parse_length

        assert isinstance(text, str)
        size = None if window is None else parse_length(window, loaded.trained_length)
        answer_over_files(loaded, text, files, size, pooling, params, as_json)
    elif as_chat:
        assert isinstance(text, str)
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        continue_text(loaded, chat_ids(messages, loaded.tokenizer, loaded.vocabulary), params, as_json)
    else:
        if isinstance(text, str) and text.rstrip().endswith(_QUESTION_MARKS) and has_chat_template(loaded.tokenizer):
            click.echo(
                "ropewalk: this is a chat model, and PROMPT a question without its template; try --chat", err=True
            )
        continue_text(loaded, text, params, as_json)


def _check_usage(
    prompt: str | None,
    files: tuple[str, ...],
    file: Path | None,
    over_contexts: bool,
    window: str | None,
    prompts: Path | None,
    answers: Path | None,
) -> None:
    """Refuse what does not go together.

    Raises:
        click.UsageError: with the next step.
    """
    sources = [name for name, given in (("PROMPT", prompt), ("--file", file), ("--input", prompts)) if given]
    if len(sources) > 1:
        raise click.UsageError(f"{' and '.join(sources)} each give the prompt; leave out one of them")
    if not sources and prompt is None:
        raise click.UsageError("there is no prompt; give PROMPT, - for standard input, --file or --input")
    if (prompts is None) != (answers is None):
        given, missing = ("--input", "--output") if answers is None else ("--output", "--input")
        raise click.UsageError(f"{given} needs {missing}, a .jsonl file each")
    if prompts and answers and answers.exists() and answers.samefile(prompts):
        raise click.UsageError(f"--input and --output are both {prompts}; name another --output")
    if over_contexts and prompts:
        raise click.UsageError("--contexts takes one question; leave out --input")
    if over_contexts != bool(files):
        raise click.UsageError(
            "--contexts needs the files to ask: --contexts a.txt b.txt"
            if over_contexts
            else f"{files[0]} is a second prompt; put prompts of several words in quotes, and files after --contexts"
        )
    if (window is not None or is_given("pooling")) and not over_contexts:
        option = "--pooling" if window is None else "--window"
        raise click.UsageError(f"{option} is for the files of --contexts, and there are none; leave it out")


def _read_prompt(prompt: str | None, file: Path | None, over_contexts: bool) -> str | bytes:
    """The text of the prompt.

    Returns:
        Bytes where a file or standard input ends inside a character.

    Raises:
        DataError: there is none, it is not UTF-8, or it is the name of a file.
    """
    if prompt is not None and prompt != "-":
        if _is_file(prompt):
            raise DataError(
                f"the prompt {prompt} is the name of a file; add --file {prompt} in its place to continue the file's "
                "text, or pipe the name in (- as PROMPT) to continue the name"
            )
        return prompt
    with waiting("reading the prompt"):
        from ..engine.texts import read_prompt

    name = "standard input" if file is None else str(file)
    text = read_prompt(sys.stdin.buffer.read() if file is None else file.read_bytes(), name)
    if not text:
        way = "pipe a text into it, or give the prompt itself in the place of -" if file is None else "give another one"
        raise DataError(f"{name} is empty; {way}")
    if over_contexts and isinstance(text, bytes):
        raise DataError(f"{name} ends inside a character; a question over --contexts is a whole text")
    return text


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except OSError:  # longer than a name can be
        return False


def _refuse_too_long(model: str, text: str | bytes, params: SamplingParams, rope: str, limit: int | None) -> None:
    """Refuse a prompt that the scaler does not reach before any weight is read.

    Raises:
        ContextOverflow: as `Model.generate` does.
    """
    fetch_model(model)
    with waiting(f"reading the config of {Path(model).name}"):
        from ..engine.checkpoints.checkpoint import read_tokenizer
        from ..engine.checkpoints.config import find_config, primary_rope
        from ..engine.rope_plan import RopePlan
        from ..scaling import Auto, parse
        from ..tokenizer_tools.vocabularies import vocabulary

        source, config = find_config(model)
    configured = primary_rope(config)
    scaler = parse(rope, configured.max_length)
    reach = float("inf") if isinstance(scaler, Auto) else configured.reach(scaler)
    plan = RopePlan(rope=scaler, reach=reach, given_max_length=limit)
    whole = text if isinstance(text, str) else text.decode(errors="ignore")
    if len(whole.encode()) + params.max_new_tokens <= plan.max_length:
        return  # a token is a byte at least
    with waiting("counting the tokens of the prompt"):
        tokens = len(vocabulary(read_tokenizer(source)).encode(whole))
    plan.check(tokens, params, model)

"""`ropewalk chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import itertools
import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import RopewalkError
from .help_page import EXAMPLES, command
from .messages import shell_message, warn_of_unused_seed
from .options import (
    chosen_rope,
    given_max_length,
    loads_a_model,
    refuse_tensor_parallel,
    refuse_without_template,
    rope_option,
    sampling_options,
)
from .waiting import load_model, waiting

if TYPE_CHECKING:
    from ..engine.chat_session import ChatSession
    from ..engine.model import Model
    from ..engine.sampling import SamplingParams

_HELP = """\
/reset          begin again; the system message stays
/rope SPEC      go on under another scaler, such as yarn:4 or auto; the cache is rotated in place
/file PATH      send the text of a file as your message
/save PATH      store the conversation with its cache
/load PATH      go on from a stored one
/info           the model, its scaler, and how much is read
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer; what was written of it stays.
"""


@command(
    epilog=EXAMPLES + "  ropewalk chat smollm2-135m\n"
    '  ropewalk chat ./my-model --rope rerope:0.5x --system "You answer in one sentence."\n'
    "  echo 'What is the capital of France?' | ropewalk chat smollm2-135m --temperature 0"
)
@click.argument("model")
@rope_option(default="auto")
@click.option("--system", help="System message, which tells the model how to answer.")
@click.option("--load", "stored", type=click.Path(exists=True, dir_okay=False), help="Go on from a file of /save.")
@sampling_options
@loads_a_model
@click.option("--max-length", help="Go past the scaler's reach, up to this length.")
def chat(
    model: str,
    rope: str,
    system: str | None,
    stored: str | None,
    sampling: dict[str, Any],
    loading: dict[str, Any],
    max_length: str | None,
) -> None:
    """Talk to MODEL, which has to be a chat model.

    A line is a message, /help lists the commands. The conversation stays in the cache: only what is new is read, also
    after /rope. From a pipe, every line is a message, the answers are all that is printed, and a mistake ends the
    chat.
    """
    refuse_tensor_parallel(loading, "a conversation")
    if stored and system is not None:
        raise click.UsageError("the file of --load has its own system message; leave out --system")
    with waiting("starting"):
        from ..engine.sampling import SamplingParams

        params = SamplingParams(**sampling)
    longest = given_max_length(model, max_length)
    loaded = load_model(model, rope=chosen_rope(model, rope), **loading, max_length=longest)
    refuse_without_template(loaded, "to continue a text, use ropewalk generate")
    warn_of_unused_seed(loaded, params)
    with loaded.chat_session(system, path=stored) as session:
        _Terminal(loaded, session, params).run()


class _Terminal:
    """Reads lines and prints answers."""

    def __init__(self, model: Model, session: ChatSession, params: SamplingParams) -> None:
        self._model, self._session, self._params = model, session, params
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # the line editor of `input`
            click.echo(f"{self._model.describe()}\n/help lists the commands, Ctrl-D leaves.", err=True)
        while True:
            try:
                line = input("> " if self._interactive else "")
                if line.strip() in ("/exit", "/quit"):
                    return
                if line.strip():
                    self._respond(line)
            except EOFError:
                break
            except KeyboardInterrupt:  # at the prompt, or before an answer begins
                if not self._interactive:
                    raise
                click.echo(err=True)
        if self._interactive:
            click.echo()

    def _respond(self, line: str) -> None:
        try:
            self._obey(line) if line.startswith("/") else self._answer(line)
        except RopewalkError as error:
            if not self._interactive:
                raise
            click.echo(f"ropewalk: {shell_message(error.args, click.get_current_context().command)}", err=True)

    def _answer(self, text: str) -> None:
        pieces = self._session.stream(text, self._params, progress=lambda _, count: advance(count))
        try:
            with waiting("reading", self._session.unread) as advance:
                first = next(pieces, "")
            for piece in itertools.chain([first], pieces):
                click.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
            if not self._interactive:
                raise
        finally:
            click.echo()

    def _obey(self, line: str) -> None:
        from ..engine.texts import read_prompt
        from ..errors import ConfigError, DataError, did_you_mean

        command, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        session = self._session
        if command in ("/rope", "/save", "/load", "/file") and not argument:
            raise ConfigError(f"{command} needs {'a scaler' if command == '/rope' else 'a path'}")
        if command == "/reset":
            session.reset()
        elif command == "/rope":
            self._model.rope = argument
            click.echo(f"rope {self._model.rope}", err=True)
        elif command == "/save":
            session.save(argument)
            click.echo(f"stored in {argument}", err=True)
        elif command == "/load":
            session.load(argument)
            click.echo(f"{len(session.messages)} messages, {session.tokens:,} tokens read", err=True)
        elif command == "/file":
            try:
                with open(argument, "rb") as file:  # noqa: PTH123
                    text = read_prompt(file.read(), argument)
            except OSError as error:
                raise DataError(f"{argument} cannot be read: {error.strerror or error}") from error
            if isinstance(text, bytes):
                raise DataError(f"{argument} ends inside a character; give a whole text")
            self._answer(text)
        elif command == "/info":
            click.echo(f"{self._model.describe()}\nread     {session.tokens:,} tokens", err=True)
        elif command == "/help":
            click.echo(_HELP, nl=False, err=True)
        else:
            known = ["/reset", "/rope", "/file", "/save", "/load", "/info", "/help", "/exit"]
            hint = f"{did_you_mean(command, known)} A message may begin with a space."
            raise ConfigError(f"no command {command}.{hint}")

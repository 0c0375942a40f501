"""What the shell says: errors and warnings with settings as options, results as JSON, and that it is stopping."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from ..errors import RopewalkWarning, Setting

if TYPE_CHECKING:
    from ..engine.model import Model
    from ..engine.sampling import SamplingParams


def shell_message(parts: Iterable[object], command: click.Command) -> str:
    """The message of an error with its settings as options: `add --max-length 9000`, not `load with max_length=9000`.

    Settings that `command` has no option for stay as Python has them.
    """
    options = {name: option for option in command.params if isinstance(option, click.Option) for name in option.opts}

    def shown(part: object) -> str:
        option = options.get(f"--{part.name.replace('_', '-')}") if isinstance(part, Setting) else None
        return str(part) if option is None or not isinstance(part, Setting) else _as_option(part, option)

    return "".join(map(shown, parts))


def _as_option(setting: Setting, option: click.Option) -> str:
    if setting.form == "name":
        return option.opts[0]
    if option.is_flag:
        text = (option.opts if setting.value else option.secondary_opts)[0]
    else:
        text = f"{option.opts[0]} {setting.value}"
    return f"add {text}" if setting.form in ("load", "model") else text


def warn_of_unused_seed(model: Model, params: SamplingParams) -> None:
    """Say it where a seed changes nothing, because the model's default is the likeliest token."""
    if params.seed is not None and model.resolved(params).temperature == 0:
        click.echo(f"ropewalk: {model.name} takes the likeliest token; for --seed, add --temperature 1", err=True)


def print_json(value: object) -> None:
    """One line of JSON on standard output; from the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        text = json.dumps(value, ensure_ascii=False, default=str)
        click.echo(text.encode(errors="backslashreplace").decode())  # half of a surrogate pair, as JSON escapes it


def warning_line(message: Warning | str) -> str:
    """A warning as one line of standard error."""
    context = click.get_current_context(silent=True)
    if isinstance(message, RopewalkWarning) and context is not None:
        return f"ropewalk: {shell_message(message.args, context.command)}\n"
    return f"ropewalk: {message}\n"


@contextlib.contextmanager
def stopping_said() -> Iterator[None]:
    """Say "stopping" on standard error as soon as Ctrl-C is pressed.

    Python raises KeyboardInterrupt only between two of its own instructions, and a kernel may run for seconds. The
    signal wakes a thread, which runs while the kernel does.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watching = threading.Thread(target=_watch, args=(reading,), daemon=True)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        watching.join()
        os.close(reading)


def _watch(reading: int) -> None:
    while numbers := os.read(reading, 1):
        if numbers[0] == signal.SIGINT:
            os.write(2, b"\nropewalk: stopping\n")  # at once: sys.stderr may be locked by what is interrupted
            return

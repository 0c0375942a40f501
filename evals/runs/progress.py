"""What a person sees while cells are measured: one bar of time."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text


class RunProgress:
    """A bar of time: from the start to when all is done, or to the time limit if that comes first.

    Args:
        console: where it is drawn, if it is a terminal or a notebook. Elsewhere the lines are printed, and every five
            minutes one that says what is being done and how long all will take.
        deadline: `time.monotonic()` value of the limit, which is shown; None for no limit.
        started: where the time begins; None is now.
    """

    def __init__(self, console: Console, deadline: float | None = None, started: float | None = None) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), _TimeBar(bar_width=28), _Clock())
        self._is_file = not (console.is_terminal or console.is_jupyter)  # the bar's last frame would stay in it
        self._progress = Progress(*columns, console=console, get_time=time.monotonic, disable=self._is_file)
        self._started = self._said = time.monotonic() if started is None else started
        self._deadline = deadline
        self._stage, self._is_quiet = "", False
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        fields: dict[str, Any] = {"started": self._started, "limit": self._deadline, "end": None, "stage": ""}
        self._task = self._progress.add_task("", total=None, **fields)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin_stage(self, name: str, *, is_quiet: bool = False) -> None:
        """One of several parts of a search: what is expected from now on is its end, and the bar goes to the limit.

        Args:
            is_quiet: print no lines.
        """
        self._stage, self._is_quiet = name, is_quiet
        self._update(stage=name)

    def describe(self, what: str) -> None:
        """Show `what` is being done."""
        self._update(description=f"{self._stage}: {what}" if self._stage else what)

    def expect(self, end: float | None) -> None:
        """Show that all will be done at `end`, a `time.monotonic()` value; None is unknown."""
        if self._deadline is not None:
            end = self._deadline if end is None else min(end, self._deadline)
        self._update(end=end)
        if self._is_file and end is not None and time.monotonic() - self._said >= _SAID_EVERY:
            self._say_end()

    def print(self, line: str) -> None:
        """A line above the bar, which stays."""
        if not self._is_quiet:
            self._progress.console.print(line)

    def _say_end(self) -> None:
        """The bar as a line."""
        self._said = time.monotonic()
        (task,) = self._progress.tasks
        self.print(f"  {task.description}: {_Clock().render(task)}")

    def _update(self, **fields: Any) -> None:
        assert self._task is not None, "the bar is used as a context manager"
        self._progress.update(self._task, **fields)


_SAID_EVERY = 300.0
"""Seconds between the lines that replace the bar in a file."""


class _TimeBar(BarColumn):
    def render(self, task: Task) -> ProgressBar:
        started, end = task.fields["started"], task.fields["limit" if task.fields["stage"] else "end"]
        return ProgressBar(
            total=None if end is None else max(end - started, 1e-3),
            completed=time.monotonic() - started,
            width=self.bar_width,
            pulse=end is None,
            animation_time=task.get_time(),
        )


class _Clock(ProgressColumn):
    """`0:01:12 of at most 0:05:00, 0:02:10 left`."""

    def render(self, task: Task) -> Text:
        now, started, limit, end = time.monotonic(), *(task.fields[name] for name in ("started", "limit", "end"))
        text = _clock(now - started)
        if limit is not None:
            text += f" of at most {_clock(limit - started)}"
        if end is not None:
            text += f", {_clock(end - now)} left" + (" in this round" if task.fields["stage"] else "")
        return Text(text)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))

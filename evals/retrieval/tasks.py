"""The retrieval tasks by name, and the suites that the commands run."""

from __future__ import annotations

from ...errors import ConfigError
from ...plugins import Plugins
from .lookup_tasks import KeyValue, Needles, Niah, Passkey, VariableTracking
from .task import Task
from .word_tasks import CommonWords, FrequentWords

RULER = "ruler-11-offline"
"""RULER without its two question answering tasks, which need downloads, and with another text as
its haystack."""

_ALL: tuple[tuple[str, Task], ...] = (
    ("passkey", Passkey()),
    ("niah", Niah()),
    ("kv", KeyValue()),
    (RULER, Needles(name="niah_single_1", hay="noise")),
    (RULER, Needles(name="niah_single_2")),
    (RULER, Needles(name="niah_single_3", value="uuids")),
    (RULER, Needles(name="niah_multikey_1", keys=4)),
    (RULER, Needles(name="niah_multikey_2", hay="needles")),
    (RULER, Needles(name="niah_multikey_3", hay="needles", key="uuids", value="uuids")),
    (RULER, Needles(name="niah_multivalue", values=4)),
    (RULER, Needles(name="niah_multiquery", keys=4, queries=4)),
    (RULER, VariableTracking()),
    (RULER, CommonWords()),
    (RULER, FrequentWords()),
)


def _as_task(name: str, value: object) -> Task:
    """A task of the class that an entry point of the group `ropewalk.tasks` leads to.

    Raises:
        ConfigError: it is no such class.
    """
    if not (isinstance(value, type) and issubclass(value, Task)):
        raise ConfigError(f"{value!r} is not a subclass of ropewalk.evals.Task")
    task = value()
    if task.name != name:
        raise ConfigError(f"{value.__name__}.name is {task.name!r}; it must be the entry point's")
    return task


class _SuiteOf(dict[str, str]):
    def __missing__(self, task: str) -> str:  # one of another package is a suite of its own
        return task


class _Suites(dict[str, tuple[str, ...]]):
    def __missing__(self, suite: str) -> tuple[str, ...]:
        return (suite,)


TASKS = Plugins({task.name: task for _, task in _ALL}, group="ropewalk.tasks", kind="task", check=_as_task)
"""Every task by name: ours, then those of other packages."""

SUITE_OF = _SuiteOf({task.name: suite for suite, task in _ALL})

SUITES = _Suites(
    {suite: tuple(name for name, own in SUITE_OF.items() if own == suite) for suite in dict.fromkeys(SUITE_OF.values())}
)
"""The names of the tasks of each suite, in the order of tables."""

"""The table of retrieval tasks, built-in and of plug-ins, and of the suites that the commands run."""

from __future__ import annotations

from ...errors import ConfigError
from ...plugins import Plugins
from .fact_tasks import FactsNoise, NeedleMeaning
from .list_tasks import LatentList
from .lookup_tasks import KeyValue, Needles, Niah, Passkey, VariableTracking
from .pattern_tasks import ManyShot, NgramCopy
from .task import Task
from .word_tasks import CommonWords, FrequentWords

RULER = "ruler-11-offline"
"""RULER without its two question answering tasks, which need downloads, and with another text as
haystack."""

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
    ("many-shot", ManyShot()),
    ("ngram-copy", NgramCopy()),
    ("latent-list", LatentList()),
    ("facts-noise-1", FactsNoise(name="facts-noise-1", needed=1)),
    ("facts-noise-2", FactsNoise(name="facts-noise-2", needed=2)),
    ("facts-noise-3", FactsNoise(name="facts-noise-3", needed=3)),
    ("needle-meaning", NeedleMeaning()),
)


def _as_task(name: str, value: object) -> Task:
    """The task of the class that an entry point of the group `ropewalk.tasks` names.

    Raises:
        ConfigError: the entry point names something else, or the class has another task name.
    """
    if not (isinstance(value, type) and issubclass(value, Task)):
        raise ConfigError(f"{value!r} is not a subclass of ropewalk.evals.Task")
    task = value()
    if task.name != name:
        raise ConfigError(f"{value.__name__}.name is {task.name!r}; it must be the entry point's name, {name!r}")
    return task


class _SuiteOf(dict[str, str]):
    def __missing__(self, task: str) -> str:  # a task of a plug-in is a suite by itself
        return task


class _Suites(dict[str, tuple[str, ...]]):
    def __missing__(self, suite: str) -> tuple[str, ...]:
        return (suite,)


TASKS = Plugins({task.name: task for _, task in _ALL}, group="ropewalk.tasks", kind="task", check=_as_task)
"""Every task by name: the built-in ones, then those of plug-ins."""

SUITE_OF = _SuiteOf({task.name: suite for suite, task in _ALL})

SUITES = _Suites(
    {
        suite: tuple(name for name, its_suite in SUITE_OF.items() if its_suite == suite)
        for suite in dict.fromkeys(SUITE_OF.values())
    }
)
"""The names of the tasks of each suite, in the order of tables."""

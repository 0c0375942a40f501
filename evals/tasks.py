"""The retrieval tasks by name, and the suites that the commands run."""

from __future__ import annotations

from .key_value import KeyValue
from .needles import Needles, Niah
from .passkey import Passkey
from .task import Task
from .variable_tracking import VariableTracking
from .words import CommonWords, FrequentWords

RULER = "ruler-11-offline"
"""RULER without its two question answering tasks, which need downloads, and with another text as its haystack."""

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

TASKS: dict[str, Task] = {task.name: task for _, task in _ALL}

SUITE_OF: dict[str, str] = {task.name: suite for suite, task in _ALL}

SUITES: dict[str, tuple[str, ...]] = {
    suite: tuple(name for name, own in SUITE_OF.items() if own == suite) for suite in dict.fromkeys(SUITE_OF.values())
}
"""The names of the tasks of each suite, in the order of tables."""

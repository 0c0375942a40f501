"""What a parser under test is, and what parsers share."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import ropewalk as rw

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
WORK = Path(tempfile.mkdtemp(prefix="ropewalk-fuzz-"))
atexit.register(shutil.rmtree, WORK, ignore_errors=True)


@dataclass(frozen=True)
class Parser:
    """A parser under test.

    Attributes:
        inputs: a strategy.
        read: reads one of them; raises RopewalkError where it refuses.
        share: how many of 1000 inputs are for it.
    """

    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any], object]
    share: int


def stored(name: str, value: bytes) -> Path:
    """A file of this name that holds the value."""
    path = WORK / name
    path.unlink(missing_ok=True)  # what has mapped the last one keeps it
    path.write_bytes(value)
    return path


@functools.cache
def tiny_model(*, compiled: bool) -> Any:
    torch.set_num_threads(1)
    return rw.load(TINY, max_length=4096, compile=compiled)

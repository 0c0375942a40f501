"""Ropewalk against other engines, from their names to what was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...engine.checkpoints.checkpoint import read_config, read_tokenizer
from ...scaling import hf as hf_config
from ...scaling.lengths import parse_length
from ..data import load_text, tokenize_documents
from ..runs.result import environment
from .bandwidth import Memory, Traffic
from .contest import Outcome, compete
from .entrants import entrants, model_folder, parse_against
from .worker import ProcessWorker

TEXT = "pydoc"  # comes with Python, and is longer than any usual context


def measure(
    model: str,
    against: str,
    *,
    lengths: Sequence[str],
    repeats: int,
    prefill_repeats: int,
    new_tokens: int,
    dtype: str,
    threads: int | None,
    console: Console,
) -> tuple[Outcome, dict[str, Any]]:
    """Time ropewalk and the peers on one text.

    Args:
        model: as `load` takes it.
        against: the peers, as `--against` takes them.
        lengths: contexts, as `parse_length` takes them.
        new_tokens: decoded in every turn.
        threads: of every engine; None: torch's own number.

    Returns:
        What was found, and the machine, settings and versions, as JSON can hold them.

    Raises:
        RopewalkError: a peer is unknown or not installed, or an engine cannot run the model.
    """
    asked = parse_against(against)
    folder = model_folder(model)
    config = read_config(str(folder))
    trained = next(iter(hf_config.read(config.get_text_config()).values())).max_length
    contexts = sorted({parse_length(length, trained) for length in lengths})
    if threads is not None:
        torch.set_num_threads(threads)
    entries = entrants(
        model, asked, dtype=dtype, context=contexts[-1], room=new_tokens, threads=torch.get_num_threads()
    )
    text = _text(folder, contexts[-1] + new_tokens)
    memory, traffic = Memory(entries[0].device), Traffic(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack, Progress(*columns, console=console, transient=True) as progress:
        opening = progress.add_task("", total=len(entries))
        workers = []
        for entry in entries:
            progress.update(opening, description=f"loading {entry.name}")
            workers.append(stack.enter_context(ProcessWorker(entry)))
            progress.advance(opening)
        progress.remove_task(opening)
        outcome = compete(
            workers,
            text,
            contexts,
            new_tokens=new_tokens,
            repeats=repeats,
            prefill_repeats=prefill_repeats,
            bandwidth=memory.bandwidth,
            step_bytes=traffic.step_bytes,
            progress=progress,
        )
        versions = {name: version for worker in reversed(workers) for name, version in worker.versions.items()}
    machine = environment()
    about = {
        "model": Path(model).name,
        "cpu": machine["cpu"],
        "device": machine["device"],
        "threads": torch.get_num_threads(),
        "new_tokens": new_tokens,
        "versions": {"python": machine["python"], **versions},
    }
    return outcome, about


def _text(folder: Path, needed: int) -> list[int]:
    """Token ids of a text; one that is too short begins anew."""
    tokenizer = read_tokenizer(folder)
    ids = tokenize_documents(load_text(TEXT), tokenizer, limit_tokens=needed)[0]
    return (ids * -(-needed // len(ids)))[:needed]

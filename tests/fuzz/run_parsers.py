"""What ropewalk itself has written: runs, sessions, tunings; and files of text."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st
from inputs import deep, header, json_mutants, mutants, parts, written
from parser import TINY, WORK, Parser, stored, tiny_model

import ropewalk as rw
from ropewalk.engine import tuned_scalers
from ropewalk.evals.data import load_text
from ropewalk.evals.reports.tables import loss_table
from ropewalk.evals.runs.result import Run, environment_of, open_run


@functools.cache
def _rows() -> list[bytes]:
    file = TINY.parent.parent.parent / "docs" / "results" / "tiny" / "results.jsonl"
    return file.read_bytes().splitlines()[:12]


def _runs() -> st.SearchStrategy[bytes]:
    rows = [json.loads(row) for row in _rows()]
    changed = st.lists(json_mutants(*rows).map(written), min_size=1, max_size=3)
    return changed.map(b"\n".join) | mutants(b"\n".join(_rows()[:3])) | st.binary(max_size=60) | st.sampled_from(deep())


def _run(value: bytes) -> None:
    folder = WORK / "run"
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_bytes(value)
    (folder / "env.json").write_bytes(value if len(value) % 2 else b"{}")
    run = open_run(folder)
    for row in run.rows:
        run.losses(row)
    loss_table([row for row in run.rows if row.get("task") == "ppl"])
    environment_of(run)


@functools.cache
def _array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(20, dtype=np.float32))
    return buffer.getvalue()


def _losses(value: bytes) -> None:
    folder = WORK / "losses-run"
    (folder / "losses").mkdir(parents=True, exist_ok=True)
    (folder / "losses" / "a.npy").write_bytes(value)
    losses = Run(folder).losses({"key": "a"})
    assert losses is None or losses.dtype == np.float32


def session_file(text: str = "import os\n") -> tuple[dict[str, Any], bytes]:
    """The header of a session that has read a text, and what follows it."""
    with tiny_model(compiled=True).session() as session:
        session.append(text)
        session.save(WORK / "session")
    return parts(WORK / "session")


def _sessions() -> st.SearchStrategy[bytes]:
    outer, rest = session_file()
    inner = json.loads(outer["__metadata__"]["session"])

    def with_inner(changed: Any) -> dict[str, Any]:
        return {**outer, "__metadata__": {**outer["__metadata__"], "session": json.dumps(changed)}}

    headers = json_mutants(inner).map(with_inner).map(header) | json_mutants(outer).map(header)
    whole = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).map(session_file)
    return (
        whole.map(lambda saved: header(saved[0]) + saved[1])
        | headers.map(lambda changed: changed + rest)
        | mutants(header(outer) + rest)
    )


def _session(value: bytes) -> None:
    session = tiny_model(compiled=True).session(stored("s", value))
    session.generate("x", rw.SamplingParams(max_new_tokens=1, temperature=0))


def _tunings() -> st.SearchStrategy[bytes]:
    entry = {
        "target": 512, "winner": "yarn:2", "simplest": "ntk:2", "servable": None, "loss": 2.5, "text": "kjv",
        "date": "2026-01-01", "ropewalk": "0.1.0",
    }  # fmt: skip
    whole = {"format": "ropewalk tuned 1", "model": "m", "tunings": [entry]}
    return json_mutants(whole).map(written) | mutants(written(whole)) | st.sampled_from(deep())


def _tuning(value: bytes) -> None:
    (WORK / "tuned").mkdir(exist_ok=True)
    (WORK / "tuned" / "m.json").write_bytes(value)
    with mock.patch.dict(os.environ, ROPEWALK_CACHE=str(WORK)):
        for tuning in tuned_scalers.read("m"):
            tuning.as_json()


def _text_file(value: bytes) -> None:
    load_text(stored("a.text", value))


def _text_records(value: bytes) -> None:
    load_text(stored("a.jsonl", value))


def _texts() -> st.SearchStrategy[bytes]:
    plain, records = "é ü\r\n中\ufeff a\0", b'{"text": "a\\ud83d\\ude00"}\n{"text": "b"}\n'
    whole = [
        plain.encode(),
        plain.encode("utf-16"),
        gzip.compress(records, mtime=0),
        records,
        b"PAR1\0PAR1",
        b"PK\x03\x04",
    ]
    return mutants(*whole) | st.binary(max_size=60) | st.sampled_from(deep())


RUNS: dict[str, Parser] = {
    "results.jsonl": Parser(_runs, _run, 60),
    "losses": Parser(lambda: mutants(_array()) | st.binary(max_size=100), _losses, 20),
    "session": Parser(_sessions, _session, 20),
    "tunings": Parser(_tunings, _tuning, 20),
    "text file": Parser(_texts, _text_file, 20),
    "text records": Parser(_texts, _text_records, 10),
}

"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch

# Small tensors: more threads cost more than they give, and `make test` runs a worker for every core.
torch.set_num_threads(1)

TINY = Path(__file__).parent / "data" / "tiny-llama"


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A real, if tiny, Llama as a Hugging Face folder: trained at 256 tokens on Python sources by
    `tests/train_tiny.py`. Read only."""
    return TINY


@pytest.fixture(scope="session")
def held_out_texts() -> list[str]:
    """Python sources that the tiny model was not trained on, one text per file of the running interpreter.

    The files differ a little between Python releases, and a few exist in one release only.
    """
    record = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    library = Path(sysconfig.get_path("stdlib"))
    files = (library / name for name in record["held_out_files"])
    return [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]

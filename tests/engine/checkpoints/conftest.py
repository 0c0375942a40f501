"""Fixtures for the tests of checkpoints."""

import shutil

import pytest
from tiny_gguf import write_llama


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def write(tmp_path):
    """A function that writes a tiny Llama to tiny.gguf, with the arguments of `write_llama`."""
    return lambda **options: write_llama(tmp_path / "tiny.gguf", **options)

"""Fixtures for the tests of exports."""

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def plain(tiny_folder):
    """The tiny model of transformers, without a scaler."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")

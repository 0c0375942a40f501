"""Rows of results belong to one tokenizer."""

import json
import shutil

import pytest

import ropewalk as rw
from ropewalk.engine.hf_model import tokenizer_fingerprint
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.runs.cell import shared_recipe
from ropewalk.evals.runs.result import recipe_key


@pytest.fixture
def other_tokenizer(tiny_folder, tmp_path):
    """The same weights in a folder whose tokenizer does not make the same tokens."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_folder, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    return folder


def test_a_row_is_not_taken_for_another_tokenizer(tiny_folder, other_tokenizer):
    first, other, again = (
        recipe_key(shared_recipe(LocalModel(rw.load(folder, compile=False)), None) | {"model": "one path"})
        for folder in (tiny_folder, other_tokenizer, tiny_folder)
    )
    assert first == again != other


def test_padding_and_truncation_of_a_call_do_not_count(tiny_folder):
    tokenizer = rw.load(tiny_folder, compile=False).tokenizer
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer_fingerprint(tokenizer) != before

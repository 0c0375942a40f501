"""A model's config, read without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from families import FAMILIES

from ropewalk.engine.checkpoints.config import find_config, primary_rope
from ropewalk.engine.rotary_site import primary_rotary, rotary_sites
from ropewalk.errors import AssetError, UnsupportedModel


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "phi3", "gpt_neox"])
def test_the_config_has_the_rotary_embedding_of_the_model(name: str) -> None:
    model = FAMILIES[name]()
    assert primary_rope(model.config) == primary_rotary(rotary_sites(model)).configured


def test_no_weights_are_needed(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    source, config = find_config(str(tmp_path))
    assert source == str(tmp_path)
    assert primary_rope(config).max_length == 256


def test_folders_and_configs_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no config\.json"):
        find_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="no rotary"):
        primary_rope(find_config(str(tmp_path))[1])

"""A GGUF file is read whole or refused: its tensors, its parts, its format."""

import numpy as np
import pytest
from tiny_gguf import HIDDEN, UNUSED

from ropewalk import AssetError, UnsupportedModel
from ropewalk.engine.checkpoints.gguf_conversion import convert_gguf
from ropewalk.engine.checkpoints.source import load_vocabulary


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    if "model" not in request.keywords:
        monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))


def test_a_missing_tensor_is_refused(write, tmp_path):
    with pytest.raises(UnsupportedModel, match=r"1 tensors of the model are not in the file.*up_proj"):
        convert_gguf(write(leave_out="blk.0.ffn_up"), tmp_path / "out")


@pytest.mark.parametrize(("name", "shape"), UNUSED)
def test_a_tensor_that_the_model_does_not_use_is_refused(write, tmp_path, name, shape):
    path = write(extra=lambda writer: writer.add_tensor(name, np.ones(shape, dtype=np.float32)))
    with pytest.raises(UnsupportedModel, match=rf"some are not used \({name}\)"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.weight.lora_a", (4, HIDDEN)),
        ("blk.0.attn_q.scale", (1,)),
        ("blk.0.attn_k.input_scale", (1,)),
    ],
)
def test_a_tensor_on_which_transformers_fails_is_named(write, tmp_path, name, shape):
    """transformers reorders the rows of query and key tensors, and numpy raised an error."""
    path = write(extra=lambda writer: writer.add_tensor(name, np.ones(shape, dtype=np.float32)))
    with pytest.raises(UnsupportedModel, match=rf"a llama model has no tensor '{name}' .*; merge the adapter, or"):
        convert_gguf(path, tmp_path / "out")


def test_a_tensor_of_another_shape_is_refused(write, tmp_path):
    def extra(writer):
        writer.add_tensor("blk.0.ffn_norm.weight", np.ones(HIDDEN + 1, dtype=np.float32))

    with pytest.raises(
        UnsupportedModel, match=r"post_attention_layernorm.* has the shape \[65\], and its fields say \[64\]"
    ):
        convert_gguf(write(extra=extra, leave_out="blk.0.ffn_norm"), tmp_path / "out")


def test_a_part_of_a_split_file_is_refused(write, tmp_path):
    def split(writer):
        writer.add_uint16("split.count", 3)
        writer.add_uint16("split.no", 1)
        writer.add_int32("split.tensors.count", 11)

    path = write(extra=split)
    for read in (lambda: convert_gguf(path, tmp_path / "out"), lambda: load_vocabulary(path)):
        with pytest.raises(UnsupportedModel, match=r"is part 2 of a GGUF file that was split in 3; join them"):
            read()
    with pytest.raises(UnsupportedModel, match=r"is a part of a GGUF file that was split in 2; join them"):
        convert_gguf(write(extra=lambda writer: writer.add_uint16("split.count", 2)), tmp_path / "out")
    assert convert_gguf(write(extra=lambda writer: writer.add_uint16("split.count", 1)), tmp_path / "out").is_dir()


def test_files_that_transformers_cannot_read(write, tmp_path):
    with pytest.raises(UnsupportedModel, match=r"transformers cannot read this GGUF file \(ValueError"):
        convert_gguf(write(arch="mpt"), tmp_path / "out")
    (tmp_path / "text.gguf").write_text("not a GGUF file, but long enough to hold a header\n" * 9)
    with pytest.raises(UnsupportedModel, match="not a readable GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(AssetError, match="no such file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")

"""Accuracy on repeated and fresh text: counted as transformers' own logits count it."""

import json

import pytest
import torch
from click.testing import CliRunner
from repetition import accuracy, main, run, windows

import ropewalk as rw
from ropewalk.evals.data import load_text
from ropewalk.scaling import parse


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, held_out_texts):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(held_out_texts))
    return file


def test_windows_are_disjoint_and_whole():
    assert windows([[1, 2, 3], [4, 5], [6, 7]], 3, 5) == [[1, 2, 3], [4, 5, 6]]
    assert windows([[1, 2, 3, 4]], 2, 1) == [[1, 2]]


def test_accuracy_is_that_of_transformers_logits(tiny_folder, held_out_texts):
    model = rw.load(tiny_folder)
    texts = [model.tokenizer(held_out_texts[n]).input_ids[:200] for n in (2, 3)]
    with torch.inference_mode(), rw.patch(model.hf, "yarn:4"):
        logits = [model.hf(torch.tensor([ids]), use_cache=False).logits[0, :-1] for ids in texts]
    right = [row.argmax(-1) == torch.tensor(ids[1:]) for row, ids in zip(logits, texts, strict=True)]
    model.rope = "yarn:4"
    found = accuracy(model, texts)
    assert found.mean == pytest.approx(torch.cat(right).float().mean().item(), abs=1e-6)
    assert found.low < found.mean < found.high


def test_the_untouched_model_falls_apart_and_rerope_gains_from_repetition(tiny_folder, text_file):
    model = rw.load(tiny_folder, rope="ntk:2", max_length=4096)
    scalers = [parse(spec) for spec in ("none", "rerope:128|logn")]
    plain, map_ = run(model, load_text(text_file), scalers, times=4, samples=3)
    assert str(model.rope) == "ntk:2"
    assert map_.within.mean == pytest.approx(plain.within.mean, abs=0.03)
    assert plain.fresh.mean < 0.8 * plain.within.mean
    assert map_.repeated.mean > 1.2 * plain.repeated.mean


def test_the_command_prints_a_table_and_a_line_of_json(tiny_folder, text_file):
    options = [
        "--text",
        str(text_file),
        "--times",
        "2",
        "--samples",
        "1",
        "--rope",
        "none",
        "--rope",
        "rerope:0.5x|logn",
    ]
    done = CliRunner().invoke(main, [str(tiny_folder), *options])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "| method | 256 tokens | 512, repeated | 512, fresh |"
    assert [one["rope"] for one in json.loads(lines[-1])] == ["none", "rerope:128|logn"]

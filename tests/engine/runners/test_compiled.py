"""Every described family by the compiled kernels, in any chunks, compared with the logits of transformers."""

import itertools

import pytest
import torch
from decoders import DECODERS, IDS, ROWS, WINDOW, compiled, difference, in_chunks, read
from families import build

from ropewalk.engine.kv_cache import Int8Layer, KVLayer
from ropewalk.engine.runners.cpu.kernels import HAS_BFLOAT16_PRODUCTS
from ropewalk.engine.runners.cpu.kernels.attention import PART
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS
from ropewalk.engine.runners.family import FAMILIES
from ropewalk.errors import UnsupportedModel

pytestmark = [
    pytest.mark.usefixtures("freed_memory_is_overwritten"),
    pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning"),
]
TOLERANCE = 2e-5  # of the largest logit; float32 leaves 1e-6 to 5e-6
CHUNKS = {
    "whole": [1000],
    "one by one": [1],
    "small": [5, MAX_STEP_TOKENS, 1],
    "large": [MAX_STEP_TOKENS + 1, 30],
    "mixed": [40, 3, 1, 17, 16],
}


@pytest.fixture(scope="module", params=DECODERS)
def served(request):
    hf = DECODERS[request.param]()
    return hf, compiled(hf), read(hf)


def test_every_described_family_is_here():
    assert {DECODERS[name]().config.model_type for name in DECODERS} == set(FAMILIES)


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_logits_are_those_of_transformers_in_any_chunks(served, sizes):
    _, runner, expected = served
    assert difference(in_chunks(runner, sizes), expected) < TOLERANCE


def test_only_the_last_logits_to_keep_are_returned(served):
    _, runner, expected = served
    for count in (MAX_STEP_TOKENS, 60):
        for logits_to_keep in (1, 3):
            logits = runner.forward(IDS[0, :count].tolist(), runner.new_cache(1), logits_to_keep)
            assert logits.shape == (logits_to_keep, expected.shape[1])
            assert difference(logits, expected[count - logits_to_keep : count]) < TOLERANCE


WINDOWS = (WINDOW, PART, 2 * PART + 7)


@pytest.mark.parametrize(("name", "window"), [("llama", None), *itertools.product(("mistral", "gemma2"), WINDOWS)])
def test_a_text_of_many_parts(name, window):
    """A part of attention has at most 256 keys. Longer texts and windows are joined from several parts."""
    model_type, fields = ROWS[name]
    hf = build(model_type, {**fields, "sliding_window": window} if window else fields)
    ids = torch.arange(700).mul(37).remainder(89)[None] + 1
    runner, expected = compiled(hf), read(hf, ids)
    assert (
        difference(in_chunks(runner, [250, 5, 1, 1, 200, MAX_STEP_TOKENS, 1], ids), expected) < 1e-4
    )  # angles in float32


@pytest.mark.parametrize("past", [60, 61])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"][: 1 + HAS_BFLOAT16_PRODUCTS])
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_chunk_reads_the_keys_in_its_windows_only(cache, precision, past, monkeypatch):
    runner = compiled(DECODERS["mistral"](), cache=cache, precision=precision)  # all its layers have windows
    expected = in_chunks(runner, [1000])[past:]
    held = runner.new_cache(200)
    in_chunks(runner, [past], IDS[:, :past], held)
    update, read_ = KVLayer.update if cache == "bfloat16" else Int8Layer.update, []

    def counted(*args):
        keys, values = update(*args)
        read_.append((keys.shape[2], values.shape[2]))
        return keys, values

    monkeypatch.setattr(KVLayer if cache == "bfloat16" else Int8Layer, "update", counted)
    found = in_chunks(runner, [1000], IDS[:, past:], held)
    assert set(read_) == {(len(IDS[0]) - (past - WINDOW + 1),) * 2}
    assert difference(found, expected) < 0.05


def test_a_large_vocabulary_is_widened_in_pieces(monkeypatch):
    hf = DECODERS["gemma2"]()
    runner = compiled(hf, weights="int8", cache="float32")
    expected = in_chunks(runner, [40])
    monkeypatch.setattr("ropewalk.engine.runners.cpu.chunk._HEAD_ROWS", 20)
    assert torch.equal(in_chunks(runner, [40]), expected)


def test_windows_are_seen_by_the_text():
    """The tests above would notice a model that ignored its windows."""
    hf = DECODERS["mistral"]()
    expected = read(hf)
    hf.config.sliding_window = WINDOW + 1
    assert difference(read(hf), expected) > 1e-2


def _edit_the_window(hf):
    hf.config.sliding_window = 60  # beyond the text that is compared


def _change_an_epsilon(hf):
    norm = hf.model.layers[1].post_attention_layernorm
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 1e-4)


@pytest.mark.parametrize("name", ["ministral", "qwen2", "qwen3", "smollm3-windows", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    ("change", "words"), [(_edit_the_window, "sliding window 24 and .* 60"), (_change_an_epsilon, "epsilon 0.0001")]
)
def test_modules_that_are_not_what_the_config_says_are_refused(name, change, words):
    hf = DECODERS[name]()
    change(hf)
    with pytest.raises(UnsupportedModel, match=words):
        compiled(hf)

"""`llamacpp` against the `perplexity` of llama.cpp, computed from llama.cpp's own logits on the same weights."""

import gc
import math

import numpy as np
import pytest
from byte_model import llama_cpp_nats

import ropewalk as rw
from ropewalk.engine.checkpoints.source import resolve
from ropewalk.engine.exports.gguf_write import write_gguf
from ropewalk.evals.data import Text, load_text

SOURCE = "\n".join(f"def area_{n}(side):\n    return side * {n} + side ** 2  # of shape {n}\n" for n in range(30))


def engine(llama_cpp, file, n_ctx):
    """llama.cpp, and its logits as a function of token ids."""
    llama = llama_cpp.Llama(str(file), n_ctx=n_ctx, n_batch=n_ctx, logits_all=True, n_threads=2, verbose=False)

    def logits_of(ids):
        llama.reset()
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])

    return llama, logits_of


def theirs(llama_cpp, file, text, n_ctx, chunks, wants_bos):
    """What `llama-perplexity -c n_ctx --chunks chunks` prints for a text."""
    llama, logits_of = engine(llama_cpp, file, n_ctx)
    adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(llama._model.vocab))
    assert adds_bos == wants_bos
    tokens = llama.tokenize(text.encode(), add_bos=True)
    total, count = llama_cpp_nats(logits_of, tokens[: chunks * n_ctx], n_ctx, llama.token_bos() if adds_bos else None)
    return math.exp(total / count), count


@pytest.mark.parametrize("adds_bos", [False, True])
def test_llamacpp_is_llama_cpp_on_a_tiny_model(tiny_folder, tmp_path, llama_cpp, adds_bos):
    model = rw.load(tiny_folder, dtype="float32", compile=False)
    if adds_bos:
        model.tokenizer.add_bos_token = True
    assert bool(model.tokenizer("").input_ids) == adds_bos
    file = write_gguf((model.hf, model.tokenizer), tmp_path / "tiny.gguf", "f32")
    expected, count = theirs(llama_cpp, file, SOURCE, 128, 4, adds_bos)
    text = Text(name="areas", documents=(SOURCE,), sha256="0" * 64)
    given = {"protocol": "llamacpp", "lengths": [128], "text_tokens": 4 * 128}
    (row,) = rw.evals.perplexity(model, text, **given)
    assert (row.tokens, row.documents) == (count, 4) == (4 * 63, 4)
    assert row.perplexity == pytest.approx(expected, rel=3e-4)


def test_llama_cpp_can_be_measured_by_any_protocol(tiny_folder, tmp_path, llama_cpp):
    model = rw.load(tiny_folder, dtype="float32", compile=False)
    file = write_gguf((model.hf, model.tokenizer), tmp_path / "tiny.gguf", "f32")
    _, logits_of = engine(llama_cpp, file, 256)
    text = Text(name="areas", documents=(SOURCE,), sha256="0" * 64)
    given = {"lengths": [128, 256], "target": 64}
    ours = rw.evals.perplexity(model, text, **given)
    others = rw.evals.perplexity(logits_of, text, tokenizer=model.tokenizer, **given)
    for one, other in zip(ours, others, strict=True):
        assert other.model == "logits_of"
        assert other.bits_per_byte == pytest.approx(one.bits_per_byte, rel=2e-3)
        np.testing.assert_allclose(other.losses, one.losses, atol=0.05)


@pytest.mark.model
@pytest.mark.slow
def test_llamacpp_is_llama_cpp_on_smollm2(tmp_path, llama_cpp):
    file = write_gguf(resolve("smollm2-135m"), tmp_path / "smollm2.gguf", "f32")
    play = load_text("shakespeare").documents[0][:8000]
    expected, count = theirs(llama_cpp, file, play, 256, 4, False)
    gc.collect()
    text = Text(name="a play", documents=(play,), sha256="0" * 64)
    model = rw.load("smollm2-135m", dtype="float32")
    (row,) = rw.evals.perplexity(model, text, protocol="llamacpp", lengths=[256], text_tokens=4 * 256)
    assert row.tokens == count == 4 * 127
    assert row.perplexity == pytest.approx(expected, rel=5e-3)

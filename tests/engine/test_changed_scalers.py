"""A model's scaler is changed, or changes with the length: what is read and written before and after."""

import pytest
import torch
from live import greedy
from transformers import AutoModelForCausalLM

import ropewalk as rw
from ropewalk.engine.patches import scaler_slot

pytestmark = pytest.mark.usefixtures("untouched")

TEXT = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    for name in sorted(names):\n" * 4


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def test_rope_can_be_changed_and_put_back(model):
    plain = model.score(TEXT).logprobs
    model.rope = "linear:2"
    assert str(model.rope) == "linear:2"
    assert model.max_length == 512
    assert not torch.equal(model.score(TEXT).logprobs, plain)
    model.rope = None
    assert model.max_length == 256
    assert torch.equal(model.score(TEXT).logprobs, plain)


def test_a_refused_scaler_leaves_the_old_one_in_place(model):
    model.rope = "linear:2"
    before = model.score(TEXT).logprobs
    with pytest.raises(rw.ConfigError, match="below the trained length 256"):
        model.rope = "critical-base:128"
    assert str(model.rope) == "linear:2"
    assert torch.equal(model.score(TEXT).logprobs, before)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_change_that_is_interrupted_leaves_the_old_scaler_in_place(model, monkeypatch, stop):
    model.rope = "rerope:64|logn"
    before = model.score(TEXT).logprobs
    install = scaler_slot.install

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(scaler_slot, "install", install)
        raise stop

    monkeypatch.setattr(scaler_slot, "install", interrupted)
    with pytest.raises(stop):
        model.rope = "yarn:4"
    assert str(model.rope) == "rerope:64|logn"
    assert torch.equal(model.score(TEXT).logprobs, before)


def test_a_map_that_does_not_fit_leaves_the_old_one_in_place(model):
    model.rope = "rerope:64|logn"
    before = model.score(TEXT).logprobs
    with pytest.raises(rw.ConfigError, match="rerope: window 256 must be below 256, the length"):
        model.rope = "rerope:256"
    assert str(model.rope) == "rerope:64|logn"
    assert torch.equal(model.score(TEXT).logprobs, before)


@pytest.mark.parametrize("spec", ["dynamic-ntk", "dynamic-ntk:2", "dynamic-yarn"])
def test_dynamic_scalers_see_the_length_of_their_own_request_only(model, spec):
    model.rope = spec
    short, long = "import os\n", TEXT * 4
    params = rw.SamplingParams(max_new_tokens=16, temperature=0)
    alone = {text: model.generate(text, params).token_ids for text in (short, long)}
    again = {text: model.generate(text, params).token_ids for text in (long, short)}
    assert alone == again
    # two streams in turn, with different lengths and so different frequencies
    streams = {text: model.stream(text, params) for text in (short, long)}
    pieces = dict.fromkeys(streams, "")
    for _ in range(20):
        for text, stream in streams.items():
            pieces[text] += next(stream, "")
    assert pieces == {text: model.generate(text, params).text for text in streams}


def test_a_stream_does_not_go_on_under_another_scaler(model):
    stream = model.stream(TEXT, rw.SamplingParams(max_new_tokens=8, temperature=0))
    next(stream)
    model.rope = "yarn:2"
    with pytest.raises(rw.PatchError, match="changed from none to yarn:2 while a text was being streamed"):
        list(stream)


def test_a_static_scaler_is_in_the_model_at_once(model, reference):
    model.rope = "linear:2"
    with rw.patch(reference, "linear:2"):
        assert torch.equal(model.hf.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)


def test_a_dynamic_scaler_is_the_static_one_at_the_requests_length(model):
    ids = model.tokenizer(TEXT * 8).input_ids[:512]
    params = rw.SamplingParams(max_new_tokens=12, temperature=0, logprobs=0)

    def both():
        written = model.generate_ids(ids[:500], params)  # 500 + 12 = 512 tokens: twice the trained length
        return model.score_ids(ids), torch.tensor([token.logprob for token in written.logprobs])

    model.rope = "dynamic-ntk"
    scored, written = both()
    model.rope = "ntk:2"
    assert torch.equal(both()[0], scored)
    assert torch.equal(both()[1], written)
    model.rope = "ntk:3"
    assert not torch.equal(both()[1], written)


@pytest.mark.parametrize(
    ("spec", "later", "words"),
    [
        ("auto", None, "written under none, and a text of 270 tokens is read under self-extend:8,window=128; give"),
        (
            "dynamic-ntk",
            None,
            "under dynamic-ntk for 251 tokens, and a text of 270 tokens .* under dynamic-ntk for 270",
        ),
        ("yarn:2", "none", "written under yarn:2, and a text of 270 tokens is read under none"),
    ],
)
@pytest.mark.parametrize("compile", ["auto", False])
def test_a_cache_written_under_other_positions_is_refused(tiny_folder, spec, later, words, compile):
    """The answer went on from it, 2 nats away from the right one, without a word."""
    model = rw.load(tiny_folder, rope=spec, max_length=1024, compile=compile)
    ids = [5 + i % 90 for i in range(251)]
    cache = model.new_cache(300)
    model.score_ids(ids, cache=cache)
    model.rope = later or spec
    with pytest.raises(rw.ConfigError, match=words):
        model.generate_ids(ids, greedy(19), cache)
    fresh = model.new_cache(300)
    written = model.generate_ids(ids, greedy(4), fresh).token_ids
    assert model.generate_ids(ids, greedy(4), fresh).token_ids == written
    with pytest.raises(rw.ConfigError, match="dynamic-ntk for 256 tokens, and a text of 263 tokens"):
        model.rope = "dynamic-ntk"
        model.generate_ids(ids, greedy(5), reused := model.new_cache(300))
        model.generate_ids(ids, greedy(12), reused)

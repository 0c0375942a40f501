"""A transformers model in memory becomes a model of ours: the same answers, and none after it was changed."""

import functools

import numpy as np
import pytest
import torch
from live import TEXT, greedy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import ropewalk as rw
from ropewalk.engine import scaled_model
from ropewalk.engine.batch import Batch, generate_tokens
from ropewalk.engine.sequence import Sequence
from ropewalk.evals.models.local import LocalModel


@pytest.fixture
def hf(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def from_files(tiny_folder):
    return rw.load(tiny_folder, compile=True)


def test_it_answers_as_the_model_from_files_and_shares_its_weights(hf, from_files, tiny_folder):
    model = rw.load(hf, max_length=4096)
    assert "reach    256 tokens; requests may have 4k (max_length)" in model.describe()
    assert model.is_compiled
    assert model.hf is hf
    assert model.name == str(tiny_folder)
    assert model.generate(TEXT, greedy(12)) == from_files.generate(TEXT, greedy(12))
    model.rope = "rerope:0.5x|logn"
    long = TEXT * 20
    other = rw.load(tiny_folder, "rerope:0.5x|logn", max_length=4096)
    assert model.generate(long, greedy(8)) == other.generate(long, greedy(8))


def test_a_length_in_the_spec_is_a_multiple_of_the_trained_one(hf):
    assert str(rw.load(hf, "rerope:0.5x").rope) == "rerope:128"


def test_a_tokenizer_may_be_given(hf, from_files, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    hf.config._name_or_path = hf.name_or_path = ""
    with pytest.raises(rw.ConfigError, match="give its tokenizer"):
        rw.load(hf)
    model = rw.load(hf, tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    assert model.name == "LlamaForCausalLM"
    assert model.generate(TEXT, greedy(6)) == from_files.generate(TEXT, greedy(6))
    hf.name_or_path = "/nowhere"
    with pytest.raises(rw.ConfigError, match="give the tokenizer"):
        rw.load(hf)


def update(hf):
    with torch.no_grad():
        hf.lm_head.weight += 1


def replace(hf):
    hf.model.norm.weight = torch.nn.Parameter(torch.ones_like(hf.model.norm.weight))


def add(hf):
    hf.model.layers[0].adapter = torch.nn.Linear(2, 2)


def give_other_data(hf):
    """As `torch.nn.utils.vector_to_parameters` does. The compiled kernels had some of the old weights, and scored
    11 nats away from either model."""
    hf.model.layers[1].mlp.up_proj.weight.data = hf.model.layers[1].mlp.up_proj.weight.data * 2


def write_to_data(hf):
    """As merging an adapter does. int8 kernels, and those of bfloat16 norms, went on with the old weights."""
    hf.model.norm.weight.data.mul_(2)


def cast(hf):
    hf.bfloat16()


@pytest.mark.parametrize("change", [update, replace, add, give_other_data, write_to_data, cast])
def test_a_changed_model_is_refused(hf, change):
    model = rw.load(hf)
    local, session = LocalModel(model), model.session()
    session.append(TEXT)
    plan, ids = model.plan_for("yarn:2"), model.vocabulary.encode(TEXT)
    model.generate(TEXT, greedy(2))
    change(hf)
    for call in (
        lambda: model.generate(TEXT, greedy(2)),
        lambda: model.stream(TEXT, greedy(2)),
        lambda: model.generate([TEXT, TEXT], greedy(2)),
        lambda: model.generate(TEXT, greedy(2), contexts=["x"]),
        lambda: model.generate_ids(ids, greedy(2)),
        lambda: model.check_length(9, greedy(2), plan=plan),
        lambda: session.append(TEXT),
        lambda: session.generate(TEXT, greedy(2)),
        lambda: model.score(TEXT),
        lambda: model.logprob(TEXT),
        lambda: model.next_byte_logprobs(TEXT),
        lambda: next(local.logits(ids, 1, lambda *_: None)),
        lambda: local.losses(ids, 1, lambda *_: None),
    ):
        with pytest.raises(rw.PatchError, match=r"load it again: rw\.load"):
            call()


@pytest.mark.parametrize("by", ["patch", "another model"])
def test_a_patch_from_outside_is_refused_where_the_modules_run(hf, by):
    """The model said "none" and read under yarn:4, 5 nats a token away."""
    model, compiled = rw.load(hf, compile=False), rw.load(hf, compile=True)
    other = rw.load(hf, compile=False)
    ids, ours = model.vocabulary.encode(TEXT), compiled.score(TEXT).logprobs
    stream = model.stream(TEXT, greedy(4))
    next(stream)
    if by == "patch":
        undo = rw.patch(hf, "yarn:4").undo
    else:
        other.rope = "yarn:4"
        undo = functools.partial(setattr, other, "rope", "none")
    for call in (
        lambda: list(stream),
        lambda: model.score(TEXT),
        lambda: model.generate_ids(ids, greedy(2)),
        lambda: setattr(model, "rope", "ntk:2"),
    ):
        with pytest.raises(rw.PatchError, match="the model underneath is patched with yarn:4; undo that first"):
            call()
    assert torch.equal(compiled.score(TEXT).logprobs, ours)
    undo()
    assert torch.allclose(model.score(TEXT).logprobs, ours, atol=1e-4)


@pytest.mark.parametrize("rope", [None, "yarn:2"])
def test_the_weights_are_not_compared_at_every_token(hf, monkeypatch, rope):
    model = rw.load(hf)
    scaler, looks = model.plan_for(rope or "none").rope, []
    monkeypatch.setattr(scaled_model.hf_model, "weights_state", lambda _: looks.append(None) or model.weights_at_load)
    counts = []
    for tokens in (2, 30):
        sequence = Sequence(model.read(TEXT, "auto"), model.resolved(greedy(tokens)), model.vocabulary, model.stop_ids)
        for _ in generate_tokens(Batch(model, [sequence], sequence.length, rope=rope and scaler)):
            pass
        assert len(sequence.tokens) == tokens
        counts.append(len(looks))
        looks.clear()
    assert counts[0] == counts[1] <= 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"dtype": "bfloat16"}, "model.to"), ({"device_map": "auto"}, "device_map"), ({"tp_plan": "auto"}, "tp_plan")],
)
def test_options_about_reading_weights_are_refused(hf, options, reason):
    with pytest.raises(rw.ConfigError, match=reason):
        rw.load(hf, **options)


def test_what_cannot_be_run_as_it_is_is_refused(hf):
    with pytest.raises(rw.ConfigError, match="not a transformers model"):
        rw.load(torch.nn.Linear(2, 2))
    with pytest.raises(rw.ConfigError, match=r"call model\.eval"):
        rw.load(LlamaForCausalLM(hf.config))
    with rw.patch(hf, "yarn:2"), pytest.raises(rw.PatchError, match="patched with yarn:2"):
        rw.load(hf)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}])
@pytest.mark.parametrize("continuation", ["exact", "off"])
def test_no_token_is_drawn_from_logits_that_are_not_finite(hf, settings, continuation, number):
    model = rw.load(hf, compile=False)
    with torch.no_grad():
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.clone())
        hf.lm_head.weight[7] = number
    model.weights_at_load = None
    for prompt in ("the qui", ["the qui", "a"]):
        with pytest.raises(rw.UnsupportedModel, match=r"logits of this LlamaForCausalLM are NaN or infinite"):
            model.generate(prompt, max_new_tokens=2, continuation=continuation, **settings)
    if continuation == "exact":
        with pytest.raises(rw.UnsupportedModel, match="NaN or infinite"):
            model.next_byte_logprobs("the qui")


@pytest.mark.parametrize("length", [0, -1, 1.5, "8k"])
def test_a_limit_that_is_no_number_of_tokens_is_refused(hf, length):
    with pytest.raises(rw.ConfigError, match=r"max_length .* must be a whole number of at least 1"):
        rw.load(hf, max_length=length)


def test_whole_numbers_of_numpy_are_settings(from_files):
    given, plain = ({"seed": kind(3), "max_new_tokens": kind(4), "top_k": kind(9)} for kind in (np.int64, int))
    answers = [from_files.generate(TEXT, temperature=1.0, **settings) for settings in (given, plain)]
    assert answers[0].token_ids == answers[1].token_ids

"""`rw.evals.perplexity` on ropewalk models, transformers models and functions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from byte_model import WORDS, byte_tokenizer, run_plan, text, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

import ropewalk as rw
from ropewalk.evals import HarmRow, LongPPLRow, PerplexityRow, RepeatRow, perplexity
from ropewalk.evals.protocols.by_name import PROTOCOLS, settings_of
from ropewalk.evals.protocols.fixed_target import FixedTarget
from ropewalk.evals.runs.result import Run


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def uniform(ids):
    return np.zeros((len(ids), 256), dtype=np.float32)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_uniform_function_takes_eight_bits_a_byte(monkeypatch, name):
    """Exactly log2 V bits a token, under every protocol. `harm` needs a model that can be scaled."""
    monkeypatch.setattr(
        "ropewalk.evals.protocols.longppl.key_tokens", lambda short, full: np.arange(len(full)) % 2 == 0
    )
    settings = {"target": 64, "stride": 32, "text_tokens": 512}
    given = {key: value for key, value in settings.items() if key in settings_of(name)}
    arguments = {"protocol": name, "lengths": [128, 256], "tokenizer": byte_tokenizer(), "trained_length": 128}
    if name == "harm":
        with pytest.raises(rw.ConfigError, match="cannot be compared with another scaler's; load it with ropewalk"):
            perplexity(uniform, text(WORDS), **(arguments | {"lengths": [128]}), **given)
        return
    rows = perplexity(uniform, text(WORDS), **arguments, **given)
    assert {row.context for row in rows} == {128, 256}
    for row in rows:
        assert row.bits_per_byte == pytest.approx(8, abs=1e-6)
        assert row.loss == pytest.approx(math.log(256), abs=1e-6)
        assert row.model == "uniform"


def test_models_and_functions_give_the_rows_of_a_run(tmp_path, model):
    run = run_plan(tmp_path, model, FixedTarget(contexts=(64, 128), target=32), WORDS)
    model.rope = None
    given = {"lengths": ["1x", 128], "target": 32}

    def logits(ids):
        with torch.inference_mode():
            return model.hf(torch.tensor([ids])).logits[0]

    for rows in (
        perplexity(model, text(WORDS), **given),
        perplexity(model.hf, text(WORDS), tokenizer=model.tokenizer, **given),
        perplexity(logits, text(WORDS), tokenizer=model.tokenizer, trained_length=64, **given),
        perplexity(lambda ids: logits(ids).numpy(), [model._encode(WORDS)], trained_length=64, **given),
    ):
        for row, stored in zip(rows, run.rows, strict=True):
            assert type(row) is PerplexityRow
            assert row.losses.dtype == np.float32
            np.testing.assert_allclose(row.losses, run.losses(stored), atol=1e-4)
            assert (row.context, row.tokens) == (stored["context"], 32)
            assert row.bits_per_byte is None or row.bits_per_byte == pytest.approx(stored["bits_per_byte"], abs=1e-4)
            with pytest.raises(dataclasses.FrozenInstanceError):
                row.loss = 0


def test_a_transformers_model_is_known_by_its_weights(model):
    recipes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "add", lambda run, recipe, measured, losses: recipes.append(recipe) or recipe | measured)
        patch.setattr(Run, "losses", lambda run, row: None)
        perplexity(model, text(WORDS), lengths=64, target=32)
        perplexity(model.hf, text(WORDS), lengths=64, target=32, tokenizer=model.tokenizer)
        perplexity(uniform, text(WORDS), lengths=64, target=32, tokenizer=model.tokenizer)
    native, plain, function = recipes
    assert native["weights"] == plain["weights"] == model.fingerprint[:16]
    assert "weights" not in function


def test_multiples_of_the_trained_length_in_scalers(monkeypatch, model):
    monkeypatch.setattr(
        "ropewalk.evals.protocols.longppl.key_tokens", lambda short, full: np.arange(len(full)) % 2 == 0
    )
    (row,) = perplexity(model, text(WORDS), lengths=64, target=32, ropes=["rerope:0.25x"])
    assert row.rope == "rerope:16"
    (row,) = perplexity(model, text(WORDS), protocol="longppl", lengths="2x", target=32, judge="rerope:0.5x")
    assert row.judge == "rerope:32 at 128"
    with pytest.raises(rw.ConfigError, match=r"'0\.5x' is a multiple of the trained length, which is not known here"):
        perplexity(uniform, [[1] * 300], protocol="longppl", lengths=128, judge="rerope:0.5x")


def test_scalers_in_turn_and_the_model_is_given_back(model):
    model.rope = "linear:3"
    (native,) = perplexity(model, text(WORDS), lengths=64, target=32)
    assert native.rope == "linear:3"
    rows = perplexity(model, text(WORDS), lengths="1x", target=32, ropes=["none", "linear:3", "rerope:16"])
    assert [row.rope for row in rows] == ["none", "linear:3", "rerope:16"]
    assert np.array_equal(rows[1].losses, native.losses)
    assert not np.array_equal(rows[0].losses, native.losses)
    for one in ("rerope:16", rw.parse("rerope:16")):
        (row,) = perplexity(model, text(WORDS), lengths="1x", target=32, ropes=one)
        assert np.array_equal(row.losses, rows[2].losses)
    assert str(model.rope) == "linear:3"
    with pytest.raises(rw.ConfigError, match="window"):
        perplexity(model, text(WORDS), lengths=64, target=32, ropes=["linear:2", "rerope:64"])
    assert str(model.rope) == "linear:3"
    model.rope = None
    hf = model.hf.train()
    before = {name: buffer.clone() for name, buffer in hf.named_buffers()}
    (row,) = perplexity(hf, text(WORDS), lengths=64, target=32, ropes=["linear:3"], tokenizer=model.tokenizer)
    np.testing.assert_allclose(row.losses, native.losses, atol=1e-5)
    assert hf.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in hf.named_buffers())
    hf.eval()


def test_a_model_that_is_refused_is_left_as_it_was(model):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64)).train()
    gpt2.transformer.h.eval()  # as where only some layers are trained
    with pytest.raises(rw.UnsupportedModel):
        perplexity(gpt2, [list(range(60))], tokenizer=model.tokenizer, lengths=[32])
    assert gpt2.training
    assert not any(module.training for module in gpt2.transformer.h.modules())


def test_rows_have_the_fields_of_their_protocol(model):
    (harm,) = perplexity(model, text(WORDS), protocol="harm", lengths=64, ropes=["linear:2"])
    assert type(harm) is HarmRow
    assert harm.kl > 0
    assert harm.difference == pytest.approx(harm.loss - harm.base_loss)
    assert harm.kl_low is None  # 63 tokens are too few for an interval
    (again,) = perplexity(model, text(WORDS), protocol="repeat", lengths=400, target=160)
    assert type(again) is RepeatRow
    assert again.gain == pytest.approx(again.fresh_loss - again.loss, abs=1e-6)
    assert again.gain_low < again.gain < again.gain_high
    first, second = perplexity(model, text(WORDS), protocol="by-position", lengths=400)
    assert (first.bucket_start, first.bucket_end, second.bucket_end) == (1, 256, 400)
    assert LongPPLRow.__dataclass_fields__.keys() >= {"judge", "candidates"}


def test_losses_that_are_not_finite_or_have_no_exponential():
    (lost,) = perplexity(lambda ids: np.full((len(ids), 8), np.nan, np.float32), [[1] * 64], lengths=64, target=8)
    assert math.isnan(lost.loss) and math.isnan(lost.perplexity) and np.isnan(lost.losses).all()
    far = np.array([2000, 0, 0, 0], np.float32)
    (large,) = perplexity(lambda ids: np.tile(far, (len(ids), 1)), [[1] * 64], lengths=64, target=8)
    assert (large.loss, large.perplexity) == (2000.0, math.inf)


def test_what_cannot_be_measured_is_refused(model):
    with pytest.raises(rw.ConfigError, match="needs its tokenizer too"):
        perplexity(model.hf, text(WORDS))
    with pytest.raises(rw.ConfigError, match="tokenizer has no effect on Model"):
        perplexity(model, text(WORDS), tokenizer=model.tokenizer)
    with pytest.raises(rw.ConfigError, match="ropes has no effect on a function from tokens to logits"):
        perplexity(uniform, text(WORDS), ropes=["none"])
    with pytest.raises(rw.ConfigError, match=r"'1x' is a multiple of the trained length, which is not known"):
        perplexity(uniform, [[1, 2, 3]])
    with pytest.raises(rw.ConfigError, match="the text words needs a tokenizer"):
        perplexity(uniform, text(WORDS), lengths=64)
    with pytest.raises(rw.ConfigError, match=r"logits of shape \[1, 62, 256\] for 63 tokens; \[63, V\] needed"):
        perplexity(lambda ids: np.zeros((1, 62, 256)), [[1] * 64], lengths=64, target=8)
    with pytest.raises(rw.ConfigError, match="positions cannot be scaled by yarn:2"):
        perplexity(uniform, [[1] * 99], protocol="longppl", lengths=99, target=8, judge="yarn:2", trained_length=64)
    with pytest.raises(rw.ConfigError, match="stride has no effect on fixed-target"):
        perplexity(model, text(WORDS), stride=3)
    for documents in (["hello world"], [[1, 2.5]], [3], 3, None, [["a"]]):
        with pytest.raises(rw.ConfigError, match="or documents as lists of token ids, not "):
            perplexity(model, documents)
    for name, given in (("target", 64.5), ("target", "64"), ("target", None), ("samples", 2.0), ("stride", [1])):
        protocol = {"protocol": "sliding"} if name == "stride" else {}
        with pytest.raises(rw.ConfigError, match=f"{name} .* must be a whole number"):
            perplexity(model, text(WORDS), lengths=64, **protocol, **{name: given})
    for name in ("fixed-target", "harm"):
        with pytest.raises(rw.DataError, match="token id 257 is not among this model's 0 to 256"):
            perplexity(model, [[257] * 64], protocol=name, lengths=64)
    (row,) = perplexity(model, [np.arange(80)], lengths=np.int64(64), target=np.int64(16))
    assert row.tokens == 16
    with pytest.raises(rw.ConfigError, match="None is not a length"):
        perplexity(model, text(WORDS), lengths=None)
    with pytest.raises(rw.ConfigError, match="a scaler must be a string such as 'yarn:4', not int"):
        perplexity(model, text(WORDS), lengths=64, ropes=4)
    with pytest.raises(rw.ConfigError, match="int is neither a model nor a function"):
        perplexity(3, text(WORDS))
    with rw.patch(model.hf, "linear:2"), pytest.raises(rw.ConfigError, match="patched with linear:2; undo the patch"):
        perplexity(model.hf, text(WORDS), tokenizer=model.tokenizer)


def test_a_token_that_a_function_gives_no_logit_for_is_refused():
    with pytest.raises(rw.DataError, match="token id 9 is not among this model's 0 to 7"):
        rw.evals.perplexity(lambda ids: np.zeros((len(ids), 8)), [[1, 2, 9, 3] * 30], lengths=[16], protocol="disjoint")

"""Names of special tokens in a text are ordinary characters, unless the model is loaded with `special_tokens`."""

import warnings

import pytest
import torch
from live import greedy

import ropewalk as rw
from ropewalk.engine.prompt import Prompt
from ropewalk.tokenizer_tools.cover import cover
from ropewalk.tokenizer_tools.vocabularies import vocabulary

NAME = "<|endoftext|>"
TEXT = f"a{NAME}b"


@pytest.fixture(scope="module")
def asking(tiny_folder):
    return rw.load(tiny_folder, special_tokens=True)


def readings(model):
    """Token ids of TEXT by every way in."""
    with warnings.catch_warnings(), model.session() as session:
        warnings.simplefilter("ignore")
        session.append(TEXT + " c")
        return [
            *(Prompt.read(TEXT, model.tokenizer, model.vocabulary, policy).ids for policy in ("auto", "exact", "off")),
            list(model.vocabulary.encode(TEXT)),
            model.score(TEXT).token_ids,
            list(session._cached.ids),
            list(rw.heal(model.hf, model.tokenizer, TEXT, special_tokens=model._special_tokens).prompts[0].ids),
        ]


def test_names_are_plain_text(model):
    special = model.tokenizer.convert_tokens_to_ids(NAME)
    for ids in readings(model):
        assert special not in ids
        assert model.vocabulary.text_bytes(ids).decode().startswith(f"a{NAME}")


def test_names_are_tokens_where_that_is_asked_for(asking):
    special = asking.tokenizer.convert_tokens_to_ids(NAME)
    assert all(ids.count(special) == 1 for ids in readings(asking))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asking.generate(TEXT, greedy(2)).token_ids


def test_one_call_does_not_change_how_the_next_one_reads(model, asking):
    special = model.tokenizer.convert_tokens_to_ids(NAME)
    for _ in range(2):
        assert special in asking.vocabulary.encode(TEXT)
        assert special not in model.vocabulary.encode(TEXT)
        assert special in vocabulary(model.tokenizer, special_tokens=True).encode(TEXT)
        assert special not in vocabulary(model.tokenizer.backend_tokenizer).encode(TEXT)
        assert special in vocabulary(model.tokenizer.backend_tokenizer, special_tokens=True).encode(TEXT)


def test_a_prompt_that_looks_like_a_chat_is_told_how_to_become_one(model):
    with pytest.warns(UserWarning, match=r"holds <\|endoftext\|>, read as the characters.*special_tokens=True") as told:
        model.generate(TEXT, greedy(1))
    assert told[0].filename == __file__, "the line that a user can change"


def test_contexts_are_read_the_same_way(model, asking):
    special = model.tokenizer.convert_tokens_to_ids(NAME)
    for each, count in ((model, 0), (asking, 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = each.over_contexts("why?", [TEXT], "entropy", greedy(1))
        assert [row.ids.count(special) for row in answer._prompts] == [0, count]  # without a context, and with it


def test_byte_probabilities_after_a_name_and_inside_it(model, asking):
    special = model.tokenizer.convert_tokens_to_ids(NAME)
    behind = model.next_byte_logprobs(TEXT)
    assert not torch.allclose(behind, asking.next_byte_logprobs(TEXT))
    assert model.logprob("c", given=TEXT) == pytest.approx(float(behind[ord("c")]), abs=1e-4)
    assert special not in cover(model.vocabulary, TEXT).prompt
    inside = model.next_byte_logprobs(NAME[:-1])
    assert model.logprob(">", given=NAME[:-1]) == pytest.approx(float(inside[ord(">")]), abs=1e-4)


def test_windows_are_measured_as_they_are_read(model):
    text = f"{NAME} {NAME} b. " * 20
    for part in rw.windows(text, model.tokenizer, tokens=60):
        assert len(model.vocabulary.encode(part)) <= 60


def test_a_strangers_text_between_special_tokens(model):
    before, after = [model.tokenizer.convert_tokens_to_ids(NAME)], model.tokenizer("\n").input_ids
    plain = model.vocabulary.encode(TEXT)
    assert model.generate_ids([*before, *plain, *after], greedy(2)).token_ids


@pytest.mark.parametrize("ask", ["generate", "score", "logprob", "next_byte_logprobs"])
def test_half_a_surrogate_pair_is_refused(model, ask):
    with pytest.raises(rw.DataError, match="half a surrogate pair"):
        getattr(model, ask)("ab\ud83d")


def test_a_word_of_ten_million_letters_is_refused_before_it_is_tokenized(model, monkeypatch):
    encode = type(model.tokenizer)._encode_plus

    def encode_short(self, text, *rest, **more):
        assert len(text) < 1000
        return encode(self, text, *rest, **more)

    monkeypatch.setattr(type(model.tokenizer), "_encode_plus", encode_short)
    word = "x" * 10_000_000
    with model.session() as session:
        for ask in (model.generate, session.append, lambda text: model.generate("why?", contexts=[text])):
            with pytest.raises(rw.ContextOverflow, match=r"10,000,0.. characters, more than 4k tokens"):
                ask(word)

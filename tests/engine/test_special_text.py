"""The names of special tokens in a text: a prompt has the tokens, a stranger's text can be kept from having them."""

import time

import pytest
from live import greedy

import ropewalk as rw
from ropewalk.engine.prompt import Prompt

NAME = "<|endoftext|>"


def test_a_prompt_holds_the_special_tokens_that_are_written_in_it(model):
    text = f"a{NAME}b"
    read = [Prompt.read(text, model.tokenizer, model.vocabulary, policy).ids for policy in ("auto", "exact", "off")]
    assert all(ids.count(0) == 1 for ids in read)
    assert model.score(text).token_ids.count(0) == 1
    with model.session() as session:
        session.append(text + " c")
        assert session._kept.ids.count(0) == 1


def test_text_of_a_stranger_is_kept_plain(model):
    before, after = ([model.tokenizer.convert_tokens_to_ids(NAME)], model.tokenizer("\n").input_ids)
    plain = model.tokenizer(f"a{NAME}b", add_special_tokens=False, split_special_tokens=True).input_ids
    assert 0 not in plain
    assert model.vocabulary.text_bytes(plain).decode() == f"a{NAME}b"
    assert model.generate_ids([*before, *plain, *after], greedy(2)).token_ids


def test_a_word_of_ten_million_letters_is_refused_at_once(model):
    word = "x" * 10_000_000
    with model.session() as session:
        for ask in (model.generate, session.append, lambda text: model.generate("why?", contexts=[text])):
            started = time.monotonic()
            with pytest.raises(rw.ContextOverflow, match=r"10,000,0.. characters, more than 4k tokens"):
                ask(word)
            assert time.monotonic() - started < 5

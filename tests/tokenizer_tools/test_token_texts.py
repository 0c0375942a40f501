"""Single tokens as texts: whole characters, bytes, names of special tokens, and tokens that only the model has."""

import pytest

import ropewalk as rw
from ropewalk.tokenizer_tools.token_texts import TokenTexts


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder)


def test_tokens_as_texts(model):
    vocabulary = model.vocabulary
    texts = TokenTexts(vocabulary, model.tokenizer)
    half = vocabulary.tokens.index(b"\xe2")
    special = model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    unknown = len(vocabulary.tokens) + 5
    cases = {vocabulary.tokens.index(b" the"): " the", half: r"bytes:\xe2", special: "<|endoftext|>"}
    for token, text in {**cases, unknown: f"<token {unknown}>"}.items():
        assert texts.text(token) == text
    assert texts.data(half) == b"\xe2"
    assert texts.data(special) == b"<|endoftext|>"


def test_the_shell_shows_tokens_as_the_server_does(model):
    from ropewalk.cli.batch import answer_fields

    completion = model.generate("\u00e9\u767d", max_new_tokens=2, logprobs=1000, temperature=0)
    texts = TokenTexts(model.vocabulary, model.tokenizer)
    shown = [token for place in answer_fields(model, completion)["logprobs"] for token in (place, *place["top"])]
    assert [token["token"] for token in shown] == [texts.text(token["id"]) for token in shown]
    assert {"<|endoftext|>"} < {token["token"] for token in shown}
    assert any(token["token"].startswith("bytes:") for token in shown)

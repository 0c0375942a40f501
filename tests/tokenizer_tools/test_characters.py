"""Bytes that end inside a character or are not UTF-8, against Python's own decoder, and their tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import GPT2, KINDS, by_merges, byte_fallback, byte_level, unigram

from ropewalk.errors import DataError
from ropewalk.tokenizer_tools.characters import finished_text, first_characters, invalid_runs, unfinished
from ropewalk.tokenizer_tools.cover import cover
from ropewalk.tokenizer_tools.vocabularies import vocabulary

PARTS = st.sampled_from(
    [b"a", b"\xc3", b"\xa9", "é".encode(), "🙂".encode(), b"\xf0\x9f", b"\xff", b"\xed\xa0", b"\xe4\xbd"]
)
DATA = st.lists(PARTS, max_size=8).map(b"".join)


@given(DATA)
def test_every_byte_is_text_or_unfinished(data):
    end = unfinished(data)
    assert data.endswith(end)
    assert finished_text(data) == data[: len(data) - len(end)].decode(errors="replace")
    assert (finished_text(data) + "\ufffd" * bool(end)) == data.decode(errors="replace")
    runs = invalid_runs(data)
    assert bool(runs) == ("\ufffd" in finished_text(data))
    rest = bytearray(data[: len(data) - len(end)])
    for start, stop in reversed(runs):
        del rest[start:stop]
    assert rest.decode() == finished_text(data).replace("\ufffd", "")


@given(DATA)
def test_the_first_characters_are_those_of_the_text(data):
    text = finished_text(data)
    for count in range(len(text) + 1):
        assert first_characters(data, count).decode(errors="replace") == text[:count]
        assert data.startswith(first_characters(data, count))
    assert first_characters(data, len(text)) == data[: len(data) - len(unfinished(data))]


KNOWN = [
    vocabulary(byte_level("aé ", GPT2, 1)),
    vocabulary(by_merges(("a", "Ã"), ("Ġ", "ð"), ("Ġð", "Ł"))),
    vocabulary(KINDS["across characters"][2]("", 0)),
]


@given(DATA, st.sampled_from(KNOWN))
def test_tokens_of_any_bytes_have_these_bytes(data, known):
    ids = known.encode_bytes(data)
    assert known.text_bytes(ids) == data
    covered = cover(known, ids)
    assert known.text_bytes(list(covered.prompt)) == data
    if not invalid_runs(data) and not unfinished(data):
        assert ids == known.encode(data.decode())


def test_part_of_a_character_is_in_the_token_with_its_bytes():
    known = KNOWN[1]
    assert [known.tokens[i] for i in known.encode_bytes(b"x \xf0\x9f")] == [b"x", b" \xf0\x9f"]
    assert [known.tokens[i] for i in known.encode_bytes(b"x \xf0\x9fx")] == [b"x", b" \xf0\x9f", b"x"]


def test_bytes_without_a_token_are_refused():
    fallback = vocabulary(byte_fallback("ab ", 0))
    assert fallback.text_bytes(fallback.encode_bytes(b"ab\xc3ab")) == b" ab\xc3ab"
    with pytest.raises(DataError, match=r"no tokens for the bytes b'\\xc3'"):
        vocabulary(unigram("ab ", 1)).encode_bytes(b"ab\xc3ab")


def test_names_of_special_tokens_after_half_a_character():
    tokenizer = byte_level("a", GPT2, 1)
    tokenizer.add_special_tokens(["<s>", "<s>x"])
    number = tokenizer.token_to_id("<s>x")
    asked, plain = (vocabulary(tokenizer, special_tokens=flag) for flag in (True, False))
    assert asked.encode_bytes(b"\xc3a<s>xa") == [
        *asked.encode_piece(b"\xc3"),
        *asked.encode_piece(b"a"),
        number,
        *asked.encode_piece(b"a"),
    ]
    assert number not in plain.encode_bytes(b"\xc3a<s>xa")


def test_a_special_name_written_in_plain_tokens_stays_plain():
    """Plain text among ids never becomes a special token, also where the ids are computed again."""
    tokenizer = byte_level("a", GPT2, 1)
    tokenizer.add_special_tokens(["<s>"])
    known = vocabulary(tokenizer, special_tokens=True)
    for ids in (known.encode_piece(b"a<s>a"), [*known.encode_piece(b"\xc3"), *known.encode_piece(b"<s>a")]):
        assert tokenizer.token_to_id("<s>") not in cover(known, ids).prompt

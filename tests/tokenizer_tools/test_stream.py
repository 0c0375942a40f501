"""Streaming text: the pieces join to the whole text, without half characters and without stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.tokenizer_tools.stop_strings import StopStringMatcher
from ropewalk.tokenizer_tools.stream import TextStream
from ropewalk.tokenizer_tools.vocabulary import Vocabulary


class Bytes(Vocabulary):
    """Tokens that are single bytes, and a special one at the end."""

    def __init__(self, space_first=False):
        self.tokens = [bytes([byte]) for byte in range(256)] + [b""]
        self.special_ids = frozenset([256])
        self.byte_level = True
        self.name = "bytes"
        self.space_first = space_first

    def encode(self, text):
        return list(b" " * self.space_first + text.encode())

    def piece_starts(self, text):
        return []

    def encode_piece(self, data):
        return list(data)


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_hold_whole_characters(text):
    if "\N{REPLACEMENT CHARACTER}" in text:
        return
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_character_is_shown_with_its_last_byte():
    stream = TextStream(Bytes())
    assert [stream.push(b) for b in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


def test_a_text_that_ends_inside_a_character_shows_it_at_the_end():
    stream = TextStream(Bytes())
    assert [stream.push(b) for b in "a🙂".encode()[:3]] == ["a", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_invalid_bytes_do_not_delay_the_text_after_them():
    stream = TextStream(Bytes())
    assert "".join(stream.push(b) for b in b"\xf0\x9fab\xffc") == "\ufffdab\ufffdc"


def test_only_the_unfinished_character_of_the_prompt_is_repeated():
    data = "é🙂!".encode()
    stream = TextStream(Bytes(), pending=data[2:4])
    assert "".join(stream.push(b) for b in data[4:]) == "🙂!"


def test_bytes_that_belong_to_the_prompt_are_skipped():
    stream = TextStream(Bytes())
    stream._vocabulary.tokens[256] = b" numpy"
    assert stream.push(256, skip=5) == "y"


@pytest.mark.parametrize("space_first", [False, True])
def test_the_space_that_a_tokenizer_adds_is_removed_once(space_first):
    tokens = [256, *b" a b"]
    shown = [TextStream(Bytes(space_first), starts_text=starts) for starts in (True, False)]
    texts = ["".join(stream.push(token) for token in tokens) for stream in shown]
    assert texts == ["a b" if space_first else " a b", " a b"]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_are_found_across_pieces_and_not_shown(size):
    text = "one two END three"
    watch, shown = StopStringMatcher(("END", "three")), ""
    for start in range(0, len(text), size):
        shown += watch.push(text[start : start + size])
        if watch.stopped:
            break
    assert watch.stopped
    assert shown == "one two "


def test_the_start_of_a_stop_string_is_returned_at_the_end():
    watch = StopStringMatcher(("END",))
    assert watch.push("the E") == "the "
    assert watch.push("N") == ""
    assert watch.finish() == "EN"
    assert not watch.stopped

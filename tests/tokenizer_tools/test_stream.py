"""Streaming text: pieces join to the whole, no half characters, stop strings never shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.tokenizer_tools.stream import StopWatch, TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids, **_):
        return bytes(token_ids).decode(errors="replace")


class Words:
    """A tokenizer that, as SentencePiece does, drops the space of the first token decoded."""

    def decode(self, token_ids, **_):
        return "".join(f" w{i}" for i in token_ids)[1:]


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_hold_whole_characters(text):
    if "\N{REPLACEMENT CHARACTER}" in text:
        return
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_text_that_ends_inside_a_character_shows_it_at_the_end():
    stream = TextStream(Bytes())
    assert [stream.push(b) for b in "a🙂".encode()[:3]] == ["a", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_spaces_between_tokens_survive_and_the_prompt_is_not_repeated():
    stream = TextStream(Words(), prompt=[1, 2])
    assert [stream.push(3), stream.push(4)] == [" w3", " w4"]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_are_found_across_pieces_and_not_shown(size):
    text = "one two END three"
    watch, shown = StopWatch(("END", "three")), ""
    for start in range(0, len(text), size):
        shown += watch.push(text[start : start + size])
        if watch.stopped:
            break
    assert watch.stopped
    assert shown == "one two "


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end():
    watch = StopWatch(("END",))
    assert watch.push("the E") == "the "
    assert watch.push("N") == ""
    assert watch.finish() == "EN"
    assert not watch.stopped

"""Long texts split at sentences."""

import itertools
import re

import pytest
from example_count import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import ropewalk as rw

TEXT = (
    "The keel was laid in May. Mr. Smith had paid for it.\n\nNobody knew why! Was it a ship? It was one of three. "
    "They were long; they were low. At last the rope was ready, and it was longer than the walk itself."
)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def size(text, tokenizer):
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def test_windows_are_whole_sentences_in_order(tokenizer):
    windows = rw.windows(TEXT, tokenizer, tokens=40)
    assert len(windows) == 3
    assert all(size(window, tokenizer) <= 40 for window in windows)
    assert all(window[-1] in ".!?" for window in windows)
    assert "".join(windows).replace(" ", "").replace("\n", "") == TEXT.replace(" ", "").replace("\n", "")
    assert not any(window.endswith("Mr.") for window in windows)


def test_windows_repeat_whole_sentences(tokenizer):
    plain, windows = (rw.windows(TEXT, tokenizer, tokens=60, overlap=overlap) for overlap in (0, 30))
    assert len(windows) > len(plain)
    for before, after in itertools.pairwise(windows):
        shared = max(n for n in range(len(after) + 1) if before.endswith(after[:n]))
        assert 0 < size(after[:shared], tokenizer) <= 30
        assert after[:shared].strip()[-1] in ".!?"


def test_a_text_that_fits_is_one_window(tokenizer):
    assert rw.windows(f"  {TEXT}\n", tokenizer, tokens=1000, overlap=999) == [TEXT]
    assert rw.windows(" \n", tokenizer, tokens=5) == []


def test_a_long_sentence_is_split_between_words(tokenizer):
    text = "one two three four five six seven eight nine ten " * 20
    windows = rw.windows(text, tokenizer, tokens=50)
    assert " ".join(windows).split() == text.split()
    assert all(size(window, tokenizer) <= 50 for window in windows)


def test_sentences_end_as_the_language_has_it(tokenizer):
    assert rw.windows("第一句。第二句！第三句？", tokenizer, tokens=16, language="zh")[0] == "第一句。"


SENTENCES = st.lists(st.text(alphabet="ab \n。é\U0001f600", max_size=30), max_size=12)


@examples(150)
@given(SENTENCES, st.integers(1, 40), st.data())
def test_nothing_is_lost(tokenizer, sentences, tokens, data):
    text = "".join(f"{n} {sentence}. " for n, sentence in enumerate(sentences))
    overlap = data.draw(st.integers(0, tokens - 1))
    without_overlap, windows = (rw.windows(text, tokenizer, tokens=tokens, overlap=each) for each in (0, overlap))
    assert "".join("".join(without_overlap).split()) == "".join(text.split())
    for window in windows:
        assert window in text
        assert size(window, tokenizer) <= tokens or len(window) == 1
    places = {(0, 0)}  # possible ends of the last window; the next one starts after it, with only white space between
    for window in windows:
        starts = [match.start() for match in re.finditer(f"(?={re.escape(window)})", text)]
        places = {
            (start, start + len(window))
            for start in starts
            for before, end in places
            if (start > before or end == 0) and start + len(window) > end and not text[end:start].strip()
        }
    assert any(not text[end:].strip() for _, end in places)


def test_a_word_of_a_quarter_megabyte_is_split_in_seconds(tokenizer):
    windows = rw.windows("x" * 250_000, tokenizer, tokens=25_000)
    assert "".join(windows) == "x" * 250_000


@pytest.mark.parametrize(("tokens", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_impossible_sizes_are_refused(tokenizer, tokens, overlap):
    with pytest.raises(rw.ConfigError, match="must be at least"):
        rw.windows(TEXT, tokenizer, tokens=tokens, overlap=overlap)


@pytest.mark.parametrize(
    ("text", "error"), [(None, rw.ConfigError), (b"a", rw.ConfigError), ("a\ud800b", rw.DataError)]
)
def test_what_is_no_text_is_refused(tokenizer, text, error):
    with pytest.raises(error, match=r"must be a string|half a surrogate pair"):
        rw.windows(text, tokenizer, tokens=5)

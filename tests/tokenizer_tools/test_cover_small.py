"""Covers of short prompts, against all short texts and by hand. They are fast enough to run for every mutant."""

from __future__ import annotations

import random
from itertools import pairwise
from string import ascii_lowercase

import pytest
from small_distributions import Distribution
from small_tokenizers import GPT2, KINDS, by_merges, by_scores, byte_fallback
from tokenizers import Regex, normalizers, pre_tokenizers

from ropewalk.errors import DataError, UnsupportedModel
from ropewalk.tokenizer_tools import cover as cover_module
from ropewalk.tokenizer_tools.cover import Node, _is_fixed_border, _loses_end, cover
from ropewalk.tokenizer_tools.splits import possible_splits
from ropewalk.tokenizer_tools.vocabularies import vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_next_byte_distribution_is_the_sum_over_the_shortest_strings(kind):
    assert Distribution(kind, 0, longest=4).error(40) < 1e-12


JOINED = by_merges(("a", "b"), ("ab", "c"), ("b", "c"), ("Ã", "©"))
SPACED = by_merges(("Ġ", "b"), ("Ġ", "Ġ"), ("'", "s"), pattern=GPT2)
WHOLE = by_merges(("a", "b"), ("ab", "c"), whole=("cab",))
FALLEN = byte_fallback("ab ", 0)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "common_prefix", "nodes"),
    [
        (JOINED, "a", [], {(b"a",): b"", (): b"a"}),
        (JOINED, "ab", [], {(b"ab",): b"", (): b"ab"}),  # not a|bc, because a and b merge first
        (JOINED, "xb", [b"x"], {(b"b",): b"", (): b"b"}),
        (JOINED, "xabc", [b"x", b"abc"], {(): b""}),
        (JOINED, b"a\xc3", [b"a"], {(b"\xc3",): b"", (): b"\xc3"}),
        (JOINED, b"\xc3\xa9\xe4", [b"\xc3\xa9", b"\xe4"], {(): b""}),
        (SPACED, "a ", [b"a"], {(b" ",): b"", (): b" "}),
        (SPACED, "a  ", [b"a"], {(b"  ",): b"", (b" ", b" "): b"", (b" ",): b" "}),
        (SPACED, "a'", [b"a"], {(b"'",): b"", (): b"'"}),
        (WHOLE, "cab", [], {(b"cab",): b"", (b"c", b"ab"): b"", (b"c",): b"ab"}),  # if more follows, cab is not a token
        (FALLEN, b"a\xc3", [b" a", b"\xc3"], {(): b""}),
        (FALLEN, b"\xc3", [b" ", b"\xc3"], {(): b""}),
        (FALLEN, "a\u00e9", [b" a", b"\xc3", b"\xa9"], {(): b""}),
    ],
)
def test_covers_by_hand(tokenizer, prompt, common_prefix, nodes):
    known = vocabulary(tokenizer)
    covered = cover(known, prompt)
    assert [known.tokens[i] for i in covered.common_prefix] == common_prefix
    assert {tuple(known.tokens[i] for i in node.path): node.suffix for node in covered.nodes} == nodes
    assert len(covered.nodes) == len(nodes)
    assert covered.prompt == covered.common_prefix + covered.nodes[0].path
    assert covered.only_aligned == (len(nodes) == 1)


def long_text(kind, length, seed=0):
    return "".join(random.Random(seed).choices(KINDS[kind][0], k=length))


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_long_prompt_is_enough(kind):
    distribution, text = Distribution(kind, 2, longest=1), long_text(kind, 700)
    for length in range(600, 700, 33):
        whole = text[:length]
        data = whole.encode()
        for prompt in (whole[:-1], whole[:-3], data[:-1], data[:-2]):
            assert distribution.has_cover_of_its_tokens(whole, prompt), (whole[-9:], prompt[-9:])


@pytest.mark.parametrize("kind", ["plain", "inside characters", "across characters", "byte fallback"])
def test_a_prompt_that_is_hardly_longer_than_the_first_window(kind):
    distribution, text = Distribution(kind, 0, longest=1), long_text(kind, 300).replace("a", KINDS[kind][0][0])
    for size in range(252, 264):
        assert distribution.has_cover_of_its_tokens(text, text.encode()[:size]), size


def test_a_token_as_long_as_the_first_window():
    distribution = Distribution("plain", 0, longest=1)
    distribution.vocabulary = vocabulary(by_merges(*(("x" * 2**n, "x" * 2**n) for n in range(8))))
    assert distribution.has_cover_of_its_tokens("ab" + 300 * "x", "ab" + 256 * "x")


def test_the_last_pieces_before_the_end_are_not_relied_on():
    distribution = Distribution("gpt2", 0, longest=1)
    distribution.vocabulary = vocabulary(by_merges(("'", "r"), ("'r", "e"), pattern=GPT2))
    whole = 300 * "a" + " b're"
    assert distribution.has_cover_of_its_tokens(whole, whole[:-1])


def test_a_window_that_is_split_in_another_way_alone_is_widened():
    """Letters are split in pairs from the start of the text: a|b at its end, but ab where the first window starts."""
    known = vocabulary(by_merges(("a", "b"), pattern=".{1,2}"))
    widest = looked_at(known, 5000 * "ab" + "a" + 200 * "ab")
    assert 256 < widest < 1100


def looked_at(known, text):
    """The most bytes that were split into pieces at once."""
    seen, cuts = [], known.piece_starts
    known.piece_starts = lambda part: seen.append(len(part.encode())) or cuts(part)
    covered = cover(known, text)
    assert covered.prompt == tuple(known.encode(text))
    return max(seen)


@pytest.mark.parametrize("kind", ["llama3", "right-aligned digits", "cased", "byte fallback"])
def test_the_last_borders_before_a_long_run_are_not_relied_on(kind):
    distribution = Distribution(kind, 2, longest=1)
    letters = KINDS[kind][0]
    for letter in letters[:2]:
        for count in (12, 13, 14):
            whole = 100 * letters + "a" + count * letter + "a"
            assert distribution.has_cover_of_its_tokens(whole, whole[:-1]), (letter, count)
            assert distribution.has_cover_of_its_tokens(whole, whole[:-2]), (letter, count)


@pytest.mark.parametrize(("kind", "most"), [("gpt2", 300), ("plain", 4200), ("inside characters", 4200)])
def test_only_the_end_of_a_long_prompt_is_looked_at(kind, most):
    """Words at the end are found in the first window; without borders of pieces the largest one is used."""
    assert 0 < looked_at(Distribution(kind, 0, longest=1).vocabulary, long_text(kind, 20_000)) <= most


@pytest.mark.parametrize("kind", ["plain", "inside characters", "across characters", "byte fallback"])
def test_a_long_piece_has_the_covers_of_a_full_tokenization(kind, monkeypatch):
    known = Distribution(kind, 0, longest=1).vocabulary
    texts = [long_text(kind, 700, seed).encode()[:-cut] for seed, cut in enumerate((1, 2, 3, 4))]
    covers = [cover(known, text) for text in texts]
    monkeypatch.setattr(cover_module, "_LONG_PIECE", 10_000)
    assert covers == [cover(known, text) for text in texts]


@pytest.mark.parametrize("kind", ["plain", "across characters", "byte fallback"])
def test_a_long_piece_is_not_tokenized_again_for_every_node(kind):
    known, text = Distribution(kind, 0, longest=1).vocabulary, long_text(kind, 3000)
    seen, piece = [], known.encode_piece
    known.encode_piece = lambda data: seen.append(len(data)) or piece(data)
    cover(known, text)
    assert 0 < max(seen) < 100


def test_a_long_piece_of_a_unigram_model_is_the_best_segmentation_of_all_of_it():
    """Another letter can move every border of a repetitive text."""
    distribution = Distribution("unigram", 0, longest=1)
    for pattern in ("abba", "aabab"):
        whole = 300 * pattern
        for cut in (1, 2, 3, 4):
            assert distribution.has_cover_of_its_tokens(whole, whole[:-cut]), (pattern, cut)


def test_a_long_piece_that_begins_inside_a_token_of_the_prompt():
    """The prompt has the token xy. If an a follows, x is a piece of its own."""
    distribution = Distribution("plain", 0, longest=1)
    distribution.vocabulary = vocabulary(
        by_merges(("x", "y"), ("y", "a"), ("y", "z"), ("z", "z"), pattern="x(?=[yz]+a)|.+")
    )
    whole = "xy" + "".join(random.Random(0).choices("yz", k=600)) + "ya"
    for cut in (1, 2, 5):
        assert distribution.has_cover_of_its_tokens(whole, whole[:-cut]), cut


def test_a_long_piece_of_short_tokens_that_ends_inside_a_character():
    distribution = Distribution("plain", 0, longest=1)
    distribution.vocabulary = vocabulary(by_merges(("a", "b")))
    whole = 400 * "ab" + "🙂"
    for cut in (1, 2, 3):
        assert distribution.has_cover_of_its_tokens(whole, whole.encode()[:-cut]), cut


@pytest.mark.parametrize("before", [300 * "0.", ""])
def test_a_last_letter_that_moves_borders_far_back_in_a_long_piece(before, monkeypatch):
    """Of two pairs of letters the later one merges first, so every pair depends on the last letter."""
    monkeypatch.setattr(cover_module, "_LONG_PIECE", 20)
    distribution = Distribution("plain", 0, longest=1)
    distribution.vocabulary = vocabulary(by_merges(("z", "!"), *reversed(list(pairwise(ascii_lowercase)))))
    for first in range(4):
        whole = before + ascii_lowercase[first:] + "!"
        assert distribution.has_cover_of_its_tokens(whole, whole[:-1]), first


def test_half_a_character_that_only_whole_tokens_can_complete():
    known = vocabulary(by_scores({"▁": -1, "a": -1, "é": -1, "aé": -1.5}))
    covered = cover(known, b"a\xc3")
    space, a = known.encode("a")
    assert covered.prompt == (space, a)
    assert covered.common_prefix == (space,)
    assert covered.nodes == (Node((), b"a\xc3"),)  # never a|é, because aé is better


def test_half_a_character_that_has_no_token_is_refused():
    with pytest.raises(DataError, match="no tokens for a character"):
        cover(Distribution("unigram", 0, longest=1).vocabulary, b"a\xc3")


def test_white_space_that_a_normalizer_stripped_is_noticed():
    for prompt in ("a ", b"a ", "  ", "ab ", b"ab "):
        assert _loses_end(prompt, b"a")
    for prompt, text in (("a ", b"a "), ("a", b"a"), (b" a", b"a"), ("中".encode()[:-1], b"a")):
        assert not _loses_end(prompt, text)


def test_white_space_at_the_end_stays_although_a_normalizer_strips_it():
    tokenizer = by_merges(("a", "b"), ("Ġ", "b"), pattern=GPT2)
    known = vocabulary(by_merges(("a", "b"), ("Ġ", "b"), pattern=GPT2))
    tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    for prompt in ("ab ", "a  ", b"ab "):
        assert cover(vocabulary(tokenizer), prompt) == cover(known, prompt)


def test_a_tokenizer_that_splits_characters_is_refused():
    tokenizer = by_merges(("a", "b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(GPT2), "isolated")
    with pytest.raises(UnsupportedModel, match="splits characters"):
        cover(vocabulary(tokenizer), "é")


def test_borders_that_do_not_depend_on_the_text_after():
    fixed = ("ab", "a ", "a1", "1a", "1 ", "-1")
    assert [pair for pair in (*fixed, " a", " 1", "  ", "\n ", "11", "1²") if _is_fixed_border(*pair)] == list(fixed)


def test_covers_do_not_cross_special_tokens():
    distribution = Distribution("plain", 0, longest=1)
    tokenizer = KINDS["plain"][2]("ab ", 0)
    tokenizer.add_special_tokens(["<s>"])
    walled = vocabulary(tokenizer, special_tokens=True)
    special = tokenizer.token_to_id("<s>")
    assert walled.special_ids == {special}
    behind, alone = cover(walled, "ab<s>ab"), cover(distribution.vocabulary, "ab")
    assert behind.text == b"ab"
    assert behind.nodes == alone.nodes
    assert behind.common_prefix == (*walled.encode("ab<s>"), *alone.common_prefix)
    end = cover(walled, "ab<s>")
    assert end.only_aligned
    assert end.common_prefix == end.prompt == (*walled.encode("ab"), special)
    assert end.text == b""
    plain = cover(vocabulary(tokenizer), "ab<s>ab")
    assert special not in plain.prompt
    assert plain.text == b"ab<s>ab"


def test_a_prompt_of_token_ids_is_that_of_its_text():
    known = Distribution("gpt2", 0, longest=1).vocabulary
    text = "a's  a"
    letters = [i for byte in text.encode() for i in known.trie.exact(bytes([byte]))]
    assert cover(known, letters) == cover(known, text) == cover(known, text.encode())
    long = 200 * text  # only its end is tokenized again
    assert cover(known, 200 * letters) == cover(known, long)
    assert cover(known, long).prompt == tuple(known.encode(long))


@pytest.mark.parametrize(
    "before", [[b"\xa9"], [b"ab", b"\xff"], [b"\xa9", b"a", b"b", b"\xff"], [b"\xff", b"a", b"\xa9", b"abc", b"\xc3"]]
)
@pytest.mark.parametrize("special", [[], [b"<s>"], [b"a", b"<s>"]])
def test_token_ids_up_to_an_invalid_character_stay_as_they_are(before, special):
    tokenizer = by_merges(("a", "b"), ("ab", "c"))
    tokenizer.add_special_tokens(["<s>"])
    known, special_id = vocabulary(tokenizer, special_tokens=True), tokenizer.token_to_id("<s>")

    def ids(tokens):
        return tuple(known.tokens.index(token) if token in known.tokens else special_id for token in tokens)

    covered, alone = cover(known, [*ids([*special, *before]), *ids([b"a", b"b"])]), cover(known, "ab")
    assert covered.text == b"ab"
    assert covered.common_prefix == (*ids([*special, *before]), *alone.common_prefix)
    assert covered.nodes == alone.nodes


def test_the_splits_of_a_text_and_how_it_can_go_on():
    """Words, runs of digits, marks, and white space are pieces."""
    known = vocabulary(SPACED)
    for text, inside, outside in (
        (b"a", b"aXz\xc3\xe4", b"1 -.\n"),
        (b"1", b"19\xc2", b"aX -.\n"),
        (b"-", b"-.=", b"a1 \n"),
        (b" ", b" \n\ta1-", b""),
        (b"\n", b" \n\t\r", b"a1-\x00"),
        (b"a\xe4", bytes(range(256)), b""),
    ):
        splits = possible_splits(known, text)
        together = splits[0].next_bytes
        assert set(inside) <= together and not set(outside) & together, text
        assert all(0 < start < len(text) for split in splits for start in split.piece_starts)
    starts = {split.piece_starts for split in possible_splits(known, b"a  ")}
    assert starts == {(1,), (1, 2)}, "the last space may belong to a word after it"


def test_tokens_that_the_model_has_not_are_in_no_cover():
    """The tokenizer's last token, abc, has no row."""
    tokenizer = by_merges(("a", "b"), ("ab", "c"))
    known, fewer = vocabulary(tokenizer), vocabulary(tokenizer, rows=len(vocabulary(tokenizer).tokens) - 1)
    paths = [[node.path for node in cover(each, [known.tokens.index(b"a")]).nodes] for each in (known, fewer)]
    assert paths[0] == paths[1]
    with pytest.raises(DataError):
        cover(fewer, "abc")


def test_an_empty_prompt_has_one_node_and_no_common_prefix():
    covered = cover(Distribution("gpt2", 0, longest=1).vocabulary, "")
    assert covered.nodes == (Node((), b""),)
    assert covered.common_prefix == covered.prompt == ()


def test_bytes_that_are_not_utf8_are_refused():
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        cover(Distribution("gpt2", 0, longest=1).vocabulary, b"a\xffb")

"""Covers against brute force: a random law over all short strings, and every string's own tokens."""

from __future__ import annotations

import random

import pytest
from small_laws import Law
from small_tokenizers import KINDS

from ropewalk.errors import DataError
from ropewalk.tokenizer_tools import boundaries
from ropewalk.tokenizer_tools import cover as cover_module
from ropewalk.tokenizer_tools.boundaries import split_character
from ropewalk.tokenizer_tools.cover import Cover, Node, _is_firm, _loses_end, cover
from ropewalk.tokenizer_tools.vocab import vocabulary


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_next_byte_law_is_the_sum_over_all_strings(kind, seed):
    assert Law(kind, seed).error() < 1e-12


def one_probe(monkeypatch):
    monkeypatch.setattr(boundaries, "PROBES", ("",))


def one_deep(monkeypatch):
    begins = cover_module._OpenPiece.begins

    def last_token_only(self):
        tokens = self.vocabulary.beginning(split_character(self.text[self.start :])[0])
        last = len(self.text) - len(self.vocabulary.tokens[tokens[-1]]) if tokens else len(self.text)
        return (begin for begin in begins(self) if begin == last)

    monkeypatch.setattr(cover_module._OpenPiece, "begins", last_token_only)


def whole_characters(monkeypatch):
    begins = cover_module._OpenPiece.begins
    monkeypatch.setattr(
        cover_module._OpenPiece,
        "begins",
        lambda self: (begin for begin in begins(self) if self.text[begin] & 0xC0 != 0x80),
    )


def no_aligned_node(monkeypatch):
    monkeypatch.setattr(cover_module._OpenPiece, "ends", lambda self: iter(()))


def deepest_only(monkeypatch):
    begins = cover_module._OpenPiece.begins
    monkeypatch.setattr(cover_module._OpenPiece, "begins", lambda self: list(begins(self))[:1])


@pytest.mark.parametrize(
    ("mutation", "kinds"),
    [
        (one_probe, ["gpt2", "llama3", "right-aligned digits", "cased"]),
        (
            one_deep,
            ["plain", "gpt2", "llama3", "inside characters", "byte fallback", "unigram"],
        ),
        (deepest_only, [kind for kind in KINDS if kind != "right-aligned digits"]),
        (whole_characters, ["across characters"]),
        (no_aligned_node, list(KINDS)),
    ],
)
def test_no_ingredient_can_be_left_out(mutation, kinds, monkeypatch):
    mutation(monkeypatch)
    for kind in kinds:
        try:
            error = max(Law(kind, seed).error() for seed in range(2))
        except IndexError:  # no node left at all
            error = 1.0
        assert error > 1e-3, kind


@pytest.mark.parametrize("kind", KINDS)
def test_filtered_nodes_are_those_that_no_string_needs(kind, monkeypatch):
    law = Law(kind, 0)
    kept = [len(cover(law.vocabulary, prompt).nodes) for prompt in law.prompts(150)]
    monkeypatch.setattr(cover_module._Search, "_continues", lambda *_: True)
    unfiltered = [len(cover(law.vocabulary, prompt).nodes) for prompt in law.prompts(150)]
    assert sum(kept) < sum(unfiltered)
    assert law.error() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_is_a_prefix_of_the_prompt_and_the_first_node_is_its_end(kind):
    law = Law(kind, 1)
    for text in random.Random(0).sample(law.texts, 200):
        covered = cover(law.vocabulary, text)
        assert covered.prompt == tuple(law.vocabulary.encode(text))
        assert covered.prompt[: len(covered.trunk)] == covered.trunk
        assert covered.trunk + covered.nodes[0].path == covered.prompt
        assert covered.backed_off == len(covered.prompt) - len(covered.trunk)
        for node in covered.nodes:
            path = [*covered.trunk, *node.path]
            assert law.vocabulary.text_bytes(path) + node.suffix == covered.text


def test_tokens_of_a_long_text_are_the_same_as_of_its_end():
    """The window of a long prompt: the same covers as of a short one, behind a longer trunk."""
    for kind in KINDS:
        law = Law(kind, 2)
        letters = KINDS[kind][0]
        start = "".join(random.Random(3).choices(letters, k=6000))
        for end in random.Random(4).sample(law.texts[-2000:], 8):
            whole = start + letters[0] + end
            for cut in (1, 2):
                assert _has_its_own_cover(law, whole, cut), (kind, whole[-9:], cut)


@pytest.mark.parametrize("kind", KINDS)
def test_no_border_inside_a_long_run_of_one_character_is_relied_on(kind):
    """Digits may be grouped from the right, and the last space joins a word: what comes moves such borders."""
    law, letters = Law(kind, 2), KINDS[kind][0]
    for letter in letters:
        other = next(one for one in letters if one != letter)
        for count in range(10, 16):
            whole = 100 * "".join(letters) + other + count * letter
            for after in (letter, other):
                for cut in (1, 2, 3):
                    assert _has_its_own_cover(law, whole + after, cut), (letter, count, after, cut)


def test_white_space_that_a_normalizer_stripped_is_noticed():
    for prompt in ("a ", b"a ", "  "):
        assert _loses_end(prompt, b"a")
    for prompt, text in (("a ", b"a "), ("a", b"a"), (b" a", b"a"), ("中".encode()[:-1], b"a")):
        assert not _loses_end(prompt, text)


def test_borders_that_what_follows_cannot_move():
    firm = ("ab", "a ", "a1", "1a", "1 ", "-1")
    assert [pair for pair in (*firm, " a", " 1", "  ", "\n ", "11", "1²") if _is_firm(*pair)] == list(firm)


@pytest.mark.parametrize("letter", ["a", " ", "-", "7", "\n", "中", "🙂"])
def test_a_long_run_of_one_character_takes_no_time(letter):
    known = Law("llama3", 0).vocabulary
    prompt = "a. " + letter * 300_000
    started = known.encode(prompt)
    calls = []
    cuts = known.cuts
    known.cuts = lambda text: calls.append(len(text)) or cuts(text)
    covered = cover(known, prompt)
    assert covered.prompt == tuple(started)
    assert sum(calls) < 10 * len(prompt)


def _has_its_own_cover(law, whole: str, cut: int) -> bool:
    """Whether the beginning of a text, without its last characters, has the cover that the text's own tokens are."""
    covered = cover(law.vocabulary, whole[: len(whole) - cut])
    tokens, n, reached = law.vocabulary.encode(whole), 0, 0
    while reached < len(covered.text):
        reached += len(law.vocabulary.tokens[tokens[n]])
        n += 1
    return _holds(law.vocabulary, covered, tuple(tokens[:n]))


def _holds(vocabulary_, covered: Cover, sequence: tuple[int, ...]) -> bool:
    for node in covered.nodes:
        path, last = covered.trunk + node.path, vocabulary_.tokens[sequence[-1]]
        if node.aligned and path == sequence:
            return True
        if not node.aligned and path == sequence[:-1] and last.startswith(node.suffix) and len(last) > len(node.suffix):
            return True
    return False


def test_special_tokens_are_walls():
    law = Law("plain", 0)
    tokenizer = KINDS["plain"][2]("ab ", 0)
    tokenizer.add_special_tokens(["<s>"])
    walled = vocabulary(tokenizer, special_tokens=True)
    special = tokenizer.token_to_id("<s>")
    assert walled.walls == {special}
    behind, alone = cover(walled, "ab<s>ab"), cover(law.vocabulary, "ab")
    assert behind.text == b"ab"
    assert behind.nodes == alone.nodes
    assert behind.trunk == (*walled.encode("ab<s>"), *alone.trunk)
    end = cover(walled, "ab<s>")
    assert end.only_aligned
    assert end.trunk == end.prompt == (*walled.encode("ab"), special)
    assert end.text == b""
    plain = cover(vocabulary(tokenizer), "ab<s>ab")
    assert special not in plain.prompt
    assert plain.text == b"ab<s>ab"


def test_a_prompt_of_token_ids_is_that_of_its_text():
    law = Law("gpt2", 0)
    text = "a's  a"
    letters = [i for byte in text.encode() for i in law.vocabulary.trie.exact(bytes([byte]))]
    assert cover(law.vocabulary, letters) == cover(law.vocabulary, text) == cover(law.vocabulary, text.encode())
    known, long = law.vocabulary, 200 * text  # of which the end alone is cut anew
    assert cover(known, 200 * letters) == cover(known, long)
    assert cover(known, long).prompt == tuple(known.encode(long))


def test_an_empty_prompt_has_one_node_and_no_trunk():
    covered = cover(Law("gpt2", 0).vocabulary, "")
    assert covered.nodes == (Node((), b""),)
    assert covered.trunk == covered.prompt == ()


def test_bytes_that_are_not_utf8_are_refused():
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        cover(Law("gpt2", 0).vocabulary, b"a\xffb")

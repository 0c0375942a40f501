"""Covers against brute force: a random law over all short strings, and every string's own tokens."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from small_tokenizers import KINDS, strings

from ropewalk.errors import DataError
from ropewalk.tokenizer_tools import boundaries
from ropewalk.tokenizer_tools import cover as cover_module
from ropewalk.tokenizer_tools.boundaries import split_character
from ropewalk.tokenizer_tools.cover import Cover, Node, cover
from ropewalk.tokenizer_tools.vocab import vocabulary

END = -1


class Law:
    """Random probabilities of all short strings, and what they make of token sequences and of bytes."""

    def __init__(self, kind, seed):
        alphabet, length, make = KINDS[kind]
        self.vocabulary = vocabulary(make(alphabet, seed))
        self.texts = strings(alphabet, length)
        rng = random.Random(seed)
        self.sequences, self.bytes = defaultdict(float), defaultdict(float)
        for text in self.texts:
            weight = rng.expovariate(1)
            ids = tuple(self.vocabulary.encode(text))
            data = self.vocabulary.text_bytes(list(ids))
            for n in range(len(ids) + 1):
                self.sequences[ids[:n]] += weight
            self.sequences[(*ids, END)] += weight
            for n in range(len(data) + 1):
                self.bytes[data[:n]] += weight
            self.bytes[data, END] += weight

    def prompts(self, count, seed=0):
        """Texts cut at random bytes, short enough to have many continuations."""
        rng = random.Random(seed)
        for text in rng.sample(self.texts, count):
            data = text.encode()
            yield data[: rng.randint(1, max(1, len(data) - 2))]

    def by_bytes(self, text):
        """Next byte -> weight of the strings that begin with `text` and go on with it."""
        found = {byte: self.bytes[text + bytes([byte])] for byte in range(256) if text + bytes([byte]) in self.bytes}
        return found | {END: self.bytes.get((text, END), 0.0)}

    def by_cover(self, covered):
        """The same, from the cover and the weights of token sequences."""
        found = defaultdict(float)
        tokens = self.vocabulary.tokens
        for node in covered.nodes:
            path = covered.trunk + node.path
            if node.aligned:
                found[END] += self.sequences.get((*path, END), 0.0)
                candidates = self.vocabulary.trie.extensions(b"")
            else:
                candidates = self.vocabulary.trie.extensions(node.suffix)
            for token in candidates:
                found[tokens[token][len(node.suffix)]] += self.sequences.get((*path, token), 0.0)
        return found

    def error(self, count=150):
        """Largest difference of the two, of the prompt's own weight."""
        worst = 0.0
        for prompt in self.prompts(count):
            covered = cover(self.vocabulary, prompt)
            expected, got = self.by_bytes(covered.text), self.by_cover(covered)
            whole = self.bytes[covered.text]
            if whole:
                keys = expected.keys() | got.keys()
                worst = max(worst, *(abs(expected.get(k, 0.0) - got.get(k, 0.0)) / whole for k in keys))
        return worst


@pytest.mark.parametrize("seed", range(4))
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
        start = "".join(random.Random(3).choices(letters, k=2000))
        for end in random.Random(4).sample(law.texts[-2000:], 25):
            whole = start + letters[0] + end
            for cut in (1, 2):
                prompt = whole[: len(whole) - cut]
                covered = cover(law.vocabulary, prompt)
                tokens, n, reached = law.vocabulary.encode(whole), 0, 0
                while reached < len(covered.text):
                    reached += len(law.vocabulary.tokens[tokens[n]])
                    n += 1
                assert _holds(law.vocabulary, covered, tuple(tokens[:n])), (kind, prompt[-9:])


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
    walled = vocabulary(tokenizer)
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


def test_a_prompt_of_token_ids_is_that_of_its_text():
    law = Law("gpt2", 0)
    text = "a's  a"
    letters = [i for byte in text.encode() for i in law.vocabulary.trie.exact(bytes([byte]))]
    assert cover(law.vocabulary, letters) == cover(law.vocabulary, text) == cover(law.vocabulary, text.encode())


def test_an_empty_prompt_has_one_node_and_no_trunk():
    covered = cover(Law("gpt2", 0).vocabulary, "")
    assert covered.nodes == (Node((), b""),)
    assert covered.trunk == covered.prompt == ()


def test_bytes_that_are_not_utf8_are_refused():
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        cover(Law("gpt2", 0).vocabulary, b"a\xffb")

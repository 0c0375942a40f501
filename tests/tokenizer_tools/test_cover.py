"""Covers against brute force: a random distribution over all short strings, and the tokens of every string."""

from __future__ import annotations

import random

import pytest
from small_distributions import distribution
from small_tokenizers import KINDS

from ropewalk.errors import DataError
from ropewalk.tokenizer_tools import cover as cover_module
from ropewalk.tokenizer_tools import splits
from ropewalk.tokenizer_tools.cover import cover, split_character


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_next_byte_distribution_is_the_sum_over_all_strings(kind, seed):
    assert distribution(kind, seed).error() < 1e-12


def one_probe(monkeypatch):
    monkeypatch.setattr(splits, "CONTINUATIONS", ("",))


def one_deep(monkeypatch):
    begins = cover_module._OpenPiece.last_token_starts

    def last_token_only(self):
        tokens = self.vocabulary.encode_piece_start(split_character(self.text[self.start :])[0])
        last = len(self.text) - len(self.vocabulary.tokens[tokens[-1]]) if tokens else len(self.text)
        return (begin for begin in begins(self) if begin == last)

    monkeypatch.setattr(cover_module._OpenPiece, "last_token_starts", last_token_only)


def whole_characters(monkeypatch):
    begins = cover_module._OpenPiece.last_token_starts
    monkeypatch.setattr(
        cover_module._OpenPiece,
        "last_token_starts",
        lambda self: (begin for begin in begins(self) if self.text[begin] & 0xC0 != 0x80),
    )


def no_aligned_node(monkeypatch):
    monkeypatch.setattr(cover_module._OpenPiece, "full_paths", lambda self: iter(()))


def deepest_only(monkeypatch):
    begins = cover_module._OpenPiece.last_token_starts
    monkeypatch.setattr(cover_module._OpenPiece, "last_token_starts", lambda self: list(begins(self))[:1])


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
        assert any(is_wrong(distribution(kind, seed)) for seed in range(2)), kind


def is_wrong(wanted):
    try:
        return any(error > 1e-3 for error in wanted.errors())
    except DataError:  # no node is left
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_filtered_nodes_are_those_that_no_string_needs(kind, monkeypatch):
    wanted = distribution(kind, 0)
    filtered = [len(cover(wanted.vocabulary, prompt).nodes) for prompt in wanted.prompts(50)]
    monkeypatch.setattr(cover_module._Search, "_continues", lambda *_: True)
    unfiltered = [len(cover(wanted.vocabulary, prompt).nodes) for prompt in wanted.prompts(50)]
    assert sum(filtered) < sum(unfiltered)
    assert wanted.error() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_common_prefix_is_a_prefix_of_the_prompt_and_the_first_node_is_its_end(kind):
    known, texts = distribution(kind, 1).vocabulary, distribution(kind, 1).texts
    for text in random.Random(0).sample(texts, 100):
        covered = cover(known, text)
        assert covered.prompt == tuple(known.encode(text))
        assert covered.prompt[: len(covered.common_prefix)] == covered.common_prefix
        assert covered.common_prefix + covered.nodes[0].path == covered.prompt
        assert covered.backed_off == len(covered.prompt) - len(covered.common_prefix)
        for node in covered.nodes:
            path = [*covered.common_prefix, *node.path]
            assert known.text_bytes(path) + node.suffix == covered.text


def test_tokens_of_a_long_text_are_the_same_as_of_its_end():
    """The window of a long prompt has the covers of a short one, after a longer common prefix."""
    for kind in KINDS:
        wanted = distribution(kind, 2)
        letters = KINDS[kind][0]
        start = "".join(random.Random(3).choices(letters, k=6000))
        for end in random.Random(4).sample(wanted.texts[-1000:], 4):
            whole = start + letters[0] + end
            for cut in (1, 2):
                assert wanted.has_cover_of_its_tokens(whole, whole[:-cut]), (kind, whole[-9:], cut)


@pytest.mark.parametrize("kind", KINDS)
def test_no_border_inside_a_long_run_of_one_character_is_relied_on(kind):
    """Digits can be grouped from the right, and the last space joins a word, so later text moves such borders."""
    wanted, letters = distribution(kind, 2), KINDS[kind][0]
    for letter in letters:
        other = next(candidate for candidate in letters if candidate != letter)
        for count in range(10, 13):
            whole = 100 * "".join(letters) + other + count * letter
            for after in (letter, other):
                for cut in (1, 2, 3):
                    text = whole + after
                    assert wanted.has_cover_of_its_tokens(text, text[:-cut]), (letter, count, after, cut)


@pytest.mark.parametrize("letter", ["a", " ", "-", "7", "\n", "中", "🙂"])
def test_a_long_run_of_one_character_takes_no_time(letter, monkeypatch):
    known = distribution("llama3", 0).vocabulary
    prompt = "a. " + letter * 100_000
    started = known.encode(prompt)
    calls = []
    cuts = known.piece_starts
    monkeypatch.setattr(known, "piece_starts", lambda text: calls.append(len(text)) or cuts(text))
    covered = cover(known, prompt)
    assert covered.prompt == tuple(started)
    assert sum(calls) < 10 * len(prompt)

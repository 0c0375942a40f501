"""Random distributions over all short strings, as a language model that knows them exactly."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import cache

from small_tokenizers import KINDS, strings

from ropewalk.tokenizer_tools.cover import cover
from ropewalk.tokenizer_tools.vocabularies import vocabulary

END = -1


class Distribution:
    """Random probabilities of all short strings, and those of token sequences and bytes that follow from them."""

    def __init__(self, kind, seed, longest=None):
        alphabet, length, make = KINDS[kind]
        self.vocabulary = vocabulary(make(alphabet, seed))
        self.texts = strings(alphabet, longest or length)
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
        """Texts cut at random bytes, so short that they have many continuations."""
        rng = random.Random(seed)
        for text in rng.sample(self.texts, count):
            data = text.encode()
            yield data[: rng.randint(1, max(1, len(data) - 2))]

    def by_bytes(self, text):
        """Next byte -> weight of the strings that start with `text` and this byte."""
        weights = {byte: self.bytes[text + bytes([byte])] for byte in range(256) if text + bytes([byte]) in self.bytes}
        return weights | {END: self.bytes.get((text, END), 0.0)}

    def by_cover(self, covered):
        """The same, from the cover and the weights of token sequences."""
        weights = defaultdict(float)
        tokens = self.vocabulary.tokens
        for node in covered.nodes:
            path = covered.common_prefix + node.path
            if node.aligned:
                weights[END] += self.sequences.get((*path, END), 0.0)
                candidates = self.vocabulary.trie.extensions(b"")
            else:
                candidates = self.vocabulary.trie.extensions(node.suffix)
            for token in candidates:
                weights[tokens[token][len(node.suffix)]] += self.sequences.get((*path, token), 0.0)
        return weights

    def error(self, count=150):
        """The largest difference of the two, relative to the weight of the prompt."""
        return max(self.errors(count), default=0.0)

    def errors(self, count=150):
        """This difference for each of so many prompts."""
        for prompt in self.prompts(count):
            covered = cover(self.vocabulary, prompt)
            expected, got = self.by_bytes(covered.text), self.by_cover(covered)
            whole = self.bytes[covered.text]
            if whole:
                keys = expected.keys() | got.keys()
                yield max(abs(expected.get(k, 0.0) - got.get(k, 0.0)) for k in keys) / whole

    def has_cover_of_its_tokens(self, whole, prompt):
        """True if the text's own tokens start with a cover of a prefix of it."""
        covered = cover(self.vocabulary, prompt)
        ids, n, reached = self.vocabulary.encode(whole), 0, 0
        while reached < len(covered.text):
            reached += len(self.vocabulary.tokens[ids[n]])
            n += 1
        last = self.vocabulary.tokens[ids[n - 1]]
        return any(
            covered.common_prefix + node.path == tuple(ids[: n - 1] if node.suffix else ids[:n])
            and last.startswith(node.suffix)
            and len(last) > len(node.suffix)
            for node in covered.nodes
        )


@cache
def distribution(kind, seed):
    """A distribution that tests share: to be left as it is."""
    return Distribution(kind, seed)

"""The first token after a prompt, against distributions known exactly and against one forward for every cover."""

import functools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from live import prepare
from small_distributions import END, Distribution
from small_tokenizers import KINDS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache

import ropewalk as rw
from ropewalk.engine.cache import can_rewind, new_cache
from ropewalk.engine.prompt import Prompt
from ropewalk.engine.runners.transformers import TransformersRunner
from ropewalk.engine.sampling import ResolvedParams, random_source
from ropewalk.engine.sequence import Sequence, next_tokens
from ropewalk.engine.token_healing import draw_first_token, text_logprob, weigh
from ropewalk.tokenizer_tools.cover import Node, cover
from ropewalk.tokenizer_tools.vocabularies import vocabulary

PROMPTS = ["import nump", "http:", "x = f(", "    retur", "def ", "a", "\n\n", "if x:\n    ", "-" * 40, "é"]


class ExactModel:
    """A language model with the next-token probabilities of a distribution over strings. Token 0 begins a text."""

    device = torch.device("cpu")

    def __init__(self, distribution):
        self.distribution = distribution
        known = distribution.vocabulary
        self.start, self.size = len(known.tokens), len(known.tokens) + 2  # a start and an end token
        known.tokens, known.special_ids = [*known.tokens, b"", b""], known.special_ids | {self.start, self.start + 1}
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(vocab_size=self.size, _attn_implementation="exact")
        )

    def __call__(self, **arguments):
        return self.forward(**arguments)

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        states = input_ids.float()[:, None, :, None]
        keys, _ = past_key_values.update(states, states, 0)
        ids = tuple(int(i) for i in keys[0, 0, :, 0] if i != self.start)
        counts = range(len(ids) - logits_to_keep + 1, len(ids) + 1)
        return SimpleNamespace(logits=torch.stack([self.logits(ids[:n]) for n in counts])[None])

    @functools.cache  # noqa: B019
    def logits(self, ids):
        weights = torch.full((self.size,), 1e-30, dtype=torch.float64)
        for token in range(self.start):
            weights[token] += self.distribution.sequences.get((*ids, token), 0.0)
        weights[-1] += self.distribution.sequences.get((*ids, END), 0.0)
        return weights.log()


@pytest.fixture(params=KINDS)
def exact(request):
    return ExactModel(Distribution(request.param, 5))


def started(covered, model):
    """The cover behind the start token, which a distribution over strings needs for the first token."""
    return replace(covered, common_prefix=(model.start, *covered.common_prefix), prompt=(model.start, *covered.prompt))


def weighed(model, prompt):
    covered = cover(model.distribution.vocabulary, prompt)
    return covered, weigh(
        TransformersRunner(model), started(covered, model), None, DynamicCache(), model.distribution.vocabulary
    )


def test_next_byte_probabilities_are_exact(exact):
    for prompt in exact.distribution.prompts(25, seed=1):
        covered, covers = weighed(exact, prompt)
        whole = exact.distribution.bytes[covered.text]
        expected = torch.zeros(257)
        for byte, weight in exact.distribution.by_bytes(covered.text).items():
            expected[256 if byte == END else byte] = weight / whole
        assert torch.allclose(covers.next_byte_logprobs(exact.distribution.vocabulary).exp(), expected, atol=1e-5)


def test_log_probability_of_a_text_is_the_exact_one(exact):
    for prompt in exact.distribution.prompts(10, seed=2):
        covered = cover(exact.distribution.vocabulary, prompt)
        got = text_logprob(
            TransformersRunner(exact), covered, exact.start, 0, DynamicCache(), exact.distribution.vocabulary
        )
        assert got == pytest.approx(
            math.log(exact.distribution.bytes[covered.text] / exact.distribution.bytes[b""]), abs=1e-5
        )


def test_answers_are_drawn_with_their_exact_frequency():
    """Whole answers, to their end: the draw among covers and the ordinary decoding after it."""
    distribution = Distribution("plain", 6)
    model, known = ExactModel(distribution), distribution.vocabulary
    prompt, draws, counts, runner = b"abba", 600, Counter(), TransformersRunner(model)
    covered = cover(known, prompt)
    assert len(covered.nodes) > 1
    for seed in range(draws):
        params = ResolvedParams(max_new_tokens=12, seed=seed)
        prompt_read = Prompt(ids=[], starts_text=False, cover=started(covered, model))
        sequence = Sequence(prompt_read, params, known, frozenset([model.size - 1]), DynamicCache())
        sequence.first_token(runner)
        while not sequence.done:
            next_tokens(runner, [sequence], runner.step(sequence.rows))
        tokens = sequence.tokens
        ids = [*tokens[0].healing.prompt_ids, *(token.id for token in tokens)]
        counts[known.text_bytes(ids)] += 1
    for text in distribution.texts:
        if text.startswith("abba"):
            p = (distribution.bytes[text.encode(), END]) / distribution.bytes[prompt]
            assert abs(counts[text.encode()] - draws * p) < 4.5 * math.sqrt(draws * p * (1 - p)) + 1, text
    assert sum(counts.values()) == draws


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return rw.load(tiny_folder)


def one_forward_each(model, covered, start):
    """Log-probability of every cover given the certain tokens, by a forward of its whole token sequence."""
    context, logprobs = list(covered.common_prefix) or [start], []
    for node in covered.nodes:
        with torch.inference_mode():
            logits = model(torch.tensor([[*context, *node.path]])).logits[0].float().log_softmax(-1)
        path = sum(logits[len(context) - 1 + k, token] for k, token in enumerate(node.path))
        logprobs.append(logits[-1] + path)
    return logprobs


def assert_same(covers, expected):
    for n in range(len(expected)):
        of_node = covers.nodes == n
        assert torch.allclose(covers.logprobs[of_node], expected[n][covers.tokens[of_node]], atol=2e-4), n


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weights_are_those_of_one_forward_for_every_cover(tiny, prompt):
    covered = cover(tiny.vocabulary, prompt)
    cache = tiny.new_cache(64)
    covers = weigh(tiny._runner, covered, tiny.tokenizer.bos_token_id, cache, tiny.vocabulary)
    assert_same(covers, one_forward_each(tiny.hf, covered, tiny.tokenizer.bos_token_id))
    assert cache.get_seq_length() == len(covers.context) + len(covers.cached_path)


@pytest.mark.parametrize(("spec", "most"), [("none", 2), ("yarn:4", 2), ("rerope:64", 2)])
def test_paths_are_run_together(tiny, spec, most, monkeypatch):
    key_runs = []
    for name in ("forward", "tree"):
        original = getattr(tiny._runner, name)
        monkeypatch.setattr(
            tiny._runner, name, lambda *args, original=original, **kw: key_runs.append(1) or original(*args, **kw)
        )
    tiny.rope = spec
    try:
        counts, leaves = [], []
        for prompt in ["import numpy as np\n" + prompt for prompt in PROMPTS]:
            covered = cover(tiny.vocabulary, prompt)
            key_runs.clear()
            covers = weigh(tiny._runner, covered, None, tiny.new_cache(64), tiny.vocabulary)
            counts.append(len(key_runs))
            paths = {node.path for node in covered.nodes}
            leaves.append(sum(not any(q[: len(p)] == p and q != p for q in paths) for p in paths))
            assert_same(covers, one_forward_each(tiny.hf, covered, None))
    finally:
        tiny.rope = None
    assert max(counts) <= most
    assert all((count == 1) == (n == 1) for count, n in zip(counts, leaves, strict=True))
    assert max(leaves) > 1


@pytest.mark.parametrize("spec", ["none", "yarn:4", "rerope:64|logn"])
def test_many_paths_are_weighed_as_each_alone(tiny, spec):
    """More than any prompt above has: four leaves, two of which share their first token."""
    ids = tuple(tiny.vocabulary.encode("def main(argv=None):\n    parser = argparse"))
    paths = [ids[-3:], (), (10, 20, 30), (10, 21), (40,), (41, 42)]
    covered = replace(
        cover(tiny.vocabulary, "x"), prompt=ids, common_prefix=ids[:-3], nodes=tuple(Node(p, b"") for p in paths)
    )
    tiny.rope = spec
    try:
        cache = tiny.new_cache(64)
        covers = weigh(tiny._runner, covered, None, cache, tiny.vocabulary)
        assert_same(covers, one_forward_each(tiny.hf, covered, None))
        assert cache.get_seq_length() == len(covered.common_prefix) + len(covers.cached_path)
    finally:
        tiny.rope = None


@pytest.mark.parametrize("held", ["nothing", "half", "the prompt", "more"])
def test_a_cache_that_holds_some_of_the_prompt_is_cropped_and_used(tiny, held):
    text = "import numpy as np\nimport nump"
    covered = cover(tiny.vocabulary, text)
    ids = {"nothing": [], "half": covered.prompt[:3], "the prompt": covered.prompt, "more": covered.prompt}[held]
    cache = tiny.new_cache(64)
    if ids:
        tiny.hf(torch.tensor([list(ids)]), past_key_values=cache)
    covers = weigh(tiny._runner, covered, None, cache, tiny.vocabulary)
    assert_same(covers, one_forward_each(tiny.hf, covered, None))


def test_logits_beyond_the_vocabulary_end_the_text(tiny_folder):
    known = vocabulary(AutoTokenizer.from_pretrained(tiny_folder))
    model = small(LlamaForCausalLM, size=len(known.tokens) + 40)
    with torch.inference_mode():
        covers = weigh(TransformersRunner(model), cover(known, "import nump"), None, new_cache(model.config, 8), known)
    distribution = covers.next_byte_logprobs(known).exp()
    beyond = covers.logprobs[covers.tokens >= len(known.tokens)].exp().sum() / math.exp(covers.total)
    assert distribution.sum() == pytest.approx(1, abs=1e-5)
    assert distribution[256] >= beyond > 0


def small(kind, size=1024, **kwargs):
    torch.manual_seed(0)
    config = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig}[kind](
        vocab_size=size,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=64,
        num_key_value_heads=2,
        **kwargs,
    )
    return kind(config).eval()


def test_a_cache_that_cannot_be_rewound_is_copied(tiny_folder):
    model = small(MistralForCausalLM, sliding_window=4)
    known = vocabulary(AutoTokenizer.from_pretrained(tiny_folder))
    covered = cover(known, "import numpy as np\nimport nump")
    assert len({node.path for node in covered.nodes}) > 1
    cache = new_cache(model.config, 8)
    with torch.inference_mode():
        covers = weigh(TransformersRunner(model), covered, None, cache, known)
    assert not can_rewind(cache)
    assert_same(covers, one_forward_each(model, covered, None))
    first = draw_first_token(
        covers, cache, ResolvedParams(temperature=0), random_source(ResolvedParams(), model.device)
    )
    step = model(torch.tensor([first.pending]), past_key_values=cache).logits[0, -1]
    fresh = model(torch.tensor([[*first.token.healing.prompt_ids, first.token.id]])).logits[0, -1]
    assert torch.allclose(step, fresh, atol=1e-5)
    with pytest.raises(rw.PatchError, match="give a new cache"):
        weigh(TransformersRunner(model), covered, None, cache, known)


@pytest.mark.parametrize(
    "spec", ["yarn:4", "dynamic-ntk", "rerope:64|logn", "self-extend:8,window=64", "ntk:4|sink-window:64"]
)
def test_every_scaler_weighs_as_a_fresh_forward_does(tiny, spec):
    tiny.rope = spec
    try:
        text = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n" * 12 + "    pars"
        tokens = rw.SamplingParams(max_new_tokens=5, temperature=0, continuation="exact", logprobs=1)
        completion = tiny.generate(text, tokens)
        read = completion.healing.prompt_ids
        assert completion.healing.nodes > 1
        covered = cover(tiny.vocabulary, text)
        prepare(tiny, len(covered.prompt) + 5)
        expected = one_forward_each(tiny.hf, covered, None)
        distribution = torch.cat(
            [
                row if node.aligned else row[tiny.vocabulary.trie.extensions(node.suffix)]
                for node, row in zip(covered.nodes, expected, strict=True)
            ]
        )
        first = completion.logprobs[0].logprob
        assert first == pytest.approx(float(distribution.max() - distribution.logsumexp(0)), abs=1e-3)
        rest = tiny.score_ids([*read, *completion.token_ids], first=len(read) + 1)
        prepare(tiny, len(covered.prompt) + 5)
        if "dynamic" not in spec:  # fixed to another length there
            got = torch.tensor([token.logprob for token in completion.logprobs[1:]])
            assert torch.allclose(got, rest, atol=1e-3)
    finally:
        tiny.rope = None

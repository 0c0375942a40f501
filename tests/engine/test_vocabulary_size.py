"""A tokenizer with more tokens than the model: the others are refused in prompts, and never drawn."""

import pytest
import torch
from live import greedy

import ropewalk as rw
from ropewalk.engine.model import Model
from ropewalk.engine.runners.choose import RunnerOptions
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.retrieval.task import Trial

ROWS = 600
WORDS = "token id [0-9]+ is not among this model's 0 to 599"


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "transformers"])
def small(request, tiny_folder):
    """The tiny model with the first rows of its embedding only, under its whole tokenizer."""
    loaded = rw.load(tiny_folder, compile=False)
    loaded.hf.resize_token_embeddings(ROWS)
    settings = RunnerOptions(compile=request.param)
    return Model(loaded.hf, loaded.tokenizer, name="small", max_length=4096, options=settings)


ASK = {
    "generate": lambda m, t: m.generate(t, greedy(4)),
    "bytes": lambda m, t: m.generate(t.encode(), greedy(4)),
    "off": lambda m, t: m.generate(t, greedy(4, continuation="off")),
    "list": lambda m, t: m.generate(["a", t], greedy(4)),
    "stream": lambda m, t: list(m.stream(t, greedy(4))),
    "session": lambda m, t: m.session().append(t),
    "contexts": lambda m, t: m.generate("why?", greedy(4), contexts=[t]),
    "question": lambda m, t: m.generate(t, greedy(4), contexts=["a b"]),
    "logprob": lambda m, t: m.logprob(t),
    "given": lambda m, t: m.logprob(" b", t),
    "next byte": lambda m, t: m.next_byte_logprobs(t),
    "score": lambda m, t: m.score(t),
    "heal": lambda m, t: rw.heal(m.hf, m.tokenizer, t, greedy()),
}


@pytest.mark.parametrize("ask", ASK)
def test_a_text_that_needs_a_token_without_a_row_is_refused(small, ask):
    ids = [i for i in range(ROWS, 1024) if small.vocabulary.tokens[i].decode(errors="ignore").isalpha()]
    token = next(
        word for word in map(small.tokenizer.decode, ids) if len(small.tokenizer(word).input_ids) == 1 and len(word) > 4
    )
    for text in (f"{token} x = 1", f"x = 1\n{token}\n\n", f"x = (1)\n{token}"):
        with pytest.raises(rw.DataError, match=WORDS):
            ASK[ask](small, text)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, ids: m.generate_ids(ids, greedy(4)),
        lambda m, ids: m.generate_ids(ids, greedy(4, continuation="exact")),
        lambda m, ids: m.generate([ids, [1]], greedy(4)),
        lambda m, ids: m.score_ids(ids),
        lambda m, ids: m._runner.forward(ids, m.new_cache(40), 1),
        lambda m, ids: m._runner.tree([(i,) for i in ids], m.new_cache(40)),
        lambda m, ids: m._runner.step([(ids, m.new_cache(40))]),
        lambda m, ids: LocalModel(m).run_trial(
            Trial(prompt="", prompt_ids=[1, 2], answer_ids=ids, answers=(), target="", new_tokens=1, needle=None)
        ),
    ],
)
@pytest.mark.parametrize("ids", [[3, ROWS], [3] * 20 + [1000] + [3] * 20, [3, -1]])
def test_ids_without_a_row_are_refused(small, ask, ids):
    with pytest.raises(rw.DataError, match="is not among this model's 0 to 599"):
        ask(small, ids)


def test_no_cover_has_a_token_without_a_row(small):
    """Words that go on in tokens which the model has not; before, their ids were looked up in the logits."""
    longer = [small.tokenizer.decode([i]) for i in range(ROWS, 1024)]
    beginnings = [f"x = ({word[:-1]}" for word in longer if word.isalpha() and len(word) > 3]
    prompts = [text for text in beginnings if max(small.tokenizer(text).input_ids) < ROWS]
    assert len(prompts) > 4
    for prompt in prompts[:5]:
        assert float(small.next_byte_logprobs(prompt).exp().sum()) == pytest.approx(1, abs=1e-5)
        for seed in range(6):
            completion = small.generate(
                prompt, rw.SamplingParams(max_new_tokens=3, temperature=1, seed=seed, continuation="exact")
            )
            assert max(completion.token_ids + (completion.healing.prompt_ids if completion.healing else [])) < ROWS
        healed = rw.heal(small.hf, small.tokenizer, prompt, rw.SamplingParams(temperature=1, seed=1))
        assert int(healed.input_ids.max()) < ROWS


def test_logits_without_an_embedding_row_are_not_drawn(tiny_folder):
    """A head that is wider than the embedding: what cannot be read is not written."""
    loaded = rw.load(tiny_folder, compile=False)
    hf, wide = loaded.hf, loaded.hf.get_output_embeddings()
    embedding = torch.nn.Embedding.from_pretrained(hf.get_input_embeddings().weight[:ROWS].detach())
    head = torch.nn.Linear(wide.in_features, wide.out_features, bias=True)
    with torch.no_grad():
        head.weight.copy_(wide.weight)
        head.bias.zero_()[ROWS:] = 100.0
    hf.set_input_embeddings(embedding)
    hf.set_output_embeddings(head)
    model = Model(hf, loaded.tokenizer, name="wide", max_length=4096)
    assert model.vocabulary_size == ROWS
    for params in (
        greedy(4),
        greedy(4, continuation="off"),
        rw.SamplingParams(max_new_tokens=4, temperature=1, seed=1),
    ):
        assert max(model.generate("x = (", params).token_ids) < ROWS
    assert max(model.generate("x = (", greedy(4), contexts=["x = 1"]).token_ids) < ROWS

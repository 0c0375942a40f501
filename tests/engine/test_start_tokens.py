"""Tokenizers that close a text or begin one: a prompt is never closed, and begins once. The oracle is the same model
whose tokenizer puts nothing behind a text."""

import math

import pytest
import torch
from live import greedy
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import ropewalk as rw
from ropewalk.engine.model import Model
from ropewalk.evals.data import Text
from ropewalk.evals.models.measured import Start
from ropewalk.evals.retrieval.task import Place, assemble
from ropewalk.evals.retrieval.tasks import TASKS

MARK = "<|endoftext|>"
PROMPTS = ["def __in", "import nump", "class A(", "é = "]
CODE = "def area(side):\n    return side * side\n\n\n" * 8


@pytest.fixture(scope="module")
def under(tiny_folder):
    """The tiny model under a tokenizer that puts a frame around every text."""
    loaded = rw.load(tiny_folder, max_length=4096)

    def make(frame, special_tokens=False):
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        number = tokenizer.convert_tokens_to_ids(MARK)
        single = frame.replace("*", MARK)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[(MARK, number)])
        return Model(loaded.hf, tokenizer, name="tiny", max_length=4096, special_tokens=special_tokens)

    return make


def answers(model):
    """What every way of asking gives."""
    session = model.session()
    session.append(PROMPTS[0])
    healed = rw.heal(model.hf, model.tokenizer, PROMPTS, greedy())
    contexts = [CODE[:60], CODE[60:150]]
    return {
        "generate": [model.generate(prompt, greedy(8)) for prompt in PROMPTS],
        "off": model.generate(PROMPTS[0], greedy(8, continuation="off")),
        "list": model.generate(PROMPTS, greedy(8)),
        "bytes": model.generate(PROMPTS[0].encode(), greedy(8)),
        "stream": list(model.stream(PROMPTS[1], greedy(8))),
        "session": [session.generate("", greedy(4)), session.generate("(x", greedy(4)), session.text],
        "contexts": model.generate("def ar", greedy(6), contexts=contexts),
        "heal": [healed.input_ids.tolist(), healed.ended],
        "logprob": [model.logprob("it__", "def __in"), model.logprob("def f")],
        "next byte": model.next_byte_logprobs("def __in").tolist(),
        "score": [model.score(CODE).token_ids, model.score(CODE).logprobs.tolist()],
    }


@pytest.mark.parametrize(("closing", "open_"), [("$A *", "$A"), ("* $A *", "* $A"), ("$A * *", "$A")])
def test_a_closing_tokenizer_changes_no_answer(under, closing, open_):
    actual, expected = answers(under(closing)), answers(under(open_))
    for name in expected:
        assert actual[name] == expected[name], name
    assert actual["generate"][0].text.startswith("it__")


def test_the_answer_is_what_transformers_writes_after_the_open_text(under):
    model = under("$A *")
    ids = model.tokenizer("def area(", add_special_tokens=False).input_ids
    with torch.inference_mode():
        out = model.hf.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert model.generate("def area(", greedy(8, continuation="off")).token_ids == out


def test_measurements_are_those_of_open_texts(under):
    text = Text(name="code", documents=(CODE,), sha256="0" * 64)
    trials, rows = [], []
    for model in (under("* $A *"), under("* $A")):
        trials.append(assemble(TASKS["passkey"], model.tokenizer, Place(context=400, depth=0.5), 1))
        settings = {"protocol": "disjoint", "lengths": [32], "text_tokens": 10_000}
        rows.append([(r.tokens, r.loss) for r in rw.evals.perplexity(model, text, **settings)])
        assert Start.of(model.tokenizer).prefix == [0]
    assert trials[0] == trials[1]
    assert rows[0] == rows[1]


def test_a_chat_text_with_its_start_token_begins_once(under):
    """The text of a chat template brings the start token that the tokenizer would put there too."""
    model = under("* $A *", special_tokens=True)
    model.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "def area("}], tokenize=False)
    assert text == f"{MARK}def area("
    plain = under("$A", special_tokens=True)
    for ask in (
        lambda m, t: m.generate(t, greedy(8)),
        lambda m, t: m.generate(t, greedy(8, continuation="off")),
        lambda m, t: list(m.stream(t, greedy(8))),
        lambda m, t: m.score(t).logprobs.tolist(),
        lambda m, t: m.session().generate(t, greedy(8)),
        lambda m, t: rw.heal(m.hf, m.tokenizer, t, greedy(), special_tokens=True).input_ids.tolist(),
        lambda m, t: m.next_byte_logprobs(t).tolist(),
    ):
        assert ask(model, text) == ask(plain, text)
    assert math.isclose(model.logprob("side", text), plain.logprob("side", text))
    assert model.score(text).token_ids[:2] != [0, 0]

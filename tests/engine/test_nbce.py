"""One answer over many contexts, against a naive implementation that encodes everything again at every step."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from live import counted, prepare

import ropewalk as rw
from ropewalk.engine.nbce import NBCE

pytestmark = pytest.mark.usefixtures("untouched", "no_contexts")

QUESTION = "\nclass Reader:\n    def "
CONTEXTS = [
    "import os\n\nclass Writer:\n    def write(self, path):\n        return os.open(path)\n",
    "def parse(text):\n    return text.split()\n",
    "class Reader:\n    def read_line(self):\n        return self.file.readline()\n" * 3,
]


@pytest.fixture
def no_contexts(model):
    yield
    model.clear_contexts()


def params(count=12, **others):
    return rw.SamplingParams(**{"max_new_tokens": count, "temperature": 0, "continuation": "off"} | others)


def nucleus(probabilities, top_p):
    """The outcomes that top-p holds, the likeliest first until their sum reaches it."""
    chosen, total = [], 0.0
    for index in sorted(range(len(probabilities)), key=lambda n: -probabilities[n]):
        chosen.append(index)
        total += probabilities[index]
        if total >= top_p:
            break
    return chosen


def naive_pool(rows, *, pooling, beta, top_p, stickiness, last):
    """The formula, outcome by outcome: pooled nats and, for each context, how much it speaks for each outcome."""
    logs = [[math.log(p) if p > 0 else -math.inf for p in row] for row in rows]
    nuclei = [nucleus(row, top_p) for row in rows]
    contexts = range(1, len(rows))
    if pooling == "entropy":
        entropies = {k: -sum(rows[k][v] * logs[k][v] for v in nuclei[k]) for k in contexts}
        if last is not None:
            entropies[last + 1] -= stickiness
        best = min(contexts, key=lambda k: entropies[k])
        pooled = {v: logs[best][v] for v in nuclei[best]}
        spoken = [[-entropies[k]] * len(rows[0]) for k in contexts]
    else:
        spoken = [logs[k] for k in contexts]
        if pooling == "max":
            pooled = {v: max(logs[k][v] for k in contexts if v in nuclei[k]) for k in contexts for v in nuclei[k]}
        else:
            means = [float(np.mean([logs[k][v] for k in contexts])) for v in range(len(rows[0]))]
            total = math.fsum(map(math.exp, means))
            inside = nucleus([math.exp(mean) / total for mean in means], top_p)
            pooled = {v: means[v] for v in inside}
    without = set(nuclei[0])
    scores = {v: (1 + beta) * p - beta * logs[0][v] if v in without else p for v, p in pooled.items()}
    return scores, spoken


def naive_answer(model, texts, count, **nbce):
    """Greedy, every row encoded again by transformers' modules at every step."""
    rows = [model.tokenizer(text).input_ids for text in texts]
    length = max(map(len, rows)) + count
    written, sources, distributions, last = [], [], [], None
    for _ in range(count):
        prepare(model, length)
        with torch.inference_mode():
            probabilities = [
                model.hf(torch.tensor([[*row, *written]])).logits[0, -1].double().softmax(-1) for row in rows
            ]
        scores, spoken = naive_pool([row.tolist() for row in probabilities], last=last, **nbce)
        token = max(scores, key=lambda v: (scores[v], -v))
        last = max(range(len(spoken)), key=lambda k: spoken[k][token])
        written.append(token)
        sources.append(last)
        total = math.log(math.fsum(map(math.exp, scores.values())))
        distributions.append({v: score - total for v, score in scores.items()})
    return written, sources, distributions


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        *((spec, {}) for spec in ("none", "yarn:2", "rerope:64|logn", "dynamic-ntk")),
        ("none", {"beta": 0.9, "top_p": 0.6, "stickiness": 1.5}),
        ("rerope:64|logn", {"pooling": "mean"}),
        ("dynamic-ntk", {"pooling": "max", "beta": 0.0}),
        ("yarn:2", {"pooling": "max", "top_p": 1.0}),
    ],
    ids=str,
)
def test_answers_are_those_of_the_naive_twin(model, spec, settings):
    model.rope = spec
    nbce = NBCE(**settings)
    completion = model.generate(QUESTION, params(logprobs=5000), contexts=CONTEXTS, pooling=nbce)
    texts = [QUESTION, *(f"{context}\n\n{QUESTION}" for context in CONTEXTS)]
    every = {"pooling": "entropy", "beta": 0.25, "top_p": 0.95, "stickiness": 0.1} | settings
    written, sources, distributions = naive_answer(model, texts, len(completion.token_ids), **every)
    assert completion.token_ids == written
    assert completion.sources == sources
    for token, distribution in zip(completion.logprobs, distributions, strict=True):
        assert token.top.keys() == distribution.keys()
        assert token.top == pytest.approx(distribution, abs=1e-4)
    assert completion.usage.prompt_tokens == sum(len(model.tokenizer(text).input_ids) for text in texts)


def test_the_defaults_are_those_of_the_source(model):
    nbce = NBCE()
    assert (nbce.pooling, nbce.beta, nbce.top_p, nbce.stickiness) == ("entropy", 0.25, 0.95, 0.1)
    by_name = model.generate(QUESTION, params(), contexts=CONTEXTS)
    assert by_name == model.generate(QUESTION, params(), contexts=CONTEXTS, pooling=nbce)


def test_the_choice_sticks(model):
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.1, 0.0]])
    free, sticky = NBCE(top_p=1, stickiness=0), NBCE(top_p=1)
    for nbce, chosen in ((free, 1), (sticky, 0)):
        _, spoken = nbce.pool(logits, last=0)
        assert int(spoken[:, 0].argmax()) == chosen
    assert int(sticky.pool(logits, last=None)[1].argmax()) == 1


@pytest.mark.parametrize("continuation", ["auto", "off"])
@pytest.mark.parametrize("question", [QUESTION, "import nump", "    retur"])
def test_one_context_pooled_alone_is_plain_generation(model, question, continuation):
    alone = NBCE(beta=0, top_p=1.0)
    sampling = rw.SamplingParams(max_new_tokens=8, temperature=0, continuation=continuation, logprobs=3)
    for context in CONTEXTS:
        completion = model.generate(question, sampling, contexts=[context], pooling=alone)
        plain = model.generate(f"{context}\n\n{question}", sampling)
        assert (completion.text, completion.token_ids, completion.finish_reason) == (
            plain.text,
            plain.token_ids,
            plain.finish_reason,
        )
        assert completion.sources == [0] * len(completion.token_ids)
        assert (completion.healing is None) == (plain.healing is None)
        for a, b in zip(completion.logprobs, plain.logprobs, strict=True):
            assert a.top == pytest.approx(b.top, abs=1e-4)


def test_a_question_cut_inside_a_token_is_gone_on_with(model):
    completion = model.generate("    retur", params(continuation="auto"), contexts=CONTEXTS)
    assert completion.text.startswith("n ")
    assert completion.healing is not None
    assert completion.healing.overlap > 0


def test_an_answer_that_gave_up_its_memory_penalizes_the_same_tokens(model):
    """The prompt's own last tokens were added, which the first token had replaced."""
    sequence = model.over_contexts(
        "    retur", CONTEXTS, "entropy", params(continuation="auto", repetition_penalty=1.3)
    )
    with model.running(sequence.length) as runner:
        assert sequence.read_ahead(runner, 1024)
        sequence.first_token(runner)
        assert sequence.healing.overlap
        before = set(sequence._seen._known)
        sequence.release()
        assert sequence.read_ahead(runner, 1024)
        sequence.first_token(runner)
    assert sequence._seen._known == before | {sequence.tokens[1].id}


def test_contexts_are_read_once(model, monkeypatch):
    first = model.generate(QUESTION, params(), contexts=CONTEXTS)
    with counted(model, monkeypatch) as read:
        second = model.generate("\nimport ", params(), contexts=CONTEXTS)
    tokens = sum(read)
    model.clear_contexts()
    with counted(model, monkeypatch) as read:
        assert model.generate("\nimport ", params(), contexts=CONTEXTS) == second
    held = sum(len(model.tokenizer(context).input_ids) for context in CONTEXTS)
    assert sum(read) - tokens > 0.9 * held
    assert model.generate(QUESTION, params(), contexts=CONTEXTS) == first


def test_contexts_may_come_and_go(model):
    fresh = {}
    for order in ((0, 1, 2), (2, 0), (1,), (2, 1, 0, 1)):
        model.clear_contexts()
        fresh[order] = model.generate(QUESTION, params(), contexts=[CONTEXTS[n] for n in order])
    for order in (*fresh, *fresh):
        assert model.generate(QUESTION, params(), contexts=[CONTEXTS[n] for n in order]) == fresh[order]


@pytest.mark.parametrize("specs", [("rerope:64|logn", "none"), ("none", "yarn:2"), ("dynamic-ntk", "dynamic-ntk")])
def test_earlier_questions_under_another_scaler_change_nothing(model, specs):
    """A scaler that follows the length is another one for a longer question."""
    contexts, questions = [context * 4 for context in CONTEXTS], (QUESTION, "\n" * 40 + QUESTION)
    answers = []
    for asked in (zip(specs, questions, strict=True), [(specs[1], questions[1])]):
        for spec, question in asked:
            model.rope = spec
            answer = model.generate(question, params(20, logprobs=0), contexts=contexts)
        answers.append([token.logprob for token in answer.logprobs])
        model.clear_contexts()
    assert answers[0] == pytest.approx(answers[1], abs=1e-5)


def test_a_stream_is_the_answer_and_may_be_dropped(model):
    whole = model.generate(QUESTION, params(), contexts=CONTEXTS)
    assert "".join(model.stream(QUESTION, params(), contexts=CONTEXTS)) == whole.text
    stream = model.stream(QUESTION, params(), contexts=CONTEXTS)
    next(stream)
    stream.close()
    assert model.generate(QUESTION, params(), contexts=CONTEXTS) == whole
    stream = model.stream(QUESTION, params(), contexts=CONTEXTS)
    next(stream)
    model.rope = "yarn:2"
    with pytest.raises(rw.PatchError, match="changed from none to yarn:2"):
        next(stream)
    model.rope = "none"
    assert model.generate(QUESTION, params(), contexts=CONTEXTS).text == whole.text


def test_answers_that_overlap_in_time_do_not_share_caches(model):
    questions = QUESTION, "\nimport sys\n\nclass Writer:\n    def read"
    fresh = []
    for question in questions:
        model.clear_contexts()
        fresh.append(model.generate(question, params(), contexts=CONTEXTS))
    stream = model.stream(questions[0], params(), contexts=CONTEXTS)
    first = next(stream)
    left = model.stream(questions[0], params(), contexts=CONTEXTS)
    next(left)  # and neither ended nor closed
    assert model.generate(questions[1], params(), contexts=CONTEXTS) == fresh[1]
    assert first + "".join(stream) == fresh[0].text
    for question, expected in zip(questions * 2, fresh * 2, strict=True):
        assert model.generate(question, params(), contexts=CONTEXTS) == expected


def test_what_ends_last_is_kept_and_what_was_forgotten_meanwhile_is_not(model, monkeypatch):
    def read_for(question):
        with counted(model, monkeypatch) as read:
            model.generate(question, params(), contexts=CONTEXTS)
        return sum(read)

    whole = read_for(QUESTION)
    stream = model.stream("\nimport ", params(), contexts=CONTEXTS)
    next(stream)
    assert read_for(QUESTION) >= whole  # the stream holds the caches
    stream.close()
    assert read_for(QUESTION) < whole / 2
    stream = model.stream("\nimport ", params(), contexts=CONTEXTS)
    next(stream)
    model.clear_contexts()
    stream.close()
    assert model._contexts._cached == []


def test_contexts_that_memory_does_not_hold_are_refused_and_what_was_read_stays(model, monkeypatch):
    model.generate(QUESTION, params(), contexts=CONTEXTS)
    with monkeypatch.context() as tight:
        tight.setattr("ropewalk.engine.kv_cache.psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
        with pytest.raises(rw.ContextOverflow, match="keys and values of"):
            model.generate(QUESTION * 9, params(), contexts=CONTEXTS)
    with counted(model, monkeypatch) as read:
        model.generate(QUESTION, params(1), contexts=CONTEXTS)
    assert sum(read) < 60


def test_seeds_repeat_an_answer(model):
    one, two, other = (
        model.generate(QUESTION, params(20, temperature=1.0, seed=seed), contexts=CONTEXTS) for seed in (5, 5, 6)
    )
    assert one == two != other


def test_a_list_of_questions_is_answered_one_by_one(model):
    questions = [QUESTION, "\nimport "]
    together = model.generate(questions, params(), contexts=CONTEXTS)
    assert together == [model.generate(question, params(), contexts=CONTEXTS) for question in questions]


def test_stops_and_penalties_act_on_the_pooled_answer(model):
    plain = model.generate(QUESTION, params(20), contexts=CONTEXTS)
    stopped = model.generate(QUESTION, params(20, stop="("), contexts=CONTEXTS)
    assert plain.text.startswith(stopped.text + "(")
    assert stopped.finish_reason == "stop"
    assert model.generate(QUESTION, params(20, repetition_penalty=1.8), contexts=CONTEXTS).text != plain.text


def test_transformers_modules_give_the_same(tiny_folder, model):
    plain = rw.load(tiny_folder, max_length=4096, compile=False)
    completion, expected = (one.generate(QUESTION, params(), contexts=CONTEXTS) for one in (plain, model))
    assert (completion.text, completion.sources) == (expected.text, expected.sources)
    assert plain.generate(QUESTION, params(), contexts=CONTEXTS) == completion


def test_a_template_is_the_text_of_a_row(model):
    nbce = NBCE(template="# {question}\n{context}\n#")
    assert nbce.rows("{context}?", ["{question}"]) == ["# {context}?\n\n#", "# {context}?\n{question}\n#"]
    completion = model.generate(
        "why", params(4), contexts=CONTEXTS[:1], pooling=NBCE(template=nbce.template, beta=0, top_p=1)
    )
    assert completion.text == model.generate(f"# why\n{CONTEXTS[0]}\n#", params(4)).text


@pytest.mark.parametrize(
    ("contexts", "question", "message"),
    [
        ([], QUESTION, "contexts is empty; give at least one"),
        (["a", " \n"], QUESTION, r"contexts\[1\] is blank"),
        ("a text", QUESTION, "contexts is a string; give a list"),
        (["a"], " ", "the prompt is blank"),
        (["a"], b"a", "text, not bytes"),
    ],
)
def test_what_is_no_question_over_contexts_is_refused(model, contexts, question, message):
    with pytest.raises(rw.ConfigError, match=message):
        model.generate(question, params(), contexts=contexts)


@pytest.mark.parametrize("pooling", ["mean", "medain", NBCE(beta=0.5)])
def test_a_pooling_without_contexts_is_refused(model, pooling):
    """It did nothing, without a word."""
    for ask in (model.generate, model.stream):
        with pytest.raises(rw.ConfigError, match=r"is for answers over contexts; give contexts=\[\.\.\.\], or leave"):
            ask(QUESTION, params(), pooling=pooling)


def test_covers_that_differ_are_refused_where_exact_ones_are_asked_for(model):
    joined = NBCE(template="{context}{question}")  # tokens of the context reach the question's end
    ask = {"contexts": ["x = 1", "def f(x): "], "pooling": joined}
    with pytest.raises(rw.ConfigError, match=r"other covers after contexts\[1\] .*longer.*continuation='auto'"):
        model.generate("se", params(continuation="exact"), **ask)
    assert model.generate("se", params(continuation="auto"), **ask).healing is None
    assert model.generate("import nump", params(continuation="exact"), **ask).healing is not None
    assert model.generate("why?", params(continuation="exact"), **ask).healing is None, "no token passes the end"


def test_a_context_that_is_too_long_is_named(tiny_folder):
    short = rw.load(tiny_folder)
    with pytest.raises(rw.ContextOverflow, match=r"contexts\[1\] with the question: .*rw.windows"):
        short.generate(QUESTION, params(), contexts=[CONTEXTS[0], CONTEXTS[2] * 9])
    parts = rw.windows(CONTEXTS[2] * 9, short.tokenizer, tokens=128)
    assert short.generate(QUESTION, params(), contexts=parts).sources


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "enthropy"}, "unknown pooling 'enthropy'. Did you mean 'entropy'"),
        ({"beta": -1}, "beta -1 must be 0 or more"),
        ({"top_p": 0}, "top_p 0 must be above 0"),
        ({"stickiness": math.inf}, "stickiness inf"),
        ({"template": "{question}"}, "must hold {context} once"),
        ({"template": "{context}{context}{question}"}, "must hold {context} once"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(rw.ConfigError, match=message):
        NBCE(**fields)

"""Retrieval prompts: they fit, hold the needle where the row says, and come out the same each time."""

import hashlib
import random
import re

import pytest
from small_tokenizers import byte_fallback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import ropewalk as rw
from ropewalk.evals.data import Text, load_text
from ropewalk.evals.retrieval import lookup_tasks
from ropewalk.evals.retrieval.cells import rebuild
from ropewalk.evals.retrieval.haystack import (
    NOISE_LINE,
    WORDS_VERSION,
    all_words,
    boundary,
    drawn_anew,
    noise,
    sentences,
    stretch,
    with_needles,
)
from ropewalk.evals.retrieval.lookup_tasks import Needles
from ropewalk.evals.retrieval.task import FORM, Draft, Place, answer_ids, assemble, encode, match_all, match_first
from ropewalk.evals.retrieval.tasks import RULER, SUITES, TASKS

LENGTH = 8_000  # every task fits, even where a byte is a token


def story(count, seed=0):
    """Sentences of many lengths."""
    rng = random.Random(seed)
    nouns = ["river", "stone", "garden", "letter", "window", "soldier", "morning", "harbour"]
    made = (" ".join(rng.choices(nouns, k=rng.randint(3, 20))).capitalize() + "." for _ in range(count))
    return " ".join(made) + "\n"


STORY = Text(name="story", documents=(story(700), story(300, seed=1)), sha256="ab" * 32)


def byte_tokenizer():
    """A token a byte, with a start token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<s>"])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def sticky_tokenizer():
    """Merges the ends of words with the blank behind them, so that a prompt's end and its answer become one token."""
    blank = "Ġ"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(end, blank) for end in "se:"]
    vocab = {c: i for i, c in enumerate([*letters, *(end + blank for end, _ in merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


FEW_ANSWERS = {"many-shot", "latent-list", "needle-meaning", *(f"facts-noise-{needed}" for needed in (1, 2, 3))}
"""Tasks whose trials may have equal answers."""

DIGESTS = {
    "passkey": "a392c4b5",
    "niah": "f463a831",
    "kv": "0109f55f",
    "niah_single_1": "00d65308",
    "niah_single_2": "77b593cd",
    "niah_single_3": "ff9ef6a3",
    "niah_multikey_1": "4552bc25",
    "niah_multikey_2": "cd9d56cf",
    "niah_multikey_3": "117fc2ac",
    "niah_multivalue": "d3d64662",
    "niah_multiquery": "25d3f565",
    "vt": "aa4bd37c",
    "cwe": "fa43a46b",
    "fwe": "1e789342",
    "many-shot": "cbfad721",
    "ngram-copy": "c74ec409",
    "latent-list": "c393a66b",
    "facts-noise-1": "3041a0ed",
    "facts-noise-2": "df7cc00b",
    "facts-noise-3": "aa008291",
    "needle-meaning": "bdc06595",
}
"""Of the prompt and answer of each task."""

MAKERS = {
    "bytes": lambda folder: byte_tokenizer(),
    "tiny": lambda folder: AutoTokenizer.from_pretrained(folder),
    "sentencepiece": lambda folder: PreTrainedTokenizerFast(tokenizer_object=byte_fallback("the gras ", 0)),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tiny_folder):
    return MAKERS[request.param](tiny_folder)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def place(task, length=LENGTH, depth=0.3):
    return Place(context=length, depth=depth if task.has_depth else None, text=STORY if task.needs_text else None)


def unit_tokens(task, tokenizer):
    """Tokens of the longest unit, at most."""
    if task.needs_text:
        return max(len(encode(sentence, tokenizer)) for sentence in sentences(STORY)) + 3
    longest = {
        "kv": "0a1b2c3d" * 9 + NOISE_LINE,
        "cwe": "1234. " + "representative " * 3,
        "fwe": " abcdef " * 3,
        "latent-list": "other = [10, 20, 30]\nuninteresting counterintelligence",
        "ngram-copy": "- counterintelligence\n" * 2,
        "many-shot": "incompetent screwdriver: X\n" * 2,
    }
    return len(encode(longest.get(task.name, NOISE_LINE * 2), tokenizer)) * (30 if task.name == "cwe" else 1)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_the_length_and_leave_room_for_the_answer(name, tokenizer):
    task = TASKS[name]
    trial = assemble(task, tokenizer, place(task), seed=1)
    assert trial.new_tokens >= max(task.new_tokens, len(trial.answer_ids))
    total = len(trial.prompt_ids) + trial.new_tokens
    assert LENGTH - unit_tokens(task, tokenizer) < total <= LENGTH
    assert trial.prompt_ids == encode(trial.prompt, tokenizer)
    whole = tokenizer.decode(trial.prompt_ids + trial.answer_ids, skip_special_tokens=True)
    assert whole.endswith(trial.prompt[-20:] + " " + trial.target)
    assert task.mark(f" {trial.target}.", trial.answers) == 1
    assert task.mark(" nothing of the kind", trial.answers) == 0


def test_the_answer_is_tokenised_behind_its_prompt_or_alone(tiny):
    draft = Draft(prompt="The pass key is", answers=("12345",), target=" 12345")
    whole = encode(draft.prompt + draft.target, tiny)
    assert encode(draft.prompt, tiny) + answer_ids(draft.prompt, draft.target, tiny) == whole
    sticky = sticky_tokenizer()
    before = encode(draft.prompt, sticky)
    assert encode(draft.prompt + draft.target, sticky)[: len(before)] != before
    assert sticky.decode(before + answer_ids(draft.prompt, draft.target, sticky)) == draft.prompt + draft.target


@pytest.mark.parametrize(
    "name", ["passkey", "niah", "kv", "niah_single_1", "niah_single_3", "niah_multikey_3", "ngram-copy"]
)
@pytest.mark.parametrize("depth", [0, 1])
def test_the_needle_stands_at_the_recorded_depth(name, depth, tokenizer):
    task = TASKS[name]
    trial = assemble(task, tokenizer, place(task, 5000, depth), seed=2)
    begins = {"passkey": "The pass key is ", "kv": '"', "ngram-copy": "- "}.get(name, "One of the special magic ")
    after = tokenizer.decode(trial.prompt_ids[trial.needle :]).lstrip()
    assert after.startswith(begins)
    assert trial.answers[0] in after[:200]
    before = tokenizer.decode(trial.prompt_ids[: trial.needle])
    assert trial.answers[0] not in before
    assert trial.depth == trial.needle / len(trial.prompt_ids)
    if task.has_depth:
        assert trial.depth == pytest.approx(depth, abs=0.13)  # the instruction and the question lie around the hay


@pytest.mark.parametrize("name", ["niah", *(name for name in SUITES[RULER] if name.startswith("niah"))])
def test_keys_and_values_are_said_where_they_should_be_and_nowhere_else(name, tiny):
    for seed in range(3):
        task = TASKS[name]
        trial = assemble(task, tiny, place(task, 4000), seed)
        said = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+?)\.(?=\s)", trial.prompt)
        asked = trial.prompt.partition("What ")[2]
        assert all(trial.prompt.count(value) == 1 for value in trial.answers)
        keys = {key for key, value in said if value in trial.answers}
        assert all(key in asked for key in keys)
        counted = sum(key == known for key in keys for known, _ in said)
        assert counted == len(trial.answers)
        if getattr(task, "hay", "") != "needles":
            assert len(said) == task.keys * task.values
            hay = re.sub(r"One of the special magic \w+ for .+? is: \S+?\.\s", "", trial.prompt.partition("What ")[0])
            assert not any(part in hay for pair in said for part in pair)


def test_a_key_that_is_in_the_text_is_drawn_again(monkeypatch, tiny):
    drawn = iter(["stone", "RIVER", "quiet-lantern"])
    monkeypatch.setitem(lookup_tasks._KINDS, "words", lambda random: next(drawn, "other-word"))
    draft = TASKS["niah"].draft(random.Random(0), 50, place(TASKS["niah"]))
    assert "quiet-lantern" in draft.prompt
    with pytest.raises(rw.DataError, match="contains every key"):
        drawn_anew(lambda: "stone", [], STORY)
    assert drawn_anew(iter(["big-catfish", "dog"]).__next__, ["catfish"]) == "dog"


def test_hay_that_holds_a_key_is_caught(monkeypatch):
    monkeypatch.setattr(lookup_tasks, "drawn_anew", lambda draw, taken, text=None: "stone")
    with pytest.raises(AssertionError, match="haystack contains a key"):
        TASKS["niah"].draft(random.Random(0), 50, place(TASKS["niah"]))


@pytest.mark.parametrize("name", TASKS)
def test_the_same_trial_comes_out_the_same_and_every_other_differs(name, tiny):
    task, length = TASKS[name], 4000
    first = assemble(task, tiny, place(task, length), 7)
    assert assemble(task, tiny, place(task, length), 7) == first
    others = [assemble(task, tiny, place(task, length), 8), assemble(task, tiny, place(task, length - 1), 7)]
    if task.has_depth:
        others.append(assemble(task, tiny, place(task, length, depth=0.31), 7))
    if name in FEW_ANSWERS:
        assert len({trial.sha256 for trial in (first, *others)}) == 1 + len(others)
    else:
        assert all(not {*other.answers} & {*first.answers} for other in others)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_of_the_first_form_stay_what_they_are(name):
    """A prompt that changes needs another `FORM`, or rows of two kinds are compared."""
    if WORDS_VERSION != "wonderwords 3.0.1":
        pytest.skip("other words, other prompts; the recipe says so")
    draft = TASKS[name].draft(random.Random(0), 100, place(TASKS[name]))
    digest = hashlib.sha256((draft.prompt + draft.target).encode()).hexdigest()
    assert (FORM, digest[:8]) == (1, DIGESTS[name])


@pytest.mark.parametrize("name", ["passkey", "niah", "niah_single_1", "cwe"])
def test_rebuild_gives_the_prompt_of_a_row(name, tiny):
    task = TASKS[name]
    where = place(task)
    trial = assemble(task, tiny, where, 3)
    row = {
        "task": name,
        "context": LENGTH,
        "depth": where.depth,
        "seed": 3,
        "model": "tiny",
        "text": "story",
        "text_sha256": STORY.sha256,
        "prompt_sha256": trial.sha256,
        **task.settings,
    }
    assert rebuild(row, tiny, STORY) == trial
    with pytest.raises(rw.DataError, match="the rebuilt prompt has sha256"):
        rebuild(row | {"seed": 4}, tiny, STORY)
    with pytest.raises(rw.DataError, match="was measured with"):
        rebuild(row | {"form": 0}, tiny, STORY)
    with pytest.raises(rw.DataError, match="has no prompt"):
        rebuild({"task": "ppl"}, tiny)
    if task.needs_text:
        with pytest.raises(rw.DataError, match="the row was measured on cd"):
            rebuild(row | {"text_sha256": "cd"}, tiny, STORY)


def test_lengths_that_cannot_be_had_are_refused(tiny):
    with pytest.raises(rw.DataError, match=r"passkey at 64: the shortest prompt and its answer take \d+ tokens"):
        assemble(TASKS["passkey"], tiny, Place(context=64, depth=0.5), 0)
    with pytest.raises(rw.DataError, match="the 1000 sentences or words are only"):
        assemble(TASKS["niah"], tiny, place(TASKS["niah"], 100_000), 0)
    with pytest.raises(rw.DataError, match="give a longer text"):
        short = Text(name="short", documents=("One. Two. Three.",), sha256="")
        assemble(TASKS["niah"], tiny, Place(context=1000, depth=0.5, text=short), 0)


@pytest.mark.parametrize(
    "written, answers, score",
    [
        (" 12345. And", ("12345",), 1),
        (": **12345**", ("12345",), 1),
        (" 123456", ("12345",), 0),
        (" 54321, no, 12345", ("12345",), 0),
        (" the number", ("12345",), 0),
        (' "AB3-c"', ("ab3-c",), 1),
    ],
)
def test_match_first(written, answers, score):
    assert match_first(written, answers) == score


def test_match_all_is_the_share_that_occurs_in_any_case():
    assert match_all("1. Alpha 2. gamma", ["alpha", "beta", "GAMMA", "delta"]) == 0.5
    assert match_all("123456", ["12345"]) == 1  # as RULER has it
    assert match_all("", ["a"]) == 0


def test_ruler_has_its_published_sizes(tiny):
    def draft(name, length=8192, units=400):
        return TASKS[name].draft(random.Random(1), units, place(TASKS[name], length))

    assert len(SUITES[RULER]) == 11
    assert len(draft("niah_multivalue").answers) == len(draft("niah_multiquery").answers) == 4
    assert re.fullmatch(r"\d{7}", draft("niah_single_2").answers[0])
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", draft("niah_single_3").answers[0])
    chain = draft("vt")
    value = re.search(r"VAR (\w{5}) = (\d{5})", chain.prompt)
    assert chain.answers[0] == value[1]
    for before, name in zip(chain.answers, chain.answers[1:], strict=False):
        assert f"VAR {name} = VAR {before}\n" in chain.prompt
    for length, often, seldom in ((8192, 30, 3), (2048, 6, 1)):
        listed = re.findall(r"\d+\. (\D+?)(?= \d+\.|\n)", draft("cwe", length).prompt.rpartition("Below")[2])
        counts = {word: listed.count(word) for word in listed}
        assert {word for word, count in counts.items() if count == often} == {*draft("cwe", length).answers}
        assert sorted({*counts.values()}) == [seldom, often]
        assert len(counts) == 400
    coded = draft("fwe", units=3000)
    coded_words = re.findall(r"\b[a-z]{6}\b", coded.prompt.partition("words. ")[2].partition("\n")[0])
    top = sorted({*coded_words}, key=coded_words.count, reverse=True)
    assert tuple(top[:3]) == coded.answers
    assert coded_words.count(top[0]) == int(3000 / 4 / (3.141592653589793**2 / 6))
    assert coded_words.count(top[2]) > coded_words.count(top[3])


def test_hay():
    units = sentences(Text(name="t", documents=("One two.  Three!\nFour five\nsix? 七。八",), sha256=""))
    assert units == ("One two.  Three!\n", "Four five\n", "six? ", "七。 ", "八 ")
    assert "".join(units).replace(" ", "") == "Onetwo.Three!\nFourfive\nsix?七。八"
    assert boundary(["aaaa", "b", "ccccc"], 0) == 0
    assert boundary(["aaaa", "b", "ccccc"], 0.42) == 1
    assert boundary(["aaaa", "b", "ccccc"], 0.5) == 2
    assert boundary(["aaaa", "b", "ccccc"], 1) == 3
    assert with_needles(["a ", "b ", "c "], [(0, "X "), (2, "Y "), (2, "Z ")]) == ("X a b Y Z c", [0, 6, 8])
    for places in ([2, 1], [-1], [4]):  # the first gave "a b N M b c"
        with pytest.raises(rw.ConfigError, match="in the order of the text, from 0 to 3 units"):
            with_needles(["a ", "b ", "c "], [(place, "N ") for place in places])
    for depth in (-0.1, 1.1, float("nan")):
        with pytest.raises(rw.ConfigError, match="must lie between 0"):
            boundary(["aaaa", "b"], depth)


@pytest.mark.parametrize("answers", ["12345", ()])
def test_the_answers_of_a_draft_are_several_strings(answers):
    """Of one string, every digit counted as an answer."""
    with pytest.raises(AssertionError, match="answers are several strings"):
        Draft(prompt="The key is", answers=answers, target=" 12345")
    assert stretch(STORY, 999, 2) == [sentences(STORY)[999], sentences(STORY)[0]]
    assert noise(6)[5] == noise(1)[0]


def test_words_are_many_and_sorted():
    assert len(all_words()) > 8000
    assert list(all_words()) == sorted({*all_words()})
    assert Needles(name="x").settings["words"].startswith("wonderwords ")


@pytest.fixture(scope="module")
def real():
    from ropewalk.engine.checkpoints.source import resolve

    return AutoTokenizer.from_pretrained(resolve("smollm2-135m"))


@pytest.mark.model
@pytest.mark.parametrize("name", TASKS)
def test_real_prompts(name, real):
    task = TASKS[name]
    text = load_text("kjv") if task.needs_text else None
    trial = assemble(task, real, Place(context=4096, depth=0.5 if task.has_depth else None, text=text), 0)
    assert 3800 < len(trial.prompt_ids) + trial.new_tokens <= 4096
    assert encode(trial.prompt + " " + trial.target, real)[: len(trial.prompt_ids)] == trial.prompt_ids
    assert real.decode(trial.answer_ids).strip(' "') == trial.target.strip('"')

"""Facts among the sentences of a text against a reader of them, and needles that share no word with their question."""

import random
import re
from itertools import combinations

import pytest

import ropewalk as rw
from ropewalk.evals.data import Text
from ropewalk.evals.retrieval import fact_tasks
from ropewalk.evals.retrieval.fact_tasks import NAMES, PAIRS, PLACES, THINGS, match_first_of
from ropewalk.evals.retrieval.task import Place
from ropewalk.evals.retrieval.tasks import TASKS

STORY = Text(name="story", documents=("A ship went out to sea. It had a crew of nine. " * 300,), sha256="cd" * 32)
FACT = re.compile(r"([A-Z][a-z]+) (?:(?:went|moved|walked) to the ([a-z]+)|(picked up|put down) the ([a-z]+))\.")


def drafts(name, count=40, depth=None):
    return [
        TASKS[name].draft(random.Random(seed), 40, Place(context=9, depth=depth, text=STORY)) for seed in range(count)
    ]


def answer(facts, question):
    """What a reader of the facts says; None if they do not say it."""
    at, carried_by, been = {}, {}, {}
    for person, place, act, thing in facts:
        if place:
            at[person] = place
            for carried, who in carried_by.items():
                if who == person:
                    been[carried].append(place)
        elif act == "picked up":
            carried_by[thing] = person
            been[thing] = [at[person]] if person in at else []
        else:
            carried_by[thing] = None
            been.setdefault(thing, [at[person]] if person in at else [])
    if asked := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        places = been.get(asked[1], [])
        found = places.index(asked[2]) if asked[2] in places else 0
        return places[found - 1] if found else None
    if asked := re.fullmatch(r"Where is the (\w+)\?", question):
        return been[asked[1]][-1] if been.get(asked[1]) else None
    return at.get(re.fullmatch(r"Where is (\w+)\?", question)[1])


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_a_reader_of_the_facts_needs_as_many_as_the_task_says(needed):
    for draft in drafts(f"facts-noise-{needed}"):
        body, _, question = draft.prompt.partition("\nQuestion: ")
        facts = FACT.findall(body)
        assert len(facts) == 14
        question = question.removesuffix(" Answer: In the")
        assert draft.answers == (answer(facts, question),)
        first = next(n for n, found in enumerate(FACT.finditer(body)) if found.start() == draft.needle)
        enough = [
            subset
            for size in range(1, needed + 1)
            for subset in combinations(range(len(facts)), size)
            if answer([facts[n] for n in subset], question) == draft.answers[0]
        ]
        assert {len(subset) for subset in enough} == {needed}
        assert first in [subset[0] for subset in enough]


@pytest.mark.parametrize("name", ["facts-noise-3", "needle-meaning"])
def test_prompts_may_be_as_short_as_one_sentence_of_the_text(name):
    draft = TASKS[name].draft(random.Random(0), TASKS[name].least, Place(context=9, depth=0.5, text=STORY))
    assert draft.prompt.count("a crew of nine") + draft.prompt.count("A ship went") == 1


def test_the_text_has_none_of_the_words():
    for name, known in (("facts-noise-3", f"{NAMES} {THINGS} {PLACES}"), ("needle-meaning", NAMES)):
        prompt = drafts(name, count=1, depth=0.5)[0].prompt
        assert not any(word in STORY.documents[0] for word in known.split() if word in prompt)
    book = Text(name="book", documents=("Kevin lives. " + "Natasha sings. " * 60,), sha256="")
    made = fact_tasks.fresh(random.Random(0), "Kevin Natasha Dmitri", 1, book)
    assert made == ["Dmitri"]
    with pytest.raises(rw.DataError, match="book contains every key"):
        fact_tasks.fresh(random.Random(0), "Kevin Natasha Dmitri", 2, book)


def test_hay_that_holds_a_name_is_caught(monkeypatch):
    monkeypatch.setattr(fact_tasks, "fresh", lambda random, words, count, text: ["crew"] * count)
    with pytest.raises(AssertionError, match="the haystack has one of"):
        drafts("needle-meaning", count=1, depth=0.5)


GRAMMAR = (
    "a an the and or of to in on at by for with from near through under out down up over after before between since "
    "who is are was has have had can not never does do be it its only every each other others twice this that"
)


def stems(sentence):
    """Words without those of grammar, cut to what their forms share."""
    words = {*re.findall(r"[a-z]+", sentence.lower())}.difference(GRAMMAR.split())
    return {re.sub(r"(ations?|ings?|ers?|ors?|ies|ed|es|s|y|e)$", "", word)[:5] for word in words}


def test_no_needle_shares_a_word_with_a_question():
    assert 20 <= len(PAIRS) <= 40
    assert stems("Bakers bake; the bakery is baking") == {"bak", "baker"}
    for needle, _ in PAIRS:
        assert needle.startswith("{} ")
        for _, question in PAIRS:
            assert not stems(needle.removeprefix("{} ")) & stems(question), (needle, question)
    assert len({question for _, question in PAIRS}) == len(PAIRS)


def test_four_persons_are_told_of_and_one_is_asked_for():
    for depth in (0, 0.5, 1):
        for draft in drafts("needle-meaning", count=10, depth=depth):
            named = [name for name in NAMES.split() if re.search(rf"\b{name}\b", draft.prompt)]
            assert len(named) == 4
            question = draft.prompt.partition("\nQuestion: ")[2].partition(" Answer")[0]
            (needle,) = [needle for needle, asked in PAIRS if asked == question]
            assert draft.prompt[draft.needle :].startswith(needle.format(draft.answers[0]))
            assert draft.needle / len(draft.prompt) == pytest.approx(depth, abs=0.2)


@pytest.mark.parametrize(
    ("written", "score"),
    [(" kitchen.", 1), (" big Kitchen, not the hallway", 1), (" hallway, no, kitchen", 0), (" kitchens", 0), ("", 0)],
)
def test_match_first_of(written, score):
    assert match_first_of(written, ("kitchen",), PLACES) == score

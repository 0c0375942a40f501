"""Tasks that continue a pattern of their prompt, and the choice of the likeliest answer."""

import random
import re

import pytest
import torch
from drawings import texts
from served import serving

import ropewalk as rw
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.models.served import ServedModel
from ropewalk.evals.reports.retrieval_plots import plot_curve, plot_heat
from ropewalk.evals.reports.tables import score_grids
from ropewalk.evals.retrieval import pattern_tasks
from ropewalk.evals.retrieval.cells import cells
from ropewalk.evals.retrieval.score import score_groups
from ropewalk.evals.retrieval.task import Draft, Place, Trial, assemble
from ropewalk.evals.retrieval.tasks import TASKS
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import parse


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder, max_length=2**31, compile=False)


def drafts(name, units=300, count=20):
    return [TASKS[name].draft(random.Random(seed), units, Place(context=1000, depth=0.5)) for seed in range(count)]


def test_a_kind_has_one_label_and_the_last_noun_is_new():
    kind_of = {noun: number for number, kind in enumerate(pattern_tasks._KINDS) for noun in kind.split()}
    assert len(kind_of) == sum(len(kind.split()) for kind in pattern_tasks._KINDS), "a noun is of two kinds"
    positions = set()
    for draft in drafts("many-shot"):
        *lines, question = draft.prompt.splitlines()
        examples = [re.fullmatch(r"[a-z]+ ([a-z]+): ([A-Z])", line).groups() for line in lines]
        label_of = {kind_of[noun]: label for noun, label in examples}
        assert {(kind_of[noun], label) for noun, label in examples} == {*label_of.items()}
        assert len({*label_of.values()}) == len(label_of) == 4
        noun = question.split()[1].strip(":")
        assert noun not in {noun for noun, _ in examples}
        assert draft.answers == (label_of[kind_of[noun]],)
        assert draft.choices == tuple(f" {label}" for label in sorted(label_of.values()))
        positions.add(draft.choices.index(draft.target))
    assert positions == {0, 1, 2, 3}


def test_an_example_of_the_question_is_caught(monkeypatch):
    monkeypatch.setattr(pattern_tasks, "_KINDS", ("otter otter", "pizza pizza", "harp harp", "tram tram"))
    with pytest.raises(AssertionError, match="an example has the noun"):
        drafts("many-shot", count=1)


def test_a_passage_of_words_stands_once_and_its_beginning_at_the_end():
    for draft in drafts("ngram-copy"):
        words = draft.prompt.replace("-", "").split()
        passage = [*words[-4:], *draft.answers[0].split("\n- ")]
        assert len({*passage}) == 16
        start = draft.prompt[: draft.needle].count("\n")
        assert words[start : start + 16] == passage
        assert all(words.count(word) == (2 if word in passage[:4] else 1) for word in passage)
        assert 0.4 < start / len(words) < 0.6


def test_words_of_a_copy_count_until_the_first_mistake():
    task, answers = TASKS["ngram-copy"], ("ant bee cow dog",)
    assert task.mark(" ant bee cow dog eel", answers) == 1
    assert task.mark(" Ant, bee.\ncow fly", answers) == 3 / 4
    assert task.mark(" bee cow dog", answers) == 0
    assert task.mark(" antbee cow dog", answers) == task.mark("", answers) == 0


def test_hay_that_holds_a_word_of_the_passage_is_caught(monkeypatch):
    monkeypatch.setattr(random.Random, "choices", lambda self, words, k: ["stone"] * k)
    monkeypatch.setattr(random.Random, "sample", lambda self, words, k: ["stone"] * k)
    with pytest.raises(AssertionError, match="haystack contains a word of"):
        drafts("ngram-copy", count=1)


def trial(model, choices, right):
    prompt = "import os\nimport sys\n\n\ndef walk(top):\n    for name in os.listdir("
    ids = [tuple(model.vocabulary.encode(choice)) for choice in choices]
    return Trial(
        prompt=prompt,
        prompt_ids=model.vocabulary.encode(prompt),
        answer_ids=[*ids[right]],
        answers=(choices[right],),
        target=choices[right],
        new_tokens=8,
        needle=None,
        choices=tuple(map(list, ids)),
    )


CHOICES = (" self", " top)", " the quick brown fox", " path.join(a)")


@pytest.mark.parametrize("rewinds", [True, False])
@pytest.mark.parametrize("spec", ["none", "rerope:100"])
def test_choices_have_the_log_probabilities_of_plain_transformers(model, monkeypatch, rewinds, spec):
    if not rewinds:
        monkeypatch.setattr("ropewalk.evals.models.local.can_rewind", lambda cache: False)
    asked = trial(model, CHOICES, 1)
    assert {len(ids) for ids in asked.choices} > {1} or len({len(ids) for ids in asked.choices}) > 2
    model.rope = spec
    output = LocalModel(model).run_trial(asked)
    model.rope = None
    expected = []
    with rw.patch(model.hf, spec), torch.inference_mode():
        for ids in asked.choices:
            whole = torch.tensor([asked.prompt_ids + ids])
            laws = model.hf(whole, use_cache=False).logits[0].double().log_softmax(-1)
            start = len(asked.prompt_ids)
            expected.append(sum(float(laws[start + n - 1, token]) for n, token in enumerate(ids)))
    assert output.choice_logprobs == pytest.approx(expected, abs=5e-4)
    assert sum(output.logprobs) == pytest.approx(expected[1], abs=5e-4)
    alone = LocalModel(model).run_trial(trial(model, CHOICES[1:2], 0))
    assert output.written == LocalModel(model).run_trial(trial(model, CHOICES, 0)).written == alone.written


def test_the_choice_and_its_margin(model):
    asked = trial(model, CHOICES, 1)
    assert asked.choose([-3.0, -1.0, -2.0, -5.0]) == (1, 1)
    assert asked.choose([-3.0, -2.5, -2.0, -5.0]) == (0, -0.5)
    assert asked.choose([-2.0, -2.0, -2.0, -2.0]) == (1 / 4, 0)
    assert asked.choose([-3.0, -2.0, -2.0, -5.0]) == (1 / 2, 0)
    assert asked.choose([float("nan")] * 4)[0] == 0
    assert asked.choose([-3.0, float("nan"), -2.0, -5.0])[0] == 0
    with pytest.raises(AssertionError, match="' d' is not one of"):
        Draft(prompt="a", answers=("d",), target=" d", choices=(" b", " c"))
    with pytest.raises(AssertionError, match="must follow after a blank"):
        Draft(prompt="a", answers=("b",), target=" b", choices=(" b", "c"))


def test_choices_and_their_answer_fit_into_the_length(model):
    class Long(type(TASKS["many-shot"])):
        def draft(self, random, units, place):
            return Draft(prompt="word " * units + "end", answers=("a",), target=" a", choices=(" a", " bird" * 40))

    made = assemble(Long(), model.tokenizer, Place(context=500), 0)
    assert made.new_tokens == len(made.choices[1]) > 40
    assert len(made.prompt_ids) + made.new_tokens <= 500


def measure(measured, run, trials=3):
    planned = cells(measured, [TASKS["many-shot"]], [parse("none")], contexts=[400], trials=trials)
    return [row for cell in planned for row in cell.measure(measured, run, lambda past, count: None)]


def test_a_server_gives_the_same_choices_and_one_without_log_probabilities_is_refused(model, tiny_folder, tmp_path):
    here = measure(LocalModel(model), Run(tmp_path / "here"))
    for tells in ("prompt_logprobs", "echo"):
        with serving(model, tells=tells) as server:
            there = measure(ServedModel(str(tiny_folder), server.url), Run(tmp_path / tells))
        for a, b in zip(here, there, strict=True):
            assert a["choice_margin"] == pytest.approx(b["choice_margin"], abs=5e-4)
            assert (a["correct"], a["generated"]) == (b["correct"], b["generated"])
    with serving(model, tells="nothing") as server, pytest.raises(rw.ConfigError, match="choose the likeliest"):
        measure(ServedModel(str(tiny_folder), server.url), Run(tmp_path / "refused"))


def test_a_uniform_model_scores_the_chance(model):
    """Exactly where all labels have equally many tokens, else on average: the likeliest label is then the shortest."""
    scores, equal = [], 0
    for seed in range(150):
        asked = assemble(TASKS["many-shot"], model.tokenizer, Place(context=300), seed)
        scores.append(asked.choose([-7.0 * len(ids) for ids in asked.choices])[0])
        if len({len(ids) for ids in asked.choices}) == 1:
            assert scores[-1] == 0.25
            equal += 1
    assert 0 < equal < 150
    assert sum(scores) / 150 == pytest.approx(0.25, abs=0.06)


def test_the_chance_is_told(model, tmp_path):
    rows = measure(LocalModel(model), Run(tmp_path))
    (group,) = score_groups(rows)
    assert group.chance == 0.25
    right, _ = score_grids(group)
    assert right.note.startswith("Share of the trials whose chosen answer is right;")
    assert right.note.endswith(" A guess scores 25%.")
    for draw in (plot_heat, plot_curve):
        assert "A guess scores 25%." in " ".join(texts(draw(group, tmp_path / "plot")[1]))

"""The program of `latent-list` against Python itself."""

import contextlib
import io
import random
import re
from collections import Counter

import pytest

from ropewalk.evals.retrieval import list_tasks
from ropewalk.evals.retrieval.task import Place
from ropewalk.evals.retrieval.tasks import TASKS

TASK = TASKS["latent-list"]


def draft(seed, units=60):
    return TASK.draft(random.Random(seed), units, Place(context=1000))


def program(prompt):
    lines, _, question = prompt.partition("program.\n\n")[2].partition("\n\nAt the end of the program, ")
    return f"{lines}\nprint({question.removesuffix(' ==')})"


def last_line_of(source):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(source, {})
    return out.getvalue().splitlines()[-1]


def test_python_prints_the_answer():
    kinds = Counter()
    for seed in range(60):
        drafted = draft(seed)
        source = program(drafted.prompt)
        assert last_line_of(source) == drafted.answers[0] == drafted.target[1:]
        *lines, question = source.splitlines()
        assert last_line_of("\n".join([lines[0], question])) != drafted.answers[0]
        kinds[re.sub(r"\d+", "0", question)] += 1
    assert {*kinds} == {f"print({of})" for of in ("items[0:0]", "len(items)", "sum(items)", "min(items)", "max(items)")}


def test_six_operations_change_the_list_and_the_last_one_the_answer():
    for seed in range(60):
        first, calls, question, answer = list_tasks._program(random.Random(seed))
        assert len(calls) == 6
        source = [f"items = {first}\n", *map(str, calls), f"print({question.source})"]
        assert last_line_of("".join(source)) == answer
        del source[-2]
        assert last_line_of("".join(source)) != answer


def test_operations_lie_anywhere_and_fillers_between():
    before = []
    for seed in range(40):
        filled, empty = program(draft(seed).prompt), program(draft(seed, units=0).prompt)
        lines = empty.splitlines()
        assert len(lines) == 8
        assert filled.count("\n") >= 67
        left = iter(filled.splitlines())
        assert all(line in left for line in lines), "the operations come in another order"
        before.append(filled.index(lines[1]) / len(filled))
    assert min(before) < 0.1 < 0.3 < max(before)


def test_a_filler_that_changes_the_list_is_caught(monkeypatch):
    seed = next(n for n in range(99) if list_tasks._program(random.Random(n))[2].source == "len(items)")
    monkeypatch.setattr(list_tasks, "_filler", lambda random: ("", [list_tasks._Operation("append", (5,))]))
    with pytest.raises(AssertionError, match="a filler changes the answer"):
        draft(seed)


def test_no_answer_is_easy_to_guess():
    answers = Counter()
    for seed in range(2000):
        *_, question, answer = list_tasks._program(random.Random(seed))
        answers[re.sub(r"\d+", "0", question.source), answer] += 1
    best = Counter()
    for (question, _), count in answers.items():
        best[question] = max(best[question], count)
    assert sum(best.values()) / 2000 < 0.15


@pytest.mark.parametrize(
    ("written", "answer", "score"),
    [
        (" 214.", "214", 1),
        (" the sum, 214", "214", 1),
        (" 2141", "214", 0),
        (" 214", "14", 0),
        ("\n[3,4, 5]\n", "[3, 4, 5]", 1),
        (" [3, 4]", "[3, 4, 5]", 0),
        (" 3, 4, 5", "[3, 4, 5]", 0),
        (" nothing", "3", 0),
    ],
)
def test_marks(written, answer, score):
    assert TASK.mark(written, (answer,)) == score

"""Facts in long documents: the documents themselves, and their questions asked in every way of reading."""

import dataclasses
import itertools

import pytest
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.engine.session import Session
from ropewalk.evals.contexts.facts import Document, FactsCell, cells, question
from ropewalk.evals.contexts.report import facts_markdown, facts_rows, plot_facts, way_scores
from ropewalk.evals.data import Text, load_text
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.runs.result import Run

HAY = Text(
    name="hay",
    documents=("".join(f"Sentence {n} of the hay is here. " for n in range(4000)),),
    sha256="0" * 64,
)


@pytest.fixture(scope="module")
def subject(tiny_folder):
    return LocalModel(rw.load(tiny_folder, max_length=2**31))


def count(text):
    return len(text.split())


def test_a_document_is_as_long_as_asked_and_holds_every_fact_once():
    document = Document.draw(HAY, count, 500, 8, seed=3)
    assert 480 < count(document.text) <= 500
    for key, value in document.facts:
        assert document.text.count(f"The secret number of the {key} is {value}. ".strip()) == 1
        assert document.text.count(value) == document.text.count(key) == 1
    assert document == Document.draw(HAY, count, 500, 8, seed=3) != Document.draw(HAY, count, 500, 8, seed=4)


def test_documents_that_do_not_fit_are_refused(subject):
    with pytest.raises(rw.DataError, match=r"16 facts and a sentence takes 1\d\d tokens .* and there is room for 130"):
        Document.draw(HAY, count, 130, 16, seed=0)
    for tokens in (170, 180, 500):  # a fact has nine words or ten
        assert count(Document.draw(HAY, count, tokens, 16, seed=0).text) <= tokens
    with pytest.raises(rw.DataError, match="give a longer length"):
        cells(subject, HAY, [rw.parse("none")], contexts=[320, 128], parts=[2], documents=1, questions=8)


def test_a_text_shorter_than_the_document_is_refused(subject):
    short = dataclasses.replace(HAY, documents=(HAY.documents[0][:500],))
    with pytest.raises(rw.DataError, match=r"has only \d+ tokens with the facts, and 450 are needed; .* longer text"):
        Document.draw(short, count, 450, 4, seed=0)
    with pytest.raises(rw.DataError, match="longer text"):  # before anything is measured
        cells(subject, short, [rw.parse("none")], contexts=[300, 1024], parts=[5], documents=1, questions=1)


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 16])
def test_parts_are_the_document_in_nearly_equal_pieces(parts):
    document = Document.draw(HAY, count, 2000, 16, seed=0)
    texts = document.parts(parts)
    assert len(texts) == parts
    assert " ".join(texts) == document.text
    assert max(map(count, texts)) - min(map(count, texts)) <= 20


def test_facts_are_spread_evenly():
    document = Document.draw(HAY, count, 4000, 16, seed=1)
    for part, (_, value) in zip(document.parts(16), document.facts, strict=True):
        position = document.text.index(value) / len(document.text)
        assert document.parts(16).index(part) / 16 - 0.02 < position < (document.parts(16).index(part) + 1) / 16 + 0.02


class Knowing:
    """A model's place taken by one that reads: it answers with the number behind the key, wherever its text has it."""

    def __init__(self, monkeypatch, model):
        self.read = []
        monkeypatch.setattr(model, "generate", self.generate)
        monkeypatch.setattr(Session, "generate", lambda session, *asked: self.from_session(session, *asked))

    def answer(self, text, asked):
        self.read.append(text)
        key = asked.partition("number of the ")[2].partition("?")[0]
        return text.partition(f"number of the {key} is ")[2][:5] if f"number of the {key} is " in text else "none"

    def generate(self, asked, params, *, contexts, pooling):
        answers = [self.answer(context, asked) for context in contexts]
        best = max(range(len(answers)), key=lambda n: answers[n].isdigit())
        return rw.Completion(text=f" {answers[best]}.", token_ids=[1], finish_reason="stop", usage=None, sources=[best])

    def from_session(self, session, text, params):
        session.text += text
        document, _, asked = session.text.rpartition("\n\n")
        return rw.Completion(text=f" {self.answer(document, asked)}.", token_ids=[1], finish_reason="stop", usage=None)


def test_every_way_reads_what_it_says(subject, monkeypatch, tmp_path):
    planned = cells(
        subject, HAY, [rw.parse("none"), rw.parse("yarn:4")], contexts=[800], parts=[4, 8], documents=2, questions=4
    )
    knowing, run, right = Knowing(monkeypatch, subject.model), Run(tmp_path), {}
    for cell in planned:
        knowing.read.clear()
        rows = cell.measure(subject, run, lambda *_: None)
        right.setdefault((cell.way, cell.parts, str(cell.scaler)), []).extend(row["correct"] for row in rows)
        tokens = [len(subject.tokenizer(text, verbose=False).input_ids) for text in knowing.read]
        if cell.way == "whole":
            assert 680 < min(tokens) <= max(tokens) < 800
        elif cell.way == "cut":
            assert 150 < min(tokens) <= max(tokens) <= 256
        else:
            assert max(tokens) < 800 / cell.parts + 40
            assert all(row["sources"] == [row["question"] * cell.parts // 8] for row in rows)
    assert set(right[("whole", 1, "none")] + right[("parts", 4, "none")] + right[("parts", 8, "none")]) == {1}
    assert 0 < sum(right[("cut", 1, "none")]) < 8  # the last of the facts are in what it reads
    assert all(cell.is_done(run) for cell in planned)
    knowing.read.clear()
    planned[0].measure(subject, run, lambda *_: None)
    assert not knowing.read


def test_a_stopped_cell_goes_on(subject, monkeypatch, tmp_path):
    (cell, *_) = cells(subject, HAY, [rw.parse("none")], contexts=[800], parts=[4], documents=1, questions=4)
    knowing, run = Knowing(monkeypatch, subject.model), Run(tmp_path)
    asked = itertools.count()
    answer = knowing.answer

    def stopped(text, what):
        if next(asked) == 2:
            raise KeyboardInterrupt
        return answer(text, what)

    knowing.answer = stopped
    with pytest.raises(KeyboardInterrupt):
        cell.measure(subject, run, lambda *_: None)
    assert len(run.rows) == 2
    assert len(cell.measure(subject, run, lambda *_: None)) == len(run.rows) == 4
    assert next(asked) == 5


def test_the_real_model_answers_in_every_way(subject, tmp_path):
    planned = cells(subject, HAY, [rw.parse("yarn:4")], contexts=[600], parts=[4], documents=1, questions=2)
    run = Run(tmp_path)
    for cell in planned:
        rows = cell.measure(subject.under(cell.scaler), run, lambda *_: None)
        assert all(isinstance(row["generated"], str) and 0 <= row["correct"] <= 1 for row in rows)
        assert isinstance(cell, FactsCell) and cell.outcome(rows).endswith("of 2")
    scores = way_scores(facts_rows(run.rows))
    assert [score.name for score in scores] == ["read whole, yarn:4", "only its end", "4 parts"]
    assert all(score.trials == 2 and score.low <= score.right <= score.high for score in scores)
    assert facts_markdown(run.rows).count("\n| ") == 4
    assert facts_rows([*run.rows, {"task": "kv"}]) == run.rows


def test_parts_that_do_not_fit_are_refused(subject):
    with pytest.raises(rw.ConfigError, match="2 parts of 600 tokens are longer than the trained length, 256; use 3"):
        cells(subject, HAY, [], contexts=[600], parts=[2, 4], documents=1, questions=2)


def test_the_question_ends_where_the_answer_begins():
    assert question("red rope").endswith("The secret number of the red rope is")


def test_the_command(tiny_folder, held_out_texts, tmp_path):
    out, text = tmp_path / "run", tmp_path / "text.py"
    text.write_text(max(held_out_texts, key=len), encoding="utf-8")
    arguments = ["facts", str(tiny_folder), "--text", str(text), "--lengths", "2x", "--parts", "4", "--documents", "1"]
    arguments += ["--questions", "2", "--rope", "none", "--out", str(out)]
    for _ in range(2):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        assert "4 parts" in done.output
    assert {path.name for path in out.iterdir()} >= {"results.jsonl", "table.md", "facts.png", "facts.svg"}
    assert len(Run(out).rows) == 6
    assert load_text(text).sha256 == Run(out).rows[0]["text_sha256"]
    done = CliRunner().invoke(cli, [*arguments[:2], "--parts", "four"])
    assert isinstance(done.exception, rw.ConfigError)


def facts_row(document, question, **changes):
    row = {"experiment": "facts", "model": "toy", "dtype": "float32", "trained_length": 256, "text": "kjv", "facts": 16}
    row |= {"context": 320, "way": "whole", "parts": 1, "rope": "none", "document": document, "question": question}
    return row | {"correct": 1.0, "seconds": 1.0 + question} | changes


def test_settings_have_tables_and_plots_of_their_own(tmp_path):
    asked = [(0, question) for question in range(4)]
    rows = [facts_row(*fields) for fields in asked]
    for changes in ({"dtype": "int8"}, {"text": "other"}, {"facts": 32}):
        rows += [facts_row(*fields, correct=0.0, **changes) for fields in asked]
    text = facts_markdown(rows)
    assert text.count("| read whole, none | 320 | 100% |") == 1
    assert text.count("| read whole, none | 320 | 0% |") == 3
    for caption in ("16 facts in kjv, toy (int8", "16 facts in other, toy (float32", "32 facts in kjv, toy (float32"):
        assert caption in text
    stems = [path.stem for path in plot_facts(rows, tmp_path / "facts")]
    assert stems == [stem for stem in ("facts", "facts_2", "facts_3", "facts_4") for _ in range(2)]

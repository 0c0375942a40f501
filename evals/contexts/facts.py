"""Facts in a long document, with one question for each. The document is read whole, cut off, or in
pooled parts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any, Literal

from ...engine.model import Model
from ...engine.nbce import NBCE
from ...engine.sampling import SamplingParams
from ...errors import ConfigError, DataError, Setting
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ...tokenizer_tools.encode import prompt_ids, text_ids
from ..data import Text
from ..models.local import LocalModel
from ..models.measured import Advance, MeasuredModel
from ..retrieval.haystack import WORDS_VERSION, boundary, drawn_anew, random_key, sentences, stretch
from ..retrieval.task import match_first
from ..runs.cell import Cell, rope_recipe, shared_recipe
from ..runs.result import Row, Run

Way = Literal["whole", "cut", "parts"]

FORM = 1
"""Version of the documents. It is part of every recipe."""

_PARAMS = SamplingParams(max_new_tokens=16, temperature=0, continuation="off")
_SPARE = 16  # tokens for blanks between document and question, and keys of rare words


@dataclass(frozen=True)
class Document:
    """A haystack of sentences with facts. Each of as many equal stretches has one fact.

    Attributes:
        units: sentences and facts in order, each with the blank after it.
        facts: key and value of each fact, in order.
    """

    units: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]

    @classmethod
    def draw(cls, text: Text, count: Callable[[str], int], tokens: int, facts: int, seed: int) -> Document:
        """The document of a seed: as many sentences of a text as fit, with the facts, into `tokens`
        tokens.

        Raises:
            DataError: the facts and one sentence do not fit, or the text is shorter than `tokens`.
        """
        random = Random(f"facts {FORM} {text.sha256} {facts} {seed}")
        taken: list[str] = []

        def fresh(draw: Callable[[], str]) -> str:
            taken.append(drawn_anew(draw, taken, text))
            return taken[-1]

        pairs = tuple(
            (fresh(lambda: random_key(random)), fresh(lambda: str(random.randrange(10**4, 10**5))))
            for _ in range(facts)
        )
        start, shares = random.randrange(len(sentences(text))), [random.random() for _ in pairs]

        def assembled(hay: int) -> tuple[str, ...]:
            units = stretch(text, start, hay)
            places = [boundary(units, (n + share) / facts) for n, share in enumerate(shares)]
            parts: list[str] = []
            used = 0
            for place, (key, value) in zip(places, pairs, strict=True):
                parts += [*units[used:place], f"The secret number of the {key} is {value}. "]
                used = place
            return (*parts, *units[used:])

        if (least := count("".join(assembled(1)))) > tokens:
            raise DataError(
                f"a document with {facts} facts and a sentence takes {least} tokens with this tokenizer, and there is "
                f"room for {tokens}; give a longer length or fewer questions"
            )
        low, high = 1, min(tokens, len(sentences(text)))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count("".join(assembled(middle))) <= tokens else (low, middle - 1)
        if low == len(sentences(text)):
            raise DataError(
                f"{text.name} has only {count(''.join(assembled(low)))} tokens with the facts, and {tokens} are "
                "needed; give a shorter length or a longer ",
                Setting("text", form="name"),
            )
        return cls(assembled(low), pairs)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.units).rstrip()

    def parts(self, count: int) -> list[str]:
        """The text in `count` parts of about equal length, in whole sentences."""
        borders = [boundary(self.units, n / count) for n in range(count + 1)]
        return ["".join(self.units[a:b]).strip() for a, b in itertools.pairwise(borders)]


def question(key: str) -> str:
    """The question for the value of a key."""
    return f"Question: What is the secret number of the {key}?\nAnswer: The secret number of the {key} is"


@dataclass(frozen=True, kw_only=True)
class FactsCell(Cell):
    """The questions about one document, which is read in one way. Each question gives a row as soon
    as it is answered.

    Args:
        scaler: of "whole"; the other ways use none.
        context: tokens of the document with a question and its answer.
        way: "whole"; "cut", only the end of the document, as long as the trained length; or
            "parts", by NBCE.
        parts: number of parts.
        document: the seed of the document.
        facts: number of facts.
        numbers: the facts that the questions ask for.
        recipe: the recipe of its rows without the question.
    """

    scaler: Scaler
    context: int
    way: Way
    parts: int
    document: int
    facts: int
    numbers: tuple[int, ...]
    text: Text
    recipe: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{super().label}, document {self.document}, {way_name(self.way, self.parts)}"

    @property
    def pass_lengths(self) -> list[int]:
        if self.way == "cut":
            return [self.recipe["trained_length"]]
        return [self.context // self.parts] * self.parts

    def row_recipes(self) -> list[dict[str, Any]]:
        return [self.recipe | {"question": number} for number in self.numbers]

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        assert isinstance(model, LocalModel)
        model.restore()
        rows, answer = [], None
        recipes = self.row_recipes()
        for recipe in recipes:
            row = run.find(recipe)  # stored by an earlier run that was stopped within this cell
            if row is None:
                started = time.perf_counter()
                if answer is None:
                    document = _document(model.model, self.text, self.context, self.facts, self.document)
                    answer = self._reader(model.model, document)
                key, value = document.facts[recipe["question"]]
                written, sources = answer(question(key))
                row = run.add(
                    recipe,
                    {
                        "correct": match_first(written, [value]),
                        "answer": value,
                        "generated": written,
                        "sources": sources,
                        "seconds": time.perf_counter() - started,
                        "peak_memory_mb": model.memory_mb,
                    },
                )
            rows.append(row)
        model.model.clear_contexts()
        for tokens in self.pass_lengths:
            advance(0, tokens)
        return rows

    def _reader(self, model: Model, document: Document) -> Callable[[str], tuple[str, list[int] | None]]:
        """A function that answers questions. The first question also reads the document."""
        if self.way == "parts":
            contexts = document.parts(self.parts)

            def over_parts(prompt: str) -> tuple[str, list[int] | None]:
                completion = model.generate(prompt, _PARAMS, contexts=contexts, pooling=NBCE())
                return completion.text, completion.sources

            return over_parts
        text = document.text
        if self.way == "cut":
            tokens = len(prompt_ids(text, model.tokenizer))
            text = _end_of(text, model, self.recipe["trained_length"] - (self.context - tokens))
        session = model.session()

        def over_text(prompt: str) -> tuple[str, list[int] | None]:
            completion = session.generate(f"{text}\n\n{prompt}" if not session.text else f"\n\n{prompt}", _PARAMS)
            session.crop(len(text))
            return completion.text, None

        return over_text

    def outcome(self, rows: Sequence[Row]) -> str:
        return f"{fmean(row['correct'] for row in rows):.0%} of {len(rows)}"


def _document(model: Model, text: Text, context: int, facts: int, seed: int) -> Document:
    """The document that leaves room for a question and its answer within `context` tokens."""

    def count(part: str) -> int:
        return len(prompt_ids(part, model.tokenizer))

    longest = count(question("considerable-acknowledgement")) + _PARAMS.max_new_tokens + _SPARE
    return Document.draw(text, count, context - longest, facts, seed)


def _end_of(text: str, model: Model, tokens: int) -> str:
    """The whole characters of the last `tokens` tokens of a text."""
    end = model.vocabulary.text_bytes(text_ids(text, model.tokenizer)[-tokens:]).decode(errors="ignore")
    return end.removeprefix(" ") if model.vocabulary.adds_space else end  # it adds the blank again


def way_name(way: str, parts: int) -> str:
    """A way of reading, for display."""
    return {"whole": "read whole", "cut": "only its end"}.get(way, f"{parts} part{'s' * (parts > 1)}")


def cells(
    model: LocalModel,
    text: Text,
    scalers: Sequence[Scaler],
    *,
    contexts: Sequence[int],
    parts: Sequence[int],
    documents: int,
    questions: int,
) -> list[FactsCell]:
    """Cells of every length and document: whole under every scaler, only the end, and in parts.

    Args:
        parts: numbers of parts.
        documents: number of seeds 0, 1, ...
        questions: per document. The document has twice as many facts, but at least the largest of
            `parts`.

    Raises:
        ConfigError: a scaler cannot work on this model, or a part is longer than the trained
            length.
        DataError: a length cannot hold the facts, or the text is shorter.
    """
    trained = model.trained_length
    ropes: dict[tuple[Scaler, int], dict[str, str]] = {}
    for scaler in (Scaler(), *scalers):
        scaled = model.under(scaler)
        ropes |= {(scaler, context): rope_recipe(scaler, scaled.rope_at, [context]) for context in contexts}
    facts = max(2 * questions, *parts)
    numbers = tuple(n * facts // questions + facts // (2 * questions) for n in range(questions))
    ways: list[tuple[Way, int, Scaler]] = [("whole", 1, scaler) for scaler in scalers]
    ways += [("cut", 1, Scaler()), *(("parts", count, Scaler()) for count in parts)]
    planned = []
    for context in contexts:
        if short := [count for count in parts if context / count > 0.97 * trained]:
            raise ConfigError(
                f"{short[0]} parts of {format_length(context)} tokens are longer than the trained length, "
                f"{format_length(trained)}; use {1 + int(context / (0.97 * trained))} parts or more"
            )
        for document in range(documents):
            _document(model.model, text, context, facts, document)  # raises before anything is measured
            for way, count, scaler in ways:
                planned.append(
                    FactsCell(
                        scaler=scaler,
                        context=context,
                        way=way,
                        parts=count,
                        document=document,
                        facts=facts,
                        numbers=numbers,
                        text=text,
                        recipe=shared_recipe(model, text)
                        | {
                            "experiment": "facts",
                            "form": FORM,
                            "words": WORDS_VERSION,
                            "context": context,
                            "facts": facts,
                            "document": document,
                            "way": way,
                            "parts": count,
                        }
                        | ropes[scaler, context],
                    )
                )
    return planned

"""The benchmark of prompts that end inside a token: its laws against brute force and the engine, and its runs."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.evals.continuation import benchmark as continuation
from ropewalk.evals.continuation.benchmark import draw_all
from ropewalk.evals.continuation.methods import EXACT, HEALING, METHODS, OFF, ONE_BACK, STEPS, Ending
from ropewalk.evals.continuation.report import plot_continuation, summarize, tables, to_markdown
from ropewalk.evals.runs.result import Run
from ropewalk.evals.statistics import wilson_interval
from ropewalk.tokenizer_tools import cuts

WITH_LAWS = [method for method in METHODS if method != HEALING]


@pytest.fixture(scope="module")
def model(tiny_folder):
    with torch.inference_mode():
        yield rw.load(tiny_folder)


@pytest.fixture(scope="module")
def drawn(model, held_out_texts):
    text = "\n".join(held_out_texts)
    kinds = {cuts.ANYWHERE: 24, cuts.AFTER_SPACE: 6, cuts.INSIDE: 6}
    return {kind: cuts.draw(model.vocabulary, text, kind, count, seed=2) for kind, count in kinds.items()}


@pytest.fixture(scope="module")
def every(drawn):
    return [cut for found in drawn.values() for cut in found]


def brute(ending, forks, rest):
    """The probability of `rest` after each fork, over all token sequences, none left out; not normalized."""
    tokens, special_ids = ending.model.vocabulary.tokens, ending.model.vocabulary.special_ids

    def of(path, goal, least):
        if not goal:
            return 1.0
        row = ending.reader.after(path).exp()
        total = 0.0
        for token, data in enumerate(tokens):
            if token in special_ids or len(data) <= least:
                continue
            if data.startswith(goal):
                total += float(row[token])
            elif goal.startswith(data):
                total += float(row[token]) * of((*path, token), goal[len(data) :], 0)
        return total

    return sum(math.exp(fork.logweight) * of(fork.path, fork.suffix + rest, len(fork.suffix)) for fork in forks)


@pytest.mark.parametrize("method", WITH_LAWS)
def test_the_law_of_the_next_bytes_is_the_sum_over_all_token_sequences(model, drawn, method):
    for cut in drawn[cuts.ANYWHERE][:3]:
        ending = Ending(model, model._runner, cut.prompt)
        law = ending.distribution(method)
        total = sum(brute(ending, law._forks, bytes([byte])) for byte in range(256)) + _end_weight(ending, law)
        for rest in (cut.rest[:1], cut.rest[:3], b"zq"):
            wanted = math.log(brute(ending, law._forks, rest) / total)
            assert wanted - 0.011 < law.logprob(rest) < wanted + 1e-9
        assert law.next_byte_logprobs.exp().sum() == pytest.approx(1)
        assert law.logprob(cut.rest[:1]) == pytest.approx(float(law.next_byte_logprobs[cut.rest[0]]), abs=0.011)


def test_a_probability_may_be_too_small_for_a_float(model, drawn, monkeypatch):
    cut = drawn[cuts.ANYWHERE][0]
    ending = Ending(model, model._runner, cut.prompt)
    law, after = ending.distribution(EXACT), ending.reader.after
    monkeypatch.setattr(ending.reader, "after", lambda path: 1000 * after(path))
    assert -math.inf < law.logprob(b"zq~~zq~~") < math.log(5e-324)
    assert -math.inf < float(law.next_byte_logprobs[ord("~")]) < 0


def _end_weight(ending, law):
    (end,) = ending.model.vocabulary.special_ids
    return sum(
        math.exp(fork.logweight + float(ending.reader.after(fork.path)[end])) for fork in law._forks if not fork.suffix
    )


def test_steps_are_each_normalized(model, every):
    totals = [
        float(Ending(model, model._runner, cut.prompt).distribution(STEPS)._logweights.exp().sum()) for cut in every
    ]
    assert max(totals) < 1 + 1e-9
    assert min(totals) > 1 - 1e-9


def test_the_exact_law_is_the_engines(model, every):
    over = []
    for cut in every[::2]:
        ours = Ending(model, model._runner, cut.prompt).distribution(EXACT)
        engine = model.next_byte_logprobs(cut.prompt)
        assert (ours.next_byte_logprobs.exp() - engine.exp()).abs().max() < 1e-5
        # the engine counts the tokens that the tokenizer would make, and we all that the model may write
        over.append(ours.logprob(cut.rest[:8]) - model.logprob(cut.rest[:8], given=cut.prompt))
    assert min(over) > -0.011
    assert sorted(over)[len(over) // 2] < 0.011


def test_off_is_exact_where_no_token_can_go_on(model):
    prompt = "def main(arguments):\n    return arguments\n\n\nclass Token:\n    limit = 3½"
    ending = Ending(model, model._runner, prompt)
    assert ending.cover.only_aligned
    for method in (EXACT, STEPS):
        off, other = (ending.distribution(one).next_byte_logprobs for one in (OFF, method))
        assert (off - other).abs().max() < 1e-9


def test_one_token_back_is_exact_where_the_cover_is_one_deep(model, every):
    seen = Counter()
    for cut in every:
        ending = Ending(model, model._runner, cut.prompt)
        before, last = ending.tail[:-1], ending.tail[-1]
        forks = {((*before, last), b""), (before, model.vocabulary.tokens[last])}
        one_deep = {((*ending.common_prefix, *node.path), node.suffix) for node in ending.cover.nodes} == forks
        exact, one_back = (ending.distribution(method).next_byte_logprobs for method in (EXACT, ONE_BACK))
        assert not one_deep or (exact - one_back).abs().max() < 1e-9
        seen[one_deep, bool((exact - one_back).abs().max() < 1e-9)] += 1
    assert seen[True, True] > 5
    assert seen[False, False] > 5


def test_steps_drawn_one_by_one_have_the_law(model, drawn):
    """The step mask, simulated: mask, renormalize, draw."""
    vocabulary, source = model.vocabulary, random.Random(0)
    compared = 0
    for cut in drawn[cuts.ANYWHERE]:
        ending = Ending(model, model._runner, cut.prompt)
        steps, exact = (ending.distribution(method).next_byte_logprobs.exp() for method in (STEPS, EXACT))
        if (steps - exact).abs().max() < 0.08:
            continue
        frequencies = torch.zeros(257, dtype=torch.float64)
        for _ in range(2000):
            path, rest = (
                ending.common_prefix,
                cut.prompt.encode()[len(vocabulary.text_bytes(list(ending.cover.common_prefix))) :],
            )
            while True:
                row = ending.reader.after(path).exp().tolist()
                agree = [
                    token
                    for token, data in enumerate(vocabulary.tokens)
                    if not rest or (data and (data.startswith(rest) or rest.startswith(data)))
                ]
                (token,) = source.choices(agree, [row[token] for token in agree])
                path, size = (*path, token), len(vocabulary.tokens[token])
                if size > len(rest) or token in vocabulary.special_ids:
                    break
                rest = rest[size:]
            frequencies[256 if token in vocabulary.special_ids else vocabulary.tokens[token][len(rest)]] += 1 / 2000
        assert (frequencies - steps).abs().max() < 0.05
        compared += 1
        if compared == 2:
            return
    raise AssertionError("no cut tells the step mask from the exact law")


def test_openings_are_the_likeliest(model, every):
    vocabulary = model.vocabulary
    runs = Counter()
    for cut in every[::2]:
        ending = Ending(model, model._runner, cut.prompt)
        wanted = cut.token[cut.overlap :]
        for method, policy in ((EXACT, "exact"), (OFF, "off")):
            params = rw.SamplingParams(max_new_tokens=12, temperature=0, continuation=policy)
            text = model.generate(cut.prompt, params).text.encode()
            opening = ending.open(method)
            assert text.startswith(opening.past.decode(errors="ignore").encode())
            assert ending.finishes(opening, wanted) == text.startswith(wanted)
            assert ending.finishes(opening, text[:10])
            assert not ending.finishes(opening, text[:9] + b"\x00")
        for method in (OFF, ONE_BACK, STEPS, EXACT):
            opening = ending.open(method)
            assert vocabulary.text_bytes(list(opening.ids)) == cut.prompt.encode() + opening.past
            assert opening.seconds > 0
            runs[method, opening.forwards] += 1
    assert set(runs) >= {(OFF, 1), (ONE_BACK, 1), (ONE_BACK, 2), (EXACT, 1), (EXACT, 2), (STEPS, 1), (STEPS, 2)}
    assert {forwards for method, forwards in runs if method == OFF} == {1}
    assert {forwards for method, forwards in runs if method == ONE_BACK} == {1, 2}


def test_the_likeliest_steps_are_taken_one_by_one(model, every):
    tokens, lengths = model.vocabulary.tokens, Counter()
    for cut in every[::2]:
        ending = Ending(model, model._runner, cut.prompt)
        path, rest = (
            ending.common_prefix,
            cut.prompt.encode()[len(model.vocabulary.text_bytes(list(ending.cover.common_prefix))) :],
        )
        while rest:
            row = ending.reader.after(path).tolist()
            agree = [i for i, data in enumerate(tokens) if data and (data.startswith(rest) or rest.startswith(data))]
            token = max(agree, key=lambda i: row[i])
            path, rest = (*path, token), rest[len(tokens[token]) :]
        opened = ending.open(STEPS).ids[len(ending.reader.base) :]
        assert opened[: len(path)] == path
        lengths[len(path) - len(ending.common_prefix)] += 1
    assert len(lengths) >= 3


def test_transformers_healing_is_seen_by_its_text(model, every):
    outcomes, healed = Counter(), 0
    for cut in every:
        ending, wanted = Ending(model, model._runner, cut.prompt), cut.token[cut.overlap :]
        finished = ending.transformers_finishes(wanted)
        outcomes[finished] += 1
        healed += finished and not ending.finishes(ending.open(OFF), wanted)
        if finished:
            assert ending.transformers_finishes(wanted[:1])
        assert not ending.transformers_finishes(b"\x00\x00\x00")
    assert outcomes[True] >= 2
    assert outcomes[False] >= 2
    assert healed


@pytest.fixture
def text_file(tmp_path, held_out_texts):
    file = tmp_path / "held_out.py"
    file.write_text("\n".join(held_out_texts[:6]), encoding="utf-8")
    return file


def run_command(folder, text, out, count):
    arguments = ["continuation", str(folder), "--text", str(text), "--cuts", str(count), "--out", str(out)]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def without_time(out):
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {row["key"]: {field: value for field, value in row.items() if field != "extra_ms"} for row in rows}


def test_the_command_resumes_and_writes_tables_and_a_plot(tiny_folder, text_file, tmp_path, monkeypatch):
    whole = run_command(tiny_folder, text_file, tmp_path / "whole", 3)
    for part in ("any character: 3 cuts", "after a space", "word border in a token", "exact", "transformers"):
        assert part in whole.output
    with Image.open(tmp_path / "whole" / "continuation.png") as image:
        assert image.width == 1800
    assert "| one token back |" in (tmp_path / "whole" / "table.md").read_text()
    assert len(without_time(tmp_path / "whole")) == 3 * 3 * len(METHODS)

    measure, calls = continuation.measure, []

    def killed(model, cut):
        calls.append(cut)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(model, cut)

    monkeypatch.setattr(continuation, "measure", killed)
    stopped = run_command(tiny_folder, text_file, tmp_path / "parts", 2)
    assert stopped.exit_code
    assert len(without_time(tmp_path / "parts")) == 3 * len(METHODS)
    calls[:] = [None] * 10
    run_command(tiny_folder, text_file, tmp_path / "parts", 3)  # more cuts than before
    assert len(calls) - 10 == 9 - 3
    assert without_time(tmp_path / "parts") == without_time(tmp_path / "whole")
    assert {row["seed"] for row in without_time(tmp_path / "parts").values()} == {0}


def test_cuts_of_other_weights_at_the_same_path_are_measured_anew(tiny_folder, text_file, tmp_path):
    out, folder = tmp_path / "out", shutil.copytree(tiny_folder, tmp_path / "model")
    run_command(folder, text_file, out, 1)
    before = without_time(out)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.01 * weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    run_command(folder, text_file, out, 1)
    assert len(without_time(out)) == 2 * len(before)


def test_a_text_without_places_is_refused(tiny_folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("a" * 300)
    with pytest.raises(rw.DataError, match="the text has 300 characters"):
        run_command(tiny_folder, text, tmp_path / "out", 3)


def test_the_usual_texts_are_english_code_and_chinese(model):
    names = [one.name for one in draw_all(model.vocabulary, "chinese", 2, seed=0)]
    assert names == ["chinese, any character", "chinese, after a space", "chinese, word border in a token"]


def rows_of(run, bits):
    for method, values in bits.items():
        for place, value in enumerate(values):
            recipe = {"text": "t", "kind": "k", "method": method, "place": place}
            measured = {"finished": value < 2}
            if method != HEALING:
                measured |= {"next_byte_bits": value, "top1": True, "bits_per_byte": 1.0}
                measured |= {"extra_forwards": 1, "extra_ms": value}
            run.add(recipe, measured)
    return run.rows


def test_means_intervals_and_paired_differences(tmp_path):
    bits = {OFF: [5.0, 1.0, 6.0, 2.0, 6.0], HEALING: [1.0, 1.0, 3.0, 3.0, 3.0], EXACT: [4.0, 0.0, 5.0, 1.0, 5.0]}
    summaries = summarize(rows_of(Run(tmp_path), bits))
    off, healing, exact = summaries
    assert [s.method for s in summaries] == [OFF, HEALING, EXACT]
    assert off.values["next_byte_bits"].mean == 4
    assert 1 < off.values["next_byte_bits"].low < 4 < off.values["next_byte_bits"].high < 7
    over = off.values["over_exact"]
    assert (over.mean, over.low, over.high) == (1, 1, 1)
    assert exact.values["over_exact"].mean == 0
    assert str(off.values["extra_ms"]) == "5.00"
    assert set(healing.values) == {"finished"}
    finished = healing.values["finished"]
    assert (finished.mean, finished.low, finished.high) == pytest.approx((0.4, *wilson_interval(2, 5)))
    markdown = to_markdown(summaries, "toy")
    assert "| off | 4.00 ±" in markdown
    assert "| transformers |  |  |  | 0.40 ±" in markdown
    assert [table.title for table in tables(summaries)] == ["t, k: 5 cuts"]


def test_the_plot_is_the_same_each_time_and_takes_too_few_cuts(tmp_path):
    summaries = summarize(rows_of(Run(tmp_path / "run"), {OFF: [5.0], HEALING: [1.0], EXACT: [0.5]}))
    first, second = (plot_continuation(summaries, "toy", tmp_path / name)[1] for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert "k" in first.read_text()

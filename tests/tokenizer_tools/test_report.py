"""The report of a tokenizer: counted by hand on small vocabularies, and compared with the encoder of a real one."""

import json
import os
import random
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import sentencepiece
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.cli.vocab import escaped
from ropewalk.engine.checkpoints.source import load_vocabulary
from ropewalk.tokenizer_tools import cuts
from ropewalk.tokenizer_tools.cuts import KINDS, draw
from ropewalk.tokenizer_tools.report import report
from ropewalk.tokenizer_tools.vocabularies import vocabulary
from ropewalk.tokenizer_tools.vocabulary import Vocabulary


class Grouped(Vocabulary):
    """Splits a text of x into tokens of three; the rest becomes single tokens."""

    def __init__(self):
        self.tokens, self.special_ids, self.byte_level = [b"x", b"xxx", b""], frozenset([2]), True
        self.name, self.kind = "grouped", "groups"

    def encode(self, text):
        return self.encode_piece(text.encode())

    def piece_starts(self, text):
        return []

    def encode_piece(self, data):
        return [1] * (len(data) // 3) + [0] * (len(data) % 3)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_vocabulary(tiny_folder)


@pytest.fixture(scope="module")
def code(held_out_texts):
    return "\n".join(held_out_texts)


def test_groups_of_three_counted_by_hand():
    numbers = report(Grouped(), "x" * 600, cuts=10_000)
    (risk,) = numbers.risks  # there are no spaces, and the only word ends with the text
    assert risk.kind == "any character"
    assert risk.cuts == 600 - 200 - 128
    assert risk.inside == risk.changed == pytest.approx(2 / 3, abs=0.05)
    assert risk.deeper == pytest.approx(1 / 3, abs=0.05)
    assert risk.depth_mean == pytest.approx(1.5, abs=0.1)
    assert (risk.depth_p95, risk.depth_max, risk.nodes_max) == (2, 2, 2)
    assert numbers.bytes_per_token == 3
    assert (numbers.size, numbers.special, numbers.longest) == (3, 1, (b"xxx", b"x", b""))
    assert [(example.prompt_end, example.token) for example in numbers.examples] == [("x" * 24, b"xxx")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_has_the_token_of_the_uncut_text(tiny, code, kind):
    drawn = draw(tiny, code, kind, 100, seed=3)
    assert len({cut.place for cut in drawn}) == 100
    assert kind == cuts.WORD_END or any(cut.overlap for cut in drawn)  # a token can cross the end of a word too
    for cut in drawn:
        text = cut.prompt + cut.rest.decode()
        assert code[cut.place - len(cut.prompt) :].startswith(text)
        assert list(cut.ids) == tiny.encode(text)
        ends = list(accumulate(len(tiny.tokens[i]) for i in cut.ids))
        begin = len(cut.prompt.encode()) - cut.overlap
        assert begin in (0, *ends)
        assert begin + len(cut.token) in ends
        assert text.encode()[begin:].startswith(cut.token)
        assert 0 <= cut.overlap < len(cut.token)
        assert 150 <= len(cut.prompt) <= 400
        before, after = cut.prompt[-1], cut.rest.decode()[0]
        if kind == cuts.AFTER_SPACE:
            assert before == " " != after
        elif kind == cuts.WORD_END:
            assert (before.isalnum() or before == "_") and not (after.isalnum() or after == "_")
        elif kind == cuts.INSIDE:
            assert cut.overlap
            assert not (before.isalpha() and after.isalpha() and before.islower() == after.islower())
            assert not before.isspace()


def test_a_longer_draw_begins_with_the_shorter_and_another_seed_is_another(tiny, code):
    long = draw(tiny, code, cuts.ANYWHERE, 50, seed=1)
    assert draw(tiny, code, cuts.ANYWHERE, 20, seed=1) == long[:20]
    assert not {cut.place for cut in draw(tiny, code, cuts.ANYWHERE, 20, seed=2)} & {cut.place for cut in long}


def test_places_are_uniform():
    places = [cut.place for cut in draw(Grouped(), "x" * 100_000, cuts.ANYWHERE, 2000, seed=0)]
    quarters = [sum(place // 25_000 == quarter for place in places) for quarter in range(4)]
    assert all(abs(count - 500) < 70 for count in quarters)


def test_word_borders_between_ideographs():
    assert cuts._PLACES[cuts.INSIDE].match("白云机场", 2)
    assert not cuts._PLACES[cuts.INSIDE].match("白 云", 1)


def test_risk_agrees_with_the_encoder(tiny, code):
    numbers = report(tiny, code, cuts=200, seed=5)
    for risk in numbers.risks:
        inside, depths = 0, []
        for cut in draw(tiny, code, risk.kind, 200, seed=5):
            inside += cut.overlap > 0
            prompt = tiny.encode(cut.prompt)
            depth = 0
            while prompt[: len(prompt) - depth] != list(cut.ids[: len(prompt) - depth]):
                depth += 1
            depths.append(depth)
        assert risk.inside == inside / 200
        assert risk.changed == sum(depth > 0 for depth in depths) / 200
        assert risk.deeper == sum(depth > 1 for depth in depths) / 200
        assert risk.depth_max == max(depths)
        assert risk.nodes_max >= risk.nodes_mean >= 1
        assert risk.seconds > 0
    for example in numbers.examples:
        end = example.prompt_end.encode()
        assert any(end.endswith(example.token[:size]) for size in range(1, len(example.token)))
    anywhere, after_space, _ = numbers.risks
    assert anywhere.deeper > 0.02
    assert after_space.inside > 0.7


def test_a_text_that_cannot_be_cut_is_refused():
    with pytest.raises(rw.DataError, match="the text has 300 characters; cuts need more than 328"):
        report(Grouped(), "x" * 300)


def test_a_text_of_unknown_characters_is_refused():
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    with pytest.raises(rw.DataError, match="Tokenizer knows no character of this text"):
        report(vocabulary(tokenizer), "日本" * 400, cuts=3)


def test_text_that_the_tokenizer_changes_is_not_cut(tmp_path):
    source = random.Random(0)
    words = ["".join(source.choices("abcdefgh", k=source.randint(2, 7))) for _ in range(3000)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(" ".join(words[n : n + 10]) for n in range(0, 3000, 10)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "own"), vocab_size=200, model_type="unigram", minloglevel=2
    )
    vocabulary = load_vocabulary(tmp_path / "own.model")
    assert vocabulary.kind == "SentencePiece UNIGRAM"
    assert load_vocabulary(_as_folder(tmp_path)).tokens == vocabulary.tokens
    text = " ".join(words)
    assert len(draw(vocabulary, text, cuts.ANYWHERE, 50, seed=0)) == 50
    assert draw(vocabulary, text.replace(" ", "  "), cuts.ANYWHERE, 50, seed=0) == []  # it joins the spaces


def _as_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((tmp_path / "own.model").read_bytes())
    return folder


def test_the_command_prints_tables_or_one_line_of_json(tiny_folder, tmp_path, code):
    text = tmp_path / "text.py"
    text.write_text(code[:40_000] + "[red]" * 100, encoding="utf-8")
    arguments = ["vocab", str(tiny_folder / "tokenizer.json"), "--text", str(text), "--cuts", "50"]
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    for part in ("byte-level BPE", "1024, of them 1 special", "inside a token", "after a space"):
        assert part in shown
    line = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).output
    numbers = json.loads(line)
    assert numbers["size"] == 1024
    assert [risk["kind"] for risk in numbers["risks"]] == ["any character", "after a space", "end of a word"]
    tokenizer = Tokenizer.from_file(arguments[1])
    assert set(numbers["longest"]) <= {tokenizer.decode([i]) for i in range(1024)}


def test_tokens_are_shown_escaped():
    assert escaped(b"a\n\xe4") == r"'a\n\\xe4'"
    assert escaped(b" " * 80).count(" ") < 40


def test_the_report_needs_no_torch(tiny_folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 50)
    code = (
        "import sys; from ropewalk.cli.main import cli; "
        f"cli(['vocab', {str(tiny_folder)!r}, '--text', {str(text)!r}, '--cuts', '3'], standalone_mode=False); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(rw.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.json", "nowhere.json: no such file; name a tokenizer.json"),
        ("smollm2-135", "Did you mean 'smollm2-135m'"),
        ("{folder}", "this folder has none of tokenizer.json"),
        ("{folder}/bad.json", "is damaged, or not a tokenizer"),
    ],
)
def test_names_without_a_tokenizer_are_refused(tmp_path, name, message):
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(rw.AssetError, match=message):
        load_vocabulary(name.format(folder=tmp_path))


def test_a_tekken_file():
    data = pytest.importorskip("mistral_common").__path__[0] + "/data/tekken_240911.json"
    vocabulary = load_vocabulary(data)
    assert vocabulary.kind == "byte-level BPE (tiktoken)"
    assert vocabulary.text_bytes(vocabulary.encode("naïve")) == "naïve".encode()


def test_what_a_text_has_not_is_said(tiny_folder):
    arguments = ["vocab", str(tiny_folder), "--text", "chinese", "--cuts", "3"]
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    assert "chinese has no such place to cut: after a space, word border in a token" in " ".join(shown.split())
    assert "No cut is inside a token" in shown
    assert "the prompt ends in" not in shown

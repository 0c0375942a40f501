"""One pass over a long text, and its loss by position against recomputation."""

import warnings

import numpy as np
import pytest
import torch
from byte_model import WORDS, tiny_model
from byte_model import text as words
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.evals.contexts import endless
from ropewalk.evals.contexts.endless import cells
from ropewalk.evals.contexts.report import endless_markdown, endless_rows, plot_endless
from ropewalk.evals.data import Text
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.runs.result import Run


@pytest.fixture(scope="module")
def subject(tiny_folder):
    return LocalModel(rw.load(tiny_folder, max_length=2**31))


@pytest.fixture(scope="module")
def text(held_out_texts):
    return Text(name="held out", documents=tuple(held_out_texts), sha256="1" * 64)


def test_rows_are_the_losses_of_the_pass_and_of_windows_read_afresh(subject, text, tmp_path):
    (cell,) = cells(subject, text, [rw.parse("sink-window:64")], contexts=[3000], places=8)
    run, read = Run(tmp_path), []
    rows = cell.measure(subject.under(cell.scaler), run, lambda held, count: read.append(count))
    assert [(row["start"], row["end"]) for row in rows] == [
        (1, 256),
        (256, 512),
        (512, 1024),
        (1024, 2048),
        (2048, 3000),
    ]
    model, ids = subject.model, list(cell.ids)
    model.rope = cell.scaler
    with torch.inference_mode():
        losses = -model.score_ids(ids).numpy()
    model.rope = None
    for row in rows:
        start, end = row["start"], row["end"]
        assert row["loss"] == pytest.approx(losses[start - 1 : end - 1].mean(), abs=1e-5)
        places = np.linspace(start, end - 1, 8).astype(int)
        afresh = []
        for t in places.tolist():
            with torch.inference_mode():
                window = torch.tensor([ids[max(0, t - 64) : t]])
                afresh.append(-float(model.hf(window).logits[0, -1].log_softmax(-1)[ids[t]]))
        assert row["recomputed"] == pytest.approx(np.mean(afresh), abs=1e-4)
        assert row["streamed"] == pytest.approx(losses[places - 1].mean(), abs=1e-4)
        assert row["difference"] == pytest.approx(row["streamed"] - row["recomputed"], abs=1e-5)
    assert rows[-1]["cache_mb"] < 1.2 * rows[2]["cache_mb"]
    assert sum(read) > 2999
    assert cell.is_done(run) and endless_rows(run.rows) == rows
    assert endless_markdown(rows).count("\n| ") == 6


def test_the_start_token_stands_before_the_text_and_every_window(tmp_path, monkeypatch):
    model = tiny_model(bos=True)
    (cell,) = cells(LocalModel(model), words(WORDS), [rw.parse("sink-window:32")], contexts=[300], places=4)
    plain, read = list(model.tokenizer(WORDS, add_special_tokens=False).input_ids), []
    assert list(cell.ids) == [256, *plain[:299]]
    losses = LocalModel.losses
    monkeypatch.setattr(LocalModel, "losses", lambda reader, ids, *more: read.append(ids) or losses(reader, ids, *more))
    model.rope = cell.scaler
    cell.measure(LocalModel(model), Run(tmp_path), lambda *_: None)
    assert read[0] == list(cell.ids)
    places = [int(t) for start, end in cell.buckets for t in np.linspace(start, end - 1, 4)]
    assert read[1:] == [[256, *plain[max(0, t - 32) : t]] for t in places]  # 32 tokens, and the one they predict
    bare = cells(LocalModel(tiny_model()), words(WORDS), [rw.parse("sink-window:32")], contexts=[300], places=4)[0]
    assert (list(bare.ids), bare.start) == (plain[:300], 0)


def test_buckets_within_one_chunk_have_the_numbers_of_that_chunk(subject, text, tmp_path, monkeypatch):
    (cell,) = cells(subject, text, [rw.parse("sink-window:64")], contexts=[1400], places=2)
    sizes = iter([1e6, 2e6, 3e6])

    def losses(model, ids, first, advance):
        for past in (0, 600, 1200):
            advance(past, min(600, 1399 - past))
        return np.zeros(len(ids) - first, np.float32)

    monkeypatch.setattr(LocalModel, "losses", losses)
    monkeypatch.setattr(endless, "cache_bytes", lambda cache: next(sizes))
    rows = cell.measure(subject.under(cell.scaler), Run(tmp_path), lambda *_: None)
    assert [row["cache_mb"] for row in rows] == [1, 1, 1, 3]


@pytest.mark.parametrize("spec", ["none", "rerope:64", "yarn:2"])
def test_scalers_that_hold_every_key_are_refused(subject, text, spec):
    with pytest.raises(rw.ConfigError, match=r"sees every key.* use one such as sink-window"):
        cells(subject, text, [rw.parse(spec)], contexts=[1000], places=4)


def test_a_text_that_is_too_short_is_refused(subject):
    short = Text(name="short", documents=("import os\n" * 50,), sha256="2" * 64)
    with pytest.raises(rw.DataError, match="give a longer text"):
        cells(subject, short, [rw.parse("sink-window:64")], contexts=[4096], places=4)


def test_the_command(tiny_folder, held_out_texts, tmp_path):
    out, text = tmp_path / "run", tmp_path / "text.py"
    text.write_text(max(held_out_texts, key=len), encoding="utf-8")
    arguments = ["endless", str(tiny_folder), "--text", str(text), "--lengths", "4x", "--places", "4"]
    arguments += ["--out", str(out)]
    for _ in range(2):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} >= {"results.jsonl", "table.md", "endless.png", "endless.svg"}
    assert len(Run(out).rows) == 3


def endless_row(start, **changes):
    row = {"experiment": "endless", "model": "toy", "dtype": "float32", "trained_length": 256, "text": "kjv"}
    row |= {"context": 512, "places": 32, "window": 32, "rope": "sink-window:32", "start": start, "end": start + 256}
    row |= {"loss": 3.0, "low": None, "high": None, "difference": 0.0, "difference_low": None, "difference_high": None}
    return row | {"cache_mb": 1.0, "resident_mb": 1.0, "tokens_per_second": 1.0} | changes


def test_settings_have_tables_and_plots_of_their_own(tmp_path):
    rows = [endless_row(start) for start in (1, 256)]
    rows += [endless_row(start, rope="sink-window:64", window=64, loss=4.0) for start in (1, 256)]
    rows += [endless_row(start, text="other", dtype="int8", places=8, loss=5.0) for start in (1, 256)]
    tables = endless_markdown(rows).split("tokens recomputed in each row")
    assert len(tables) == 4
    assert [table.count("| 5.000 |") for table in tables] == [0, 0, 0, 2]
    assert "| not finite |" in endless_markdown([endless_row(1, loss=None), endless_row(256)])
    assert "`sink-window:32`, toy (int8, trained at 256) on other, 512 tokens; 8 " in tables[2]
    rows[0]["loss"] = None
    assert [path.name for path in plot_endless(rows, tmp_path / "endless")] == [
        "endless.png",
        "endless.svg",
        "endless_2.png",
        "endless_2.svg",
    ]


def test_a_pass_that_ends_before_the_trained_length_is_drawn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_endless([endless_row(1, end=16, context=16)], tmp_path / "endless")

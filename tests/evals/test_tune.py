"""`tune` on the small model, which breaks past its trained length of 256 tokens."""

import json
import math
import shutil
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.errors import ConfigError, DataError
from ropewalk.evals.data import load_text
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.protocols.protocol import tokens_sha256
from ropewalk.evals.runs import measure
from ropewalk.evals.runs.measure import measure_all, new_console
from ropewalk.evals.runs.progress import RunProgress
from ropewalk.evals.runs.result import Run
from ropewalk.evals.statistics import paired_difference
from ropewalk.evals.tuning import rounds
from ropewalk.evals.tuning.candidates import difference
from ropewalk.evals.tuning.report import as_json, config_fragment, publish_tuned
from ropewalk.evals.tuning.text import TuneText
from ropewalk.scaling import hf
from ropewalk.scaling.rope import Scaler

TARGET = 512


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder, dtype="float32", max_length=2**31)


@pytest.fixture(scope="module")
def text_folder(held_out_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    for number, source in enumerate(sorted(held_out_texts, key=len)[-6:]):
        (folder / f"{number}.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text(text_folder):
    return load_text(text_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def tuned(model, text, folder):
    """A whole search, whose measurements other tests use again."""
    return rw.tune(model, TARGET, text=text, out=folder)


def test_the_winner_has_the_lowest_loss_of_all_that_were_read_as_far(tuned):
    assert tuned.complete
    assert tuned.winner.places == 9
    for other in tuned.ranking:
        change = difference(other, tuned.winner)
        assert change.mean >= 0 or other in tuned.ties or not other.read


def test_it_extends_the_model(tuned, model):
    plain = next(c for c in tuned.ranking if type(c.scaler) is Scaler)
    change = difference(tuned.winner, plain)
    assert change.mean < -0.5  # nats: the untouched model breaks past 256 tokens


def test_what_is_named_is_read_at_every_place(tuned):
    assert {tuned.winner.places, tuned.simplest.places, tuned.servable.places} == {9}
    assert not tuned.is_worse(tuned.simplest, tuned.winner)


def test_another_call_measures_nothing_anew(tuned, model, text, folder):
    def never(progress):
        raise AssertionError(f"{progress.scaler} was measured again")

    again = rw.tune(model, TARGET, text=text, out=folder, progress=never)
    assert as_json(again) == as_json(tuned)


def test_passkeys_that_do_not_fit_are_left_out_with_a_warning(model, text, folder, tuned, monkeypatch, caplog):
    def too_long(*_, **__):
        raise DataError("the smallest passkey has 600 tokens")

    monkeypatch.setattr(rounds, "retrieval_cells", too_long)
    rw.tune(model, TARGET, text=text, out=folder)
    assert "passkeys were left out: the smallest passkey has 600 tokens" in caplog.text


def take_in(folder, other):
    """Put the rows that `other` lacks beside its own, so that they need not be measured again."""
    rows = {row["key"]: row for row in Run(folder).rows}
    with (other / "results.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(rows[key])}\n" for key in rows.keys() - {row["key"] for row in Run(other).rows})
    shutil.copytree(folder / "losses", other / "losses", dirs_exist_ok=True)


def test_a_search_that_was_stopped_comes_to_the_same(tuned, model, text, folder, tmp_path):
    seen = []

    def stop(progress):
        seen.append(progress.round)
        if len(seen) in (8, 20):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            rw.tune(model, TARGET, text=text, out=tmp_path, progress=stop)
        assert str(model.rope) == "none"
    assert len(Run(tmp_path).rows) == 20
    take_in(folder, tmp_path)
    assert as_json(rw.tune(model, TARGET, text=text, out=tmp_path)) == as_json(tuned)


def test_the_command_names_and_writes_what_was_found(tuned, text_folder, folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    command = ["tune", str(tiny_folder), "--target", "512", "--text", str(text_folder), "--dtype", "float32"]
    done = CliRunner().invoke(cli, [*command, "--out", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert f"Winner at 512: {tuned.winner.scaler}," in words
    assert f"for other engines, is {tuned.servable.scaler}" in words
    summary = json.loads((folder / "tuned.json").read_text(encoding="utf-8"))
    names = {"model": tiny_folder.name, "text": text_folder.name}
    assert summary == {**names, **json.loads(json.dumps(as_json(tuned)))}
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == config_fragment(tuned)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert str(tuned.winner.scaler) in report
    assert "<svg" in report
    assert all(
        str(c.scaler) in (folder / "table.md").read_text(encoding="utf-8").replace("\\|", "|") for c in tuned.ranking
    )
    assert not (tmp_path / "cache" / "tuned").exists()
    assert "--rope auto is as before. The same command with --keep stores the winner" in words
    assert "nothing is measured again" in words
    assert "measurements of an earlier search are in" in words
    done = CliRunner().invoke(cli, [*command, "--out", str(folder), "--keep"], catch_exceptions=False)
    (stored,) = (tmp_path / "cache" / "tuned").glob("*.json")
    assert f"Stored for --rope auto: {stored}" in done.output.replace("\n", "")
    assert json.loads(stored.read_text(encoding="utf-8"))["tunings"][0]["winner"] == str(tuned.winner.scaler)


def test_one_bar_serves_all_rounds(model, text, monkeypatch, ticking):
    bars = []

    class Counted(RunProgress):
        def __enter__(self):
            bars.append(self)
            return super().__enter__()

    monkeypatch.setattr("ropewalk.evals.tuning.rounds.RunProgress", Counted)
    monkeypatch.setattr("ropewalk.evals.runs.measure.RunProgress", Counted)
    rw.tune(model, TARGET, text=text, budget=1.0)
    assert len(bars) == 1


@pytest.mark.parametrize("budget", ["0", "-1m", "soon", "nan"])
def test_durations_that_are_none(budget):
    done = CliRunner().invoke(cli, ["tune", "smollm2-135m", "--budget", budget])
    assert done.exit_code == 2
    assert f"'{budget}' is no duration; write 90s, 10m or 2h" in done.output


@pytest.fixture
def ticking(monkeypatch):
    """A clock for searches on which 5 ms pass whenever it is read, so that a budget allows as much on every machine."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * 0.005, sleep=time.sleep)
    for module in (rounds, measure):
        monkeypatch.setattr(module, "time", clock)


def test_a_budget_ends_it_with_the_best_so_far(tuned, model, text, folder, tmp_path, monkeypatch, ticking):
    short = rw.tune(model, TARGET, text=text, out=tmp_path, budget=1.0)
    monkeypatch.undo()
    assert not short.complete
    assert short.ranking
    take_in(folder, tmp_path)
    whole = rw.tune(model, TARGET, text=text, out=tmp_path)
    named = [
        [str(c.scaler) for c in (outcome.winner, outcome.simplest, outcome.servable)] for outcome in (whole, tuned)
    ]
    assert named[0] == named[1]
    places = {str(c.scaler): c.places for c in whole.ranking}  # what the short one has read is taken in
    assert {str(c.scaler) for c in tuned.ranking} == set(places)
    assert all(places[str(c.scaler)] >= c.places for c in (*tuned.ranking, *short.ranking))


def test_after_a_budget_keeping_measures_on(text_folder, tiny_folder, tmp_path, ticking):
    command = ["tune", str(tiny_folder), "--target", "512", "--text", str(text_folder), "--budget", "1"]
    done = CliRunner().invoke(cli, [*command, "--out", str(tmp_path)], catch_exceptions=False)
    words = " ".join(done.output.split())
    assert "The same command with --keep goes on with the search, and then stores its winner for it." in words
    assert "nothing is measured again" not in words


def test_a_network_that_cannot_skim_reads_everything(tiny_folder, text, tmp_path, ticking):
    plain = rw.load(tiny_folder, dtype="float32", compile=False, max_length=2**31)
    tuned = rw.tune(plain, TARGET, text=text, out=tmp_path, budget=1, ropes=["yarn:2.5"])
    assert not any(c.skimmed for c in tuned.ranking)
    assert sum(c.places > 0 for c in tuned.ranking) > 3
    assert "yarn:2.5" in {str(c.scaler) for c in tuned.ranking}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("self-extend:2,window=128", "reaches 384 tokens, fewer than the target, 512"),
        ("dpe:2/2/2,window=64", "3 groups cannot divide"),
    ],
)
def test_a_given_scaler_that_cannot_be_tried_is_refused(model, text, tmp_path, spec, words):
    with pytest.raises(ConfigError, match=words):
        rw.tune(model, TARGET, text=text, out=tmp_path, ropes=["yarn:2.5", spec])
    assert not Run(tmp_path).rows
    assert str(model.rope) == "none", "the scaler that was tried is still in use"


def test_what_an_earlier_search_has_read_is_taken_in(model, text, folder, tuned, tmp_path):
    last = next(c for c in reversed(tuned.ranking) if not c.read)
    run = Run(Path(shutil.copytree(folder, tmp_path / "run")))
    measured = TuneText(model, text, TARGET, searches=False)
    measure_all(
        LocalModel(model), [measured.read(last.scaler, window) for window in measured.windows], run, new_console()
    )
    again = rw.tune(model, TARGET, text=text, out=run.folder)
    assert next(c for c in again.ranking if str(c.scaler) == str(last.scaler)).places == 9
    assert str(again.winner.scaler) == str(tuned.winner.scaler)


def test_keep_short_leaves_no_winner_that_harms(model, text, folder, tuned, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    careful = rw.tune(model, TARGET, text=text, out=tmp_path / "run", keep_short=True)
    assert careful.winner.is_harmless
    assert careful.servable is None or careful.servable.is_harmless
    harmful = [c for c in careful.ranking if c.harm is not None and not c.is_harmless]
    assert harmful, "nothing that was measured would have been refused"
    assert not {str(c.scaler) for c in harmful} & {str(c.scaler) for c in careful.eligible}


def test_the_config_gives_the_frequencies_that_were_measured(tuned, model):
    fragment = json.loads(json.dumps(config_fragment(tuned)))
    config = type(model.hf.config)(**model.hf.config.to_dict() | fragment)
    assert config.max_position_embeddings == TARGET
    (read,) = hf.read(config).values()
    expected, got = (s.frequencies(model.spec, TARGET) for s in (tuned.servable.scaler, read.scaler))
    assert got.inv_freq.tolist() == pytest.approx(expected.inv_freq.tolist(), rel=1e-12)
    assert got.attention_factor == pytest.approx(expected.attention_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (200, ConfigError, "target 200 is not beyond the trained length 256, which the untouched model reads"),
        ("1x", ConfigError, "give a longer one, such as 2x"),
        ("1M", DataError, "the text is too short"),
    ],
)
def test_targets_that_make_no_sense(model, text, target, error, message):
    with pytest.raises(error, match=message):
        rw.tune(model, target, text=text)


def test_one_scaler_is_one(model, text):
    with pytest.raises(ConfigError, match="auto is no scaler"):
        rw.tune(model, "2x", text=text, ropes="auto")


def grid(rope, target):
    """Every method at several values; position maps with log n and without, which hardly helps the others."""
    L, s = rope.trained_length, target / rope.trained_length
    names = ("linear", "ntk", "ntk-fixed", "ntk-mixed", "ntk-by-parts", "yarn", "mrrope", "alpharope", "llama3")
    specs = [f"{name}:{s:g}" for name in names]
    maps = [f"rerope:{L * eighths // 8}" for eighths in range(1, 8)]
    for window in (L // 4, 3 * L // 8, L // 2):
        least = (target - window) / (L - window)
        maps += [f"leaky-rerope:{window},k={least:g}", f"leaky-rerope:{window},k={1.5 * least:g}"]
        maps += [f"self-extend:{math.ceil(least) + more},window={window}" for more in (0, 1, 2)]
    maps += ["dual-chunk", f"jet-long:{L // 4}"]
    specs += ["none", f"base-bound:{target}", f"critical-base:{target}", *maps, *(f"{spec}|logn" for spec in maps[::2])]
    return [rw.parse(spec) for spec in specs]


def tokens_read(rows):
    """What the measurements behind rows cost, in tokens; two readings for harm."""
    total = 0
    for row in rows:
        if row["task"] == "skim":
            total += row["read"]
        elif row.get("protocol") == "harm":
            total += 2 * row["context"] * row["documents"]
        else:
            total += row["context"] * row.get("documents", 1)
    return total


@pytest.mark.slow
def test_a_grid_of_everything_finds_nothing_better(model, text, tuned, folder, tmp_path):
    """Read whole at the same places, first all at three, then the best quarter at all. To read all at all places takes
    several times as many tokens as the search; docs/tune.md has a finer grid, at 13 times."""
    run, measured, scalers = Run(tmp_path), TuneText(model, text, TARGET, searches=False), grid(model.spec, TARGET)

    def read(scalers, windows):
        by_scaler = [[measured.read(scaler, window) for window in windows] for scaler in scalers]
        measure_all(LocalModel(model), [cell for cells in by_scaler for cell in cells], run, new_console())
        rows = [[run.find(cell.row_recipes()[0]) for cell in cells] for cells in by_scaler]
        losses = [np.concatenate([run.losses(row) for row in of_one]) for of_one in rows]
        return sorted(zip(losses, scalers, strict=True), key=lambda pair: pair[0].mean())

    quarter = read(scalers, measured.windows[:3])[: len(scalers) // 4]
    best, rope = read([scaler for _, scaler in quarter], measured.windows)[0]
    winner = np.concatenate([tuned.winner.read[window.place] for window in measured.windows])
    mean, low, high = paired_difference(winner, best)
    cost, exhaustive = tokens_read(Run(folder).rows), len(scalers) * len(measured.windows) * TARGET
    told = f"{tuned.winner.scaler} against {rope}: {mean:+.4f} ({low:+.4f} to {high:+.4f}), {cost} of {exhaustive}"
    assert low <= 0, told
    assert cost <= exhaustive / 3, told


def test_a_skim_tells_which_tokens_it_scored(model, text, tmp_path):
    places = TuneText(model, text, TARGET, searches=False)
    skim, read = (make(Scaler(), places.windows[0]) for make in (places.skim, places.read))
    rows = [cell.measure(LocalModel(model), Run(tmp_path), lambda past, count: None)[0] for cell in (skim, read)]
    scored = [cell.ids[cell.first :] for cell in (skim.window, read.windows[0])]
    assert [row["tokens_sha256"] for row in rows] == [tokens_sha256(ids) for ids in scored]


def test_candidates_are_told_apart(tuned):
    specs = [str(c.scaler) for c in tuned.ranking]
    assert len(specs) == len(set(specs)) >= 35


def test_a_harm_that_is_not_finite_is_reported(tuned, model, text, folder, tmp_path):
    winner, out = str(tuned.winner.scaler), shutil.copytree(folder, tmp_path / "broken")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in rows:
        if row["rope"] == winner and row.get("protocol") == "harm":
            row |= dict.fromkeys(("loss", "difference", "difference_low", "difference_high"))
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = rw.tune(model, TARGET, text=text, out=out)
    assert str(result.winner.scaler) == winner
    assert not result.winner.is_harmless
    assert publish_tuned(result, Run(out), model="tiny", text="held out")


def test_the_result_of_another_search_is_replaced_with_a_word(tuned, text_folder, folder, tiny_folder, tmp_path):
    out = Path(shutil.copytree(folder, tmp_path / "run"))
    nothing_to_serve = tuple(c for c in tuned.ranking if c.scaler.member("positions"))
    publish_tuned(replace(tuned, target=1024, ranking=nothing_to_serve), Run(out), model="tiny", text="held out")
    assert not (out / "config.json").exists()
    command = ["tune", str(tiny_folder), "--target", "512", "--text", str(text_folder), "--dtype", "float32", "--json"]
    first, second = (CliRunner().invoke(cli, [*command, "--out", str(out)], catch_exceptions=False) for _ in range(2))
    assert "The files of tiny --text 'held out' --target 1k --objective loss in" in " ".join(first.stderr.split())
    assert "The files of" not in second.stderr
    publish_tuned(tuned, Run(out), model=tiny_folder.name, text="another")
    third = CliRunner().invoke(cli, [*command, "--out", str(out)], catch_exceptions=False)
    assert f"The files of {tiny_folder.name} --text another --target 512" in " ".join(third.stderr.split())
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == config_fragment(tuned)

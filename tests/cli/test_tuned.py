"""`ropewalk tuned`: what `tune --keep` has stored is listed, and forgotten on demand."""

import json

import pytest
from click.testing import CliRunner

from ropewalk.cli.main import cli
from ropewalk.engine import tuned_scalers
from ropewalk.engine.tuned_scalers import TunedScaler
from ropewalk.errors import RopewalkError
from ropewalk.scaling.spec import parse


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path))


def store(fingerprint, model, target, winner):
    tuning = TunedScaler(
        target=target,
        winner=parse(winner),
        simplest=parse(winner),
        servable=None,
        loss=2.0,
        text="book",
        date="2026-11-29",
        ropewalk="0.1.0",
    )
    tuned_scalers.store(fingerprint, model, tuning)


def run(*arguments):
    done = CliRunner().invoke(cli, ["tuned", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_nothing_is_stored():
    assert run("list") == "Nothing is stored; `ropewalk tune MODEL --keep` stores its winner.\n"
    with pytest.raises(RopewalkError, match=r"^nothing is stored for toy; stored is: nothing$"):
        run("forget", "toy")


def test_every_target_is_listed_and_forgotten():
    store("ab" * 32, "/models/toy", 16384, "yarn:2")
    store("ab" * 32, "/models/toy", 32768, "dual-chunk")
    store("cd" * 32, "other", 8192, "ntk:4")
    assert run("list") == (
        "/models/toy  (abababababab)\n"
        "  up to 16k: yarn:2  tuned on book, 2026-11-29\n"
        "  up to 32k: dual-chunk  tuned on book, 2026-11-29\n"
        "other  (cdcdcdcdcdcd)\n"
        "  up to 8k: ntk:4  tuned on book, 2026-11-29\n"
    )
    assert run("list", "toy").count("up to") == 2
    listed = json.loads(run("list", "other", "--json"))["models"]
    assert [(entry["model"], entry["tunings"][0]["winner"]) for entry in listed] == [("other", "ntk:4")]
    with pytest.raises(RopewalkError, match=r"nothing is stored for toy at 8k; its targets are 16k, 32k"):
        run("forget", "toy", "--target", "8k")
    assert run("forget", "toy", "--target", "16k") == "Forgotten: yarn:2 for /models/toy up to 16k\n"
    assert [str(entry.winner) for entry in tuned_scalers.read("ab" * 32)] == ["dual-chunk"]
    assert run("forget", "abab") == "Forgotten: dual-chunk for /models/toy up to 32k\n"
    assert tuned_scalers.read("ab" * 32) == ()
    assert [entry.model for entry in tuned_scalers.read_all()] == ["other"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forget"], "forget needs a MODEL; `ropewalk tuned list`"),
        (["list", "--target", "8k"], "--target has no effect on list"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(RopewalkError, match=message):
        run(*arguments)

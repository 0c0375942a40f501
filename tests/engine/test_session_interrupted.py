"""Sessions that are interrupted: streams left early, Ctrl-C in the middle of a chunk, a step or a change of scaler."""

import pytest
import torch
from live import MORE, TEXT, cache_difference, check_cache, greedy, interrupted

import ropewalk as rw
from ropewalk.engine.kv_cache import KVLayer

pytestmark = pytest.mark.usefixtures("untouched")

LONG = TEXT * 3


def continues(model, session):
    """The session is right, and writes what is written after its text; twice, since a step follows a chunk."""
    for piece in (LONG, "x = 1\n", ""):
        check_cache(model, session)
        before = session.text
        assert session.generate(piece, greedy()).token_ids == model.generate(before + piece, greedy()).token_ids


SPECS = pytest.mark.parametrize("spec", ["none", "rerope:16|logn", "ntk:4|self-extend:4,window=16"])


@SPECS
@pytest.mark.parametrize(("where", "after"), [("layer", 0), ("layer", 2), ("layer", 6)])
def test_reading_is_interrupted_inside_a_chunk(model, monkeypatch, spec, where, after):
    model.rope = spec
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 50)
    session = model.session()
    session.append(TEXT)
    with interrupted(monkeypatch, where, after), pytest.raises(KeyboardInterrupt):
        session.append(LONG)
    assert session.text == TEXT
    continues(model, session)


@SPECS
def test_reading_is_interrupted_by_its_progress_and_goes_on_where_it_was(model, monkeypatch, spec):
    model.rope = spec
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 40)
    session, calls = model.session(), []

    def stop(start, count):
        calls.append((start, count))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.append(LONG, progress=stop)
    assert (session.text, session.tokens) == ("", 80)
    check_cache(model, session)
    session.append(LONG, progress=stop)
    assert calls[2][0] == 80
    continues(model, session)


@SPECS
@pytest.mark.parametrize(
    ("where", "after", "is_begun"),
    [
        ("layer", 1, False),
        ("written", 0, True),
        ("written", 2, True),
        ("counted", 0, False),
        ("counted", 1, True),
        ("counted", 3, True),
    ],
)
def test_an_answer_is_interrupted_in_its_opening_or_in_a_step(model, monkeypatch, spec, where, after, is_begun):
    model.rope = spec
    whole = model.generate(TEXT + LONG + MORE, greedy(8)).text
    session = model.session()
    session.append(TEXT)
    with interrupted(monkeypatch, where, after), pytest.raises(KeyboardInterrupt):
        session.generate(LONG + MORE, greedy(8))
    if is_begun:  # what was written stays
        written = session.text.removeprefix(TEXT + LONG + MORE)
        assert 0 < len(written) < len(whole)
        assert whole.startswith(written)
    else:
        assert session.text == TEXT
    continues(model, session)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_runs_out_while_the_cache_grows(model, monkeypatch, error):
    session = model.session()
    session.append(TEXT)
    fork = session.fork()
    make, calls = KVLayer._new, []

    def fails(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise error
        return make(self, *args)

    with monkeypatch.context() as patch, pytest.raises(rw.ContextOverflow, match="out of memory") as raised:
        patch.setattr(KVLayer, "_new", fails)
        session.append(LONG)
    assert isinstance(raised.value.__cause__, error)
    for each in (fork, session):
        continues(model, each)


@SPECS
@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_stream_that_is_left_ends_there(model, spec, pieces):
    model.rope = spec
    expected = list(model.stream(TEXT + MORE, greedy(8)))[:pieces]
    session = model.session()
    session.append(TEXT)
    for n, piece in enumerate(session.stream(MORE, greedy(8))):
        last = piece
        if n == pieces:
            break
    expected.append(last)  # the stream was closed when nobody held it any more
    assert session.text == TEXT + MORE + "".join(expected)
    continues(model, session)


@pytest.mark.parametrize("operation", ["append", "generate", "stream", "fork", "crop", "save", "close"])
def test_whatever_is_done_to_a_session_ends_its_stream(model, tmp_path, operation):
    session = model.session()
    stream = session.stream(TEXT + MORE, greedy(8))
    first = next(stream)
    text = TEXT + MORE + first
    match operation:
        case "crop":
            session.crop(len(text) - 1)
            text = text[:-1]
        case "fork":
            assert session.fork().text == text
        case "save":
            session.save(tmp_path / "s")
            assert model.session(tmp_path / "s").text == text
        case "close":
            session.close()
        case "append":
            session.append("x")
            text += "x"
        case _:
            text += "y" + "".join(getattr(session, operation)("y", greedy(1)).text if operation == "generate" else "")
            if operation == "stream":
                assert list(session.stream("y", greedy(1)))
                text = session.text
                assert text.startswith(TEXT + MORE + first + "y")
    assert list(stream) == []
    assert session.text == text
    continues(model, session)


def test_a_stream_that_never_began_changes_nothing(model):
    session = model.session()
    session.append(TEXT)
    stale = session.stream("x", greedy())
    session.append(MORE)
    assert list(stale) == []
    assert session.text == TEXT + MORE
    continues(model, session)


def test_other_requests_between_two_pieces_change_nothing(model):
    model.rope = "dynamic-ntk"
    expected = "".join(model.session().stream(LONG, greedy(8)))
    session, text = model.session(), ""
    for piece in session.stream(LONG, greedy(8)):
        text += piece
        model.generate(TEXT, greedy(2))
    assert text == expected


# Changes of the scaler


def test_a_change_of_scaler_ends_a_stream_with_an_error_and_the_session_goes_on(model):
    session = model.session()
    stream = session.stream(TEXT + MORE, greedy(8))
    first = next(stream)
    model.rope = "linear:2"
    with pytest.raises(rw.PatchError, match="changed from none to linear:2 while a text was being streamed"):
        next(stream)
    assert session.text == TEXT + MORE + first
    model.rope = None
    continues(model, session)


def test_keys_that_are_turned_half_way_are_not_kept(model, monkeypatch):
    session = model.session()
    session.append(LONG)
    model.rope = "linear:2"
    with interrupted(monkeypatch, "rotated", 2), pytest.raises(KeyboardInterrupt):
        session.append("x")
    assert session.text == LONG
    continues(model, session)


def test_an_interrupted_retune_of_a_fork_leaves_its_parent(model, monkeypatch):
    parent = model.session()
    parent.append(LONG)
    expected, fork = parent._cached.cache.fork(), parent.fork()
    model.rope = "linear:2"
    with interrupted(monkeypatch, "rotated", 2), pytest.raises(KeyboardInterrupt):
        fork.append("x")
    assert fork.text == LONG
    continues(model, fork)
    assert cache_difference(parent._cached.cache, expected, parent.tokens) == 0
    model.rope = None
    continues(model, parent)

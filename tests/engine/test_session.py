"""After any calls a session writes what `generate` writes after the whole text."""

from itertools import islice

import pytest
from example_count import examples
from hypothesis import Phase, example, given
from hypothesis import strategies as st
from live import MORE, TEXT, check_cache, counted, greedy

import ropewalk as rw
from ropewalk.engine.batch import Batch, generate_tokens
from ropewalk.engine.sequence import Sequence
from ropewalk.tokenizer_tools.characters import finished_text, first_characters

pytestmark = pytest.mark.usefixtures("untouched")

END = "<|endoftext|>"
PIECES = ["", "import nump", "x = 12", "é", "白云", "\n\n\n", "    ", END, f"{END}class ", "self.f  ", TEXT, "-" * 40]
PARAMS = [
    greedy(),
    greedy(continuation="off"),
    greedy(continuation="exact", logprobs=2),
    greedy(stop=["a", "\n"]),
    greedy(repetition_penalty=1.3),
    rw.SamplingParams(max_new_tokens=6, temperature=1, seed=7),
    rw.SamplingParams(max_new_tokens=5, seed=3, top_k=20, continuation="exact"),
]


def same(written, expected):
    """Both completions, but for the rounding of log-probabilities."""
    for name in ("text", "token_ids", "finish_reason", "usage"):
        assert getattr(written, name) == getattr(expected, name), name
    assert (written.healing is None) == (expected.healing is None)
    if expected.healing:
        assert written.healing.prompt_ids == expected.healing.prompt_ids
    for a, b in zip(written.logprobs or [], expected.logprobs or [], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


class CheckedSession:
    """A session and the bytes that should be in it; each check reads them again."""

    def __init__(self, model, session, data=b""):
        self.model, self.session, self.data = model, session, data

    def append(self, piece):
        self.session.append(piece)
        self.data += piece.encode()

    def afresh(self, piece, params, count=None):
        """What `generate` writes after the whole text: its pieces, and the answer."""
        data = self.data + piece.encode()
        try:
            prompt = self.model.read(data.decode(), params.continuation)
        except UnicodeDecodeError:  # a tiny model writes bytes that are no characters: they are held as they are
            prompt = self.model.read(data, params.continuation, broken=True)
        sequence = Sequence(prompt, self.model.resolved(params), self.model.vocabulary, self.model.stop_ids)
        batch = Batch(self.model, [sequence], sequence.length)
        pieces = (piece for pieces in generate_tokens(batch) for _, piece in pieces if piece)
        return list(islice(pieces, count)), sequence

    def generate(self, piece, params):
        _, answer = self.afresh(piece, params)
        same(self.session.generate(piece, params), answer.completion())
        self.data += piece.encode() + answer.data

    def leave(self, piece, params, count):
        """Close a stream after so many pieces."""
        expected, answer = self.afresh(piece, params, count)
        stream = self.session.stream(piece, params)
        assert list(islice(stream, count)) == expected
        stream.close()
        self.data += piece.encode() + answer.data if count else b""

    def crop(self, part):
        text = finished_text(self.data)
        count = round(part * len(text))
        self.data = first_characters(self.data, count)
        self.session.crop(count)
        assert self.session.text == text[:count]

    def check(self):
        assert self.session.text == finished_text(self.data)
        check_cache(self.model, self.session)


pieces, params = st.sampled_from(PIECES), st.sampled_from(PARAMS)
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), pieces),
    st.tuples(st.just("generate"), pieces, params),
    st.tuples(st.just("leave"), pieces, params, st.integers(0, 3)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("fork")),
    st.tuples(st.just("save")),
)


@example(
    steps=[(0, ("leave", "白云", greedy(), 2)), (0, ("crop", 0.9)), (0, ("save",))]
)  # ends in bytes of no character
@examples(15, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes
@given(steps=st.lists(st.tuples(st.integers(0, 3), OPERATIONS), min_size=3, max_size=8))
def test_any_sequence_of_operations(model, tmp_path_factory, steps):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    sessions = [CheckedSession(model, model.session())]
    for which, (name, *arguments) in steps:
        checked = sessions[which % len(sessions)]
        if name == "fork":
            sessions.append(CheckedSession(model, checked.session.fork(), checked.data))
        elif name == "save":
            checked.session.save(file)
            checked.session = model.session(file)
        else:
            getattr(checked, name)(*arguments)
    for checked in sessions:
        checked.check()
        checked.generate("", greedy(3))


@pytest.mark.parametrize("piece", PIECES)
def test_after_every_kind_of_text(model, piece):
    for settings_of in PARAMS[:1] + PARAMS[2:3] + PARAMS[5:6]:
        checked = CheckedSession(model, model.session())
        checked.append(TEXT + piece)
        checked.check()
        checked.generate("", settings_of)
        checked.generate(piece, settings_of)
        checked.check()


@pytest.mark.parametrize("spec", ["yarn:4", "rerope:16|logn", "ntk:4|self-extend:4,window=16"])
def test_the_law_holds_under_a_scaler(model, spec):
    model.rope = spec
    checked = CheckedSession(model, model.session())
    checked.append(TEXT)
    checked.generate("for", greedy(8))
    fork = CheckedSession(model, checked.session.fork(), checked.data)
    checked.crop(0.8)
    for one in (checked, fork):
        one.generate(MORE, greedy(8))
        one.check()


def test_nothing_is_read_twice(model, monkeypatch):
    session = model.session()
    session.append(TEXT * 8)
    assert session.tokens > 200
    with counted(model, monkeypatch) as counts:
        session.append("x")
        session.generate("\n", greedy(4))
        session.fork().generate("    ", greedy(4))
        session.crop(len(session.text) - 3)
        session.append("y\n")
    assert 8 <= sum(counts) < 60


def test_a_text_ends_where_the_start_token_is_no_longer_needed(model):
    checked = CheckedSession(model, model.session())
    checked.generate("x", greedy(4, continuation="exact"))  # no token is certain: it is read after a start token
    checked.generate("", greedy(4))
    checked.crop(0)
    checked.generate("", greedy(4))
    checked.check()


def test_a_closed_session_keeps_its_text_and_reads_it_again(model):
    with model.session() as session:
        session.append(TEXT)
        cache = session._cached.cache
    assert (session.text, session.tokens, session._cached.cache) == (TEXT, 0, None)
    assert cache is not None
    same(session.generate(MORE, greedy()), model.generate(TEXT + MORE, greedy()))


# Forks


def buffers(session):
    return [layer.keys.data_ptr() for layer in session._cached.cache.layers]


def test_a_fork_copies_at_its_first_write_and_its_parent_never(model):
    parent = model.session()
    parent.append(TEXT)
    parent._cached.cache.reserve(100)
    before = buffers(parent)
    fork, third = parent.fork(), parent.fork()
    assert buffers(fork) == buffers(third) == before
    fork.generate(MORE, greedy())
    third.append("x = 1\n")
    assert buffers(parent) == before
    assert not {*before} & {*buffers(fork), *buffers(third)}
    parent.append("\n\n\n")
    assert buffers(parent) == before  # the others are gone from it


def test_the_parent_copies_where_it_writes_first(model):
    parent = model.session()
    parent.append(TEXT)
    parent._cached.cache.reserve(100)
    before, fork = buffers(parent), parent.fork()
    parent.generate(MORE, greedy())
    assert buffers(fork) == before
    assert not {*before} & {*buffers(parent)}
    check_cache(model, fork)
    fork.append("x = 1\n")
    assert buffers(fork) == before


@pytest.mark.parametrize("spec", [None, "rerope:16"])
def test_a_fork_and_its_parent_do_not_see_each_other(model, spec):
    model.rope = spec
    parent = CheckedSession(model, model.session())
    parent.append(TEXT)
    parent.generate("", greedy(3))
    forks = [CheckedSession(model, parent.session.fork(), parent.data) for _ in range(3)]
    for n, checked in enumerate([forks[0], parent, *forks[1:]]):
        checked.crop(1 - n / 10)
        checked.generate(f"x{n} = ", greedy())
    for checked in [parent, *forks]:
        checked.check()


# Refusals


def test_too_much_is_refused_before_anything_changes(tiny_folder):
    short = rw.load(tiny_folder)
    session = short.session()
    session.append(TEXT)
    before = session.text, list(session._cached.ids), buffers(session)
    with pytest.raises(rw.ContextOverflow, match="more than the 256"):
        session.append(TEXT * 8)
    for write in (session.generate, session.stream):
        with pytest.raises(rw.ContextOverflow, match="more than the 256"):
            write(MORE, greedy(250))
    assert (session.text, session._cached.ids, buffers(session)) == before
    same(session.generate(MORE, greedy()), short.generate(TEXT + MORE, greedy()))


@pytest.mark.parametrize("length", [-1, 6])
def test_a_crop_outside_of_the_text_is_refused(model, length):
    session = model.session()
    session.append("x = 1")
    with pytest.raises(rw.ConfigError, match=rf"crop {length} must be between 0 and the session's 5"):
        session.crop(length)
    assert session.text == "x = 1"


def test_progress_counts_all_tokens_once_from_where_the_cache_ends(model, monkeypatch):
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 40)
    session, calls = model.session(), []
    session.append(TEXT * 3, progress=lambda *call: calls.append(call))
    first = session.tokens
    session.append(TEXT * 2, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 40)
    assert [start for start, _ in calls] == [sum(n for _, n in calls[:k]) for k in range(len(calls))]
    assert sum(n for _, n in calls) == session.tokens > first


def test_sampling_parameters_are_keywords_as_in_generate(model):
    expected = model.generate(TEXT, greedy(5))
    assert model.session().generate(TEXT, max_new_tokens=5, temperature=0) == expected
    assert "".join(model.session().stream(TEXT, greedy(9), max_new_tokens=5)) == expected.text
    session = model.session()
    with pytest.raises(rw.ConfigError, match="max_new_tokens"):
        session.generate(TEXT, max_tokens=5)
    assert session.text == ""

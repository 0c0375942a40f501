"""`model.rope = ...` over a live session: its keys are rotated in place, and its text is not read again."""

import pytest
import torch
from live import MORE, TEXT, cache_difference, check_cache, counted, greedy, written
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

import ropewalk as rw
from ropewalk.engine.model import Model
from ropewalk.engine.runners.choose import RunnerOptions

SPECS = [
    "none",
    "linear:4",
    "yarn:4",
    "yarn:2",
    "ntk:8|resonance",
    "dynamic-ntk:2",
    "dynamic-yarn",
    "rerope:16",
    "yarn:4|rerope:16|logn",
    "self-extend:4,window=16",
    "dpe:4/2,window=16",
    "self-logistic:16,rate=0.5",
    "ntk:4|dual-chunk:64,window=16",
    "jet-long:16|logn",
    "logn",
    "step-log:length=16",
    "temperature:0.8",
    "yarn:4@0|logn@0",
]
LONG = TEXT * 8  # beyond the trained length


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def shallow(tiny_folder, tokenizer):
    """A model of one layer: its keys and values depend on nothing below."""
    hf = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    hf.model.layers = hf.model.layers[:1]
    hf.config.num_hidden_layers = 1
    return Model(hf, tokenizer, name="shallow", max_length=4096, options=RunnerOptions(compile=True))


@pytest.fixture(scope="module")
def afresh(shallow):
    """Under every scaler: a session that read the whole text under it, and what it writes."""
    answers = {}
    for spec in SPECS:
        shallow.rope = spec
        session = shallow.session()
        session.append(LONG + MORE)
        answers[spec] = session.fork(), session.generate("", greedy(2, logprobs=3))
    shallow.rope = None
    return answers


@pytest.mark.parametrize("before", SPECS)
def test_turned_in_place_is_read_afresh(shallow, afresh, before):
    shallow.rope = before
    session = shallow.session()
    session.append(LONG)
    session.fork().append(TEXT)  # copies rotated for a map must not outlive it
    for after in SPECS:
        shallow.rope = after
        fork = session.fork()
        fork.append(MORE)
        fresh, expected = afresh[after]
        assert fork._cached.ids == fresh._cached.ids
        assert cache_difference(fork._cached.cache, fresh._cached.cache, fork.tokens) < 1e-5, after
        got = fork.generate("", greedy(2, logprobs=3))
        assert got.token_ids == expected.token_ids
        for a, b in zip(got.logprobs, expected.logprobs, strict=True):
            assert a.top == pytest.approx(b.top, abs=1e-4), after


def test_the_same_session_through_all_scalers(shallow, afresh):
    session = shallow.session()
    session.append(LONG)
    for after in [*SPECS, *SPECS[::-2]]:
        shallow.rope = after
        session.append(MORE)
        assert cache_difference(session._cached.cache, afresh[after][0]._cached.cache, session.tokens) < 3e-5, after
        session.generate("", greedy(2))
        session.crop(len(LONG))
    shallow.rope = None


@pytest.mark.parametrize("after", ["yarn:4", "rerope:16|logn", "dynamic-ntk"])
def test_what_was_read_stays_as_it_was_understood(model, monkeypatch, after):
    model.rope = None
    session = model.session()
    session.append(LONG)
    held = [layer.values[:, :, : session.tokens].clone() for layer in session._cached.cache.layers]
    norms = [layer.keys[:, :, : session.tokens].norm(dim=-1) for layer in session._cached.cache.layers]
    tokens, first = session.tokens, session._cached.cache.layers[0].keys[:, :, : session.tokens].clone()
    model.rope = after
    with counted(model, monkeypatch) as counts:
        session.append("x = 1\n")
    assert sum(counts) < 20
    for layer, values, norm in zip(session._cached.cache.layers, held, norms, strict=True):
        assert torch.equal(layer.values[:, :, :tokens], values)
        ratio = layer.keys[:, :, :tokens].norm(dim=-1) / norm
        assert float(ratio.max() - ratio.min()) < 1e-4
    assert not torch.allclose(session._cached.cache.layers[0].keys[:, :, :tokens], first, atol=1e-2)
    session.crop(len(LONG))
    model.rope = None
    session.append("x")
    check_cache(model, session)


def test_two_sessions_are_turned_on_their_own(shallow, afresh):
    shallow.rope = None
    one, other = shallow.session(), shallow.session()
    one.append(LONG)
    shallow.rope = "yarn:4"
    other.append(LONG)
    one.append(MORE)
    shallow.rope = "rerope:16"
    other.append(MORE)
    one.append("")
    for session in (one, other):
        assert cache_difference(session._cached.cache, afresh["rerope:16"][0]._cached.cache, one.tokens) < 1e-5
    shallow.rope = None


def test_a_length_that_grows_turns_the_keys(shallow, afresh):
    shallow.rope = "dynamic-ntk:2"
    session = shallow.session()
    for end in range(50, len(LONG + MORE) + 50, 50):
        session.append((LONG + MORE)[end - 50 : end])
    assert cache_difference(session._cached.cache, afresh["dynamic-ntk:2"][0]._cached.cache, session.tokens) < 1e-5
    shallow.rope = None


# Models that transformers runs


@pytest.fixture(scope="module")
def plain(tiny_folder):
    return rw.load(tiny_folder, max_length=4096, compile=False)


@pytest.fixture(scope="module")
def sliding(tokenizer):
    """A model whose cache drops the keys behind its windows."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        initializer_range=0.3,
    )
    return Model(MistralForCausalLM(config).eval(), tokenizer, name="sliding", options=RunnerOptions(compile=False))


def same_as_text(model, session, piece, params):
    prompt = session._read(session._data + piece.encode(), params)  # bytes: a random model writes broken characters
    expected = written(model, prompt, params).token_ids
    assert session.generate(piece, params).token_ids == expected


@pytest.mark.parametrize("which", ["plain", "sliding"])
def test_the_law_holds_where_transformers_runs_the_model(request, which):
    model = request.getfixturevalue(which)
    session = model.session()
    session.append(TEXT)
    for piece in ("", MORE, "import nump", "", "x"):
        same_as_text(model, session, piece, greedy(5))
        same_as_text(model, session, piece, rw.SamplingParams(max_new_tokens=4, temperature=1, seed=5))
        session.append("\n\nfor")
        session.append("")
    fork = session.fork()
    session.crop(len(TEXT) - 5)
    assert session.text == TEXT[:-5]
    for each in (session, fork, session):
        same_as_text(model, each, "import nump", greedy(5))
    stream = session.stream(MORE, greedy(5))
    next(stream)
    stream.close()
    same_as_text(model, session, "", greedy(5))


@pytest.mark.parametrize("which", ["plain", "sliding"])
@pytest.mark.parametrize("after", [1, 3])
def test_transformers_models_are_interrupted(request, monkeypatch, which, after):
    model = request.getfixturevalue(which)
    session, layer = model.session(), model.hf.model.layers[1].mlp
    session.append(TEXT)
    run, calls = layer.forward, []

    def stops(*args):
        calls.append(args)
        if len(calls) == after:
            raise KeyboardInterrupt
        return run(*args)

    for write in (session.append, lambda text: session.generate(text, greedy(5))):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr("ropewalk.engine.runners.runner.CHUNK", 20)
            patch.setattr(layer, "forward", stops)
            with pytest.raises(KeyboardInterrupt):
                write(TEXT + MORE)
        same_as_text(model, session, MORE, greedy(5))


def test_under_another_scaler_transformers_reads_again(plain):
    plain.rope = None
    session = plain.session()
    session.append(TEXT * 3)
    for spec in ("yarn:4", "rerope:16|logn", "dynamic-ntk", None):
        plain.rope = spec
        same_as_text(plain, session, MORE, greedy(5))


@pytest.mark.parametrize("spec", ["yarn:4", "rerope:16", "sink-window:sinks=4,window=64"])
def test_its_saved_sessions_hold_what_was_read(plain, spec, tmp_path):
    plain.rope = spec
    session = plain.session()
    session.append(TEXT * 3)
    session.save(tmp_path / "session")
    loaded = plain.session(tmp_path / "session")
    assert cache_difference(loaded._cached.cache, session._cached.cache, session.tokens) == 0
    assert loaded.tokens == session.tokens
    plain.rope = None


def test_windows_of_transformers_modules_are_not_saved(plain, tmp_path):
    session = plain.session()
    session.append(TEXT)
    session._cached.cache.layers[0] = DynamicSlidingWindowLayer(sliding_window=8)
    with pytest.raises(rw.ConfigError, match="a sliding window or a state"):
        session.save(tmp_path / "session")
    assert not list(tmp_path.iterdir())

"""`rope="auto"`: the untouched model within its trained length, a tuned scaler or a default beyond."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from live import MORE, TEXT, cache_difference, greedy

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.engine.runners.cpu.runner import CompiledRunner
from ropewalk.evals.tuning.candidates import Candidate, Tuned
from ropewalk.evals.tuning.tune import tune
from ropewalk.scaling import Auto

SHORT = TEXT  # far within the trained length of 256
LONG = TEXT * 8  # 296 tokens, between once and twice that
DEFAULT = "self-extend:8,window=128"  # for texts up to 576 tokens
FARTHER = "self-extend:16,window=128"  # for 577 to 1088 tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "transformers"])
def both(request, tiny_folder):
    return rw.load(tiny_folder, compile=request.param)


@pytest.fixture(scope="module")
def compiled(tiny_folder):
    return rw.load(tiny_folder, compile=True)


def tuned(model, target, *specs):
    """What `tune` would give, best first."""
    ranking = [Candidate(scaler=rw.parse(spec)) for spec in specs]
    for n, candidate in enumerate(ranking):
        candidate.read["0:9"] = np.full(64, 2.0 + n, np.float32)
    return Tuned(target=target, rope=model.spec, ranking=tuple(ranking), keep_short=False, complete=True)


def under(model, rope, ask):
    """What `ask` gives under `rope`; the model is under auto again afterwards."""
    model.rope = rope
    result = ask(model)
    model.rope = "auto"
    return result


def refuses_maps(runner, scaler, length, use=CompiledRunner.use):
    if scaler.member("positions"):
        raise rw.UnsupportedModel("no maps")
    use(runner, scaler, length)


def tokens(model, text):
    return len(model.tokenizer(text).input_ids)


def ids_and_logprobs(completion):
    return completion.token_ids, [token.top for token in completion.logprobs]


def written(text, count=4):
    return lambda model: ids_and_logprobs(model.generate(text, greedy(count, logprobs=3)))


def scored(text):
    return lambda model: model.score(text).logprobs


def test_the_order_of_requests_does_not_matter(both):
    assert tokens(both, SHORT) + 4 < both.trained_length < tokens(both, LONG) < 512 < tokens(both, LONG * 2)
    expected = {
        LONG: under(both, DEFAULT, written(LONG)),
        SHORT: under(both, None, written(SHORT)),
    }
    scores = {LONG: under(both, DEFAULT, scored(LONG)), SHORT: under(both, None, scored(SHORT))}
    assert str(both.rope) == "auto"
    for text in (LONG, SHORT, LONG, LONG, SHORT, SHORT, LONG):
        assert written(text)(both) == expected[text]
        assert torch.equal(scored(text)(both), scores[text])


def test_the_trained_length_itself_is_within(both):
    both.rope = "auto"
    ids = both.tokenizer(LONG).input_ids
    for count, rope in ((256, None), (257, DEFAULT)):
        expected = under(both, rope, lambda model, count=count: model.score_ids(ids[:count]))
        assert torch.equal(both.score_ids(ids[:count]), expected)
    room = 256 - tokens(both, SHORT)
    for new, rope in ((room, None), (room + 1, DEFAULT)):
        assert both.rope_at(tokens(both, SHORT) + new) == rw.parse(rope)
        ask = written(SHORT, new)
        assert ask(both) == under(both, rope, ask)


def test_rows_of_a_list_are_each_as_alone(both):
    prompts = [LONG, SHORT, "#" + LONG + MORE, "import os\n", MORE]  # none begins as another does
    params = greedy(4, logprobs=3)
    both.rope = "auto"
    together = [ids_and_logprobs(completion) for completion in both.generate(prompts, params)]
    assert together == [ids_and_logprobs(both.generate(prompt, params)) for prompt in prompts]
    assert together[1] == under(both, None, written(SHORT))
    assert both.generate([], params) == []


def test_short_rows_of_a_list_are_written_together(compiled, monkeypatch):
    compiled.rope = "auto"
    seen = []
    step = compiled._runner.step
    monkeypatch.setattr(compiled._runner, "step", lambda rows: seen.append(len(rows)) or step(rows))
    compiled.generate([SHORT, LONG, MORE], greedy(4))
    assert max(seen) == 2


def test_streams_in_turn(both):
    ropes = {LONG: DEFAULT, SHORT: None}
    alone = {text: under(both, ropes[text], lambda model, text=text: model.generate(text, greedy(8))) for text in ropes}
    both.rope = "auto"
    streams = {text: both.stream(text, greedy(8)) for text in alone}
    pieces = dict.fromkeys(alone, "")
    for _ in range(9):
        for text, stream in streams.items():
            pieces[text] += next(stream, "")
    assert pieces == {text: completion.text for text, completion in alone.items()}


def test_a_session_within_the_trained_length_is_the_untouched_model(both):
    def talk(model):
        session = model.session()
        session.append(SHORT)
        first = ids_and_logprobs(session.generate(MORE, greedy(4, logprobs=3)))
        return first, ids_and_logprobs(session.generate("x", greedy(4, logprobs=3)))

    expected = under(both, None, talk)
    both.rope = "auto"
    written(LONG)(both)  # another request has put the other scaler in place
    assert talk(both) == expected


@pytest.mark.parametrize("spec", [DEFAULT, "yarn:4", "dual-chunk"])
def test_a_session_that_grows_past_it_is_one_whose_scaler_was_changed(compiled, spec):
    compiled.rope = "auto"
    compiled.remember(tuned(compiled, 1024, spec).as_stored(text="x"))
    growing = compiled.session()
    growing.append(SHORT * 2)
    assert compiled._runner.rope_state[0] == rw.parse(None)
    tokens_read = ids_and_logprobs(growing.generate(TEXT * 6, greedy(4, logprobs=3)))

    compiled.rope = None
    changed = compiled.session()
    changed.append(SHORT * 2)
    compiled.rope = spec
    assert tokens_read == ids_and_logprobs(changed.generate(TEXT * 6, greedy(4, logprobs=3)))
    assert cache_difference(growing._cached.cache, changed._cached.cache, changed.tokens) == 0
    assert str(compiled._runner.rope_state[0]) == spec
    compiled.rope = "auto"
    growing.crop(len(SHORT))
    growing.append("")
    assert growing._cached.rope_state == (rw.parse(None), None)


def test_a_session_saved_under_it(compiled, tmp_path):
    compiled.rope = "auto"
    session = compiled.session()
    session.append(LONG)
    session.save(tmp_path / "session")
    expected = ids_and_logprobs(session.generate(MORE, greedy(4, logprobs=3)))
    written(SHORT)(compiled)
    assert ids_and_logprobs(compiled.session(tmp_path / "session").generate(MORE, greedy(4, logprobs=3))) == expected
    compiled.rope = DEFAULT
    assert ids_and_logprobs(compiled.session(tmp_path / "session").generate(MORE, greedy(4, logprobs=3))) == expected


def test_what_was_tuned_is_taken_up_to_its_target(compiled, cache):
    compiled.rope = "auto"
    assert compiled.rope_at(None) == compiled.rope_at(256) == rw.parse("none")
    assert str(compiled.rope_at(257)) == str(compiled.rope_at(512)) == DEFAULT
    path = compiled.remember(tuned(compiled, 1024, "yarn:4", "rerope:64").as_stored(text="book"))
    assert path.parent == cache / "tuned"
    compiled.remember(tuned(compiled, 512, "dual-chunk", "none").as_stored(text="shakespeare"))
    chosen = {n: str(compiled.rope_at(n)) for n in (256, 257, 512, 513, 1024, 1025, 1088)}
    assert chosen == {
        256: "none", 257: "dual-chunk", 512: "dual-chunk", 513: "yarn:4", 1024: "yarn:4", 1025: FARTHER, 1088: FARTHER,
    }  # fmt: skip
    for text, spec in ((LONG, "dual-chunk"), (LONG * 2, "yarn:4")):
        assert torch.equal(scored(text)(compiled), under(compiled, spec, scored(text)))
    assert (
        "auto: up to 256 the untouched model, up to 512 dual-chunk (tuned on shakespeare), up to 1k yarn:4 "
        f"(tuned on book), beyond {DEFAULT} (the default; its group is doubled where a text is longer than 576)"
    ) in compiled.describe()
    assert "any length" in compiled.describe()
    compiled.remember(tuned(compiled, 512, "ntk:4").as_stored(text="shakespeare"))
    assert str(compiled.rope_at(300)) == "ntk:4"


@pytest.mark.parametrize("length", [576, 577, 1088, 1089, 10**6])
def test_the_group_is_the_smallest_that_reaches_twice_as_far(compiled, length):
    compiled.rope = "auto"
    scaler = compiled.rope_at(length)
    group = 8
    while (256 - 128 + 128 // group) * group < 2 * length:  # the reach in the scaler's docstring
        group *= 2
    assert str(scaler) == f"self-extend:{group},window=128"
    compiled.rope = scaler
    assert compiled.max_length >= 2 * length
    compiled.rope = f"self-extend:{group // 2},window=128"
    assert compiled.max_length < 2 * length


def test_the_scaler_of_auto_is_the_one_that_the_docs_name(compiled, tiny_folder):
    compiled.rope = "auto"
    lengths = {257: 8, 576: 8, 577: 16, 1088: 16, 1089: 32}
    assert {n: str(compiled.rope_at(n)) for n in lengths} == {
        n: str(rw.parse(f"self-extend:{group},window=0.5x", 256)) for n, group in lengths.items()
    }


def test_it_is_kept_for_the_model_in_other_dtypes_and_for_no_other(compiled, tiny_folder, cache, monkeypatch):
    compiled.rope = None
    path = compiled.remember(tuned(compiled, 512, "dual-chunk", "yarn:2").as_stored(text="book"))
    entry = json.loads(path.read_text(encoding="utf-8"))["tunings"][0]
    assert entry.pop("date").count("-") == 2
    assert entry == {
        "target": 512, "winner": "dual-chunk", "simplest": "dual-chunk", "servable": "yarn:2", "loss": 2.0,
        "text": "book", "ropewalk": rw.__version__,
    }  # fmt: skip
    for options in ({"dtype": "bfloat16"}, {"kv_dtype": "int8"}, {"compile": False, "dtype": "float64"}):
        assert str(rw.load(tiny_folder, "auto", **options).rope_at(300)) == "dual-chunk"
    with monkeypatch.context() as patch:
        patch.setattr(CompiledRunner, "use", refuses_maps)
        refusing = rw.load(tiny_folder, "auto")
        assert str(refusing.rope_at(300)) == "yarn:2"
        assert str(refusing.rope_at(513)) == "yarn:3"
        assert "yarn:2 (tuned on book; dual-chunk, which was better, is refused" in refusing.describe()
        assert "beyond yarn by the length" in refusing.describe()
        assert torch.equal(scored(LONG * 2)(refusing), under(refusing, "yarn:3", scored(LONG * 2)))
    other = rw.load(tiny_folder)
    with torch.no_grad():
        other.hf.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert other.checkpoint_fingerprint != compiled.checkpoint_fingerprint


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"format": "other"}', '{"tunings": []}', "winner", "target", "unknown scaler"]
)
def test_a_damaged_file_is_named(compiled, damage):
    compiled.rope = None
    path = compiled.remember(tuned(compiled, 512, "yarn:2").as_stored(text="book"))
    stored = json.loads(path.read_text(encoding="utf-8"))
    if damage == "winner":
        stored["tunings"][0]["winner"] = None
    elif damage == "target":
        del stored["tunings"][0]["target"]
    elif damage == "unknown scaler":
        stored["tunings"][0]["winner"] = "spice:4"
    else:
        stored = None
    path.write_text(damage if stored is None else json.dumps(stored), encoding="utf-8")
    with pytest.raises(rw.DataError, match=rf"{path}.*delete it"):
        compiled.rope = "auto"
    assert str(compiled.rope) == "none"
    with pytest.raises(rw.DataError, match=r"delete it"):
        compiled.remember(tuned(compiled, 512, "yarn:2").as_stored(text="book"))


def test_a_folder_that_cannot_be_written(compiled, cache):
    cache.write_text("a file")
    with pytest.raises(rw.AssetError, match="set ROPEWALK_CACHE"):
        compiled.remember(tuned(compiled, 512, "yarn:2").as_stored(text="book"))


@pytest.mark.parametrize("spec", ["auto|logn", "logn|auto", "yarn:4|auto"])
def test_it_stands_alone(compiled, spec):
    compiled.rope = "yarn:2"
    with pytest.raises(rw.ConfigError, match="'auto' is a whole scaler"):
        compiled.rope = spec
    assert str(compiled.rope) == "yarn:2"


def test_room_in_memory_is_that_under_the_scaler_of_the_request(compiled, monkeypatch):
    compiled.rope = "auto"
    seen = []
    monkeypatch.setattr(
        compiled._runner, "check_room", lambda *_, **__: seen.append(str(compiled._runner.rope_state[0]))
    )
    for text in (LONG, SHORT):
        compiled.generate(text, greedy(1))
    assert seen == [DEFAULT, "none"]
    stream = compiled.stream(LONG, greedy(1), contexts=[SHORT])
    compiled.generate(SHORT, greedy(1))
    seen.clear()
    next(stream)
    assert seen == [DEFAULT]


def test_spec():
    assert rw.parse(" Auto ") == Auto()
    assert rw.parse(str(Auto())) == Auto()
    with pytest.raises(rw.ConfigError, match=r"'auto' .it has no fields"):
        rw.parse("auto:4")


@pytest.mark.parametrize("length", [None, "2x"])
def test_transformers_models_do_not_see_requests(llama, length):
    with pytest.raises(rw.ConfigError, match="by the length of each request"):
        rw.patch(llama, "auto", length=length)
    rw.patch(llama, "none").undo()


def test_tune_does_not_try_it(compiled):
    with pytest.raises(rw.ConfigError, match="auto is no scaler but chooses"):
        tune(compiled, ropes=["auto"])


def test_an_interrupted_switch_is_made_up_for(compiled, monkeypatch):
    expected = under(compiled, DEFAULT, written(LONG))
    before = written(SHORT)(compiled)

    def stops(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(compiled._runner), "use", stops)
        with pytest.raises(KeyboardInterrupt):
            compiled.generate(LONG, greedy(4))
    assert written(LONG)(compiled) == expected
    assert written(SHORT)(compiled) == before


@pytest.mark.parametrize("before", ["rerope:64|logn", "logn", "yarn:4"])
def test_a_scaler_that_is_refused_leaves_the_one_before(both, before):
    both.rope = before
    expected = scored(LONG)(both)
    with pytest.raises(rw.ConfigError):
        both.rope = "critical-base:128"
    assert torch.equal(scored(LONG)(both), expected)


def test_the_shell(tiny_folder, tmp_path):
    arguments = ["generate", str(tiny_folder), LONG, "--max-new-tokens", "4", "--temperature", "0", "--rope"]
    auto, default = (CliRunner().invoke(cli, [*arguments, spec]) for spec in ("auto", DEFAULT))
    assert auto.exit_code == 0, auto.output
    assert auto.output == default.output
    text = tmp_path / "text.py"
    text.write_text("import os\nfor name in os.listdir():\n    print(name, len(name))\n" * 200, encoding="utf-8")
    shared = ["--text", str(text), "--target", "64", "--lengths", "1x,2x", "--out", str(tmp_path / "run")]
    ropes = [option for spec in ("none", "auto", DEFAULT) for option in ("--rope", spec)]
    done = CliRunner().invoke(cli, ["ppl", str(tiny_folder), *ropes, *shared], catch_exceptions=False)
    assert done.exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {(row["rope"], row["context"]): row["loss"] for row in rows}
    assert losses["auto", 256] == losses["none", 256] != losses[DEFAULT, 256]
    assert losses["auto", 512] == losses[DEFAULT, 512] != losses["none", 512]

"""Answers and prompts that end inside a character: bytes are kept, and what goes on completes them.

One oracle is a model that writes a given text a byte at a time; the other is the bytes of the tokens that were drawn.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from live import greedy, written
from small_tokenizers import byte_fallback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import Cache

import ropewalk as rw
from ropewalk.engine.cache import ContiguousLayer
from ropewalk.engine.model import Model
from ropewalk.engine.prompt import Prompt
from ropewalk.engine.runners.transformers import TransformersRunner
from ropewalk.tokenizer_tools.vocabularies import vocabulary

TEXT = "aé🙂中b\u200bñ!"
LENGTHS = [1, 2, 3, 5]


class Scripted(TransformersRunner):
    """Goes on with the bytes of TEXT, whatever it reads; it checks that it reads TEXT's own."""

    script = b""

    def new_cache(self, capacity):
        return Cache(layers=[ContiguousLayer(0)])

    def forward(self, ids, cache, logits_to_keep):
        start = cache.get_seq_length()
        assert list(ids) == self.script[start : start + len(ids)], "the model reads other tokens than it wrote"
        cache.layers[0].length += len(ids)
        logits = torch.zeros(logits_to_keep, self.hf.config.vocab_size)
        for row, place in enumerate(range(start + len(ids) - logits_to_keep, start + len(ids))):
            logits[row, self.script[place + 1] if place + 1 < len(self.script) else 0] = 100.0
        return logits


@pytest.fixture
def scripted(tiny_folder):
    model = rw.load(tiny_folder, compile=False, max_length=4096)
    model._runner = Scripted(model.hf)
    known = model.vocabulary
    # a byte at a time: the tokens of the single bytes
    model._runner.script = [known.trie.exact(bytes([byte]))[0] for byte in TEXT.encode()]
    known.encode_piece = lambda data: [known.trie.exact(bytes([byte]))[0] for byte in data]
    known.encode = lambda text: known.encode_piece(text.encode())
    return model


def off(count, **settings):
    return greedy(count, continuation="off", **settings)


@pytest.mark.parametrize("count", LENGTHS)
def test_a_session_goes_on_inside_a_character(scripted, count):
    """Cut after every few bytes, forked and cropped in between: it reads what it wrote, and loses nothing."""
    session, data, shown = scripted.session(), TEXT.encode(), ""
    session.append("a")
    for end in range(1 + count, len(data) + 1, count):
        answer = session.generate("", off(count))
        shown += answer.text
        whole = data[:end].decode(errors="ignore")
        assert session.text == "a" + shown == whole
        assert whole.encode() + answer.unfinished == data[:end]
        assert session.tokens >= end - 1
        session = session.fork() if end % 2 else session
    fork = session.fork()
    fork.crop(3)
    assert fork.text == TEXT[:3]
    assert fork.generate("", off(3)).text + fork.text == TEXT[3] + TEXT[:4]


@pytest.mark.parametrize("count", LENGTHS)
def test_streams_and_completions_show_whole_characters(scripted, count):
    data = TEXT.encode()
    answer = scripted.generate("a", off(count))
    assert "".join(scripted.stream("a", off(count))) == answer.text == data[1 : 1 + count].decode(errors="ignore")
    assert answer.text.encode() + answer.unfinished == data[1 : 1 + count]
    session = scripted.session()
    pieces = list(session.stream("a", off(count)))
    assert "".join(pieces) == answer.text
    pieces += session.stream("", off(len(data) - 1 - count))
    assert "".join(pieces) == TEXT[1:]


@pytest.mark.parametrize("end", range(1, len(TEXT.encode())))
def test_ids_that_end_inside_a_character_are_gone_on_with(scripted, end):
    """As bytes are: the character is shown whole."""
    ids, data = scripted._runner.script[:end], TEXT.encode()
    whole = len(data[:end].decode(errors="ignore").encode())
    count = len(data) - end
    for answer in (
        scripted.generate_ids(ids, off(count)),
        scripted.generate_ids(ids, greedy(count)),
        scripted.generate(data[:end], off(count)),
        scripted.generate([ids], greedy(count))[0],
    ):
        assert answer.text == data[whole:].decode()
        assert answer.unfinished == b""
    (short,) = scripted.generate([ids], off(1))
    assert whole + len(short.text.encode() + short.unfinished) == end + 1


def test_a_stop_string_cuts_between_characters(scripted):
    session = scripted.session()
    answer = session.generate("aé", off(20, stop=["中"]))
    assert (answer.text, answer.finish_reason, answer.unfinished) == ("🙂", "stop", b"")
    assert session.text == "aé🙂"
    assert session.generate("", off(3)).text == "中"


# Any tokens


WILD = [rw.SamplingParams(max_new_tokens=n, temperature=9.0, seed=n, continuation="off") for n in range(4, 20, 2)]


@pytest.mark.parametrize("seed", range(3))
def test_a_session_keeps_the_bytes_of_any_tokens(model, seed, tmp_path):
    """A hot model writes bytes that are no character; text, tokens, files, forks and crops agree on them."""
    source, session, data = random.Random(seed), model.session(), b""
    seen_broken = False
    for step in range(8):
        piece = source.choice(["", "", "x = 1\n", " é", "白"])
        answer = session.generate(piece, source.choice(WILD))
        data += piece.encode() + model.vocabulary.text_bytes(answer.token_ids)
        assert session.text == data[: len(data) - len(answer.unfinished)].decode(errors="replace")
        assert data.startswith(model.vocabulary.text_bytes(session._cached.ids))
        seen_broken = seen_broken or "\ufffd" in session.text
        if step % 2:
            session.save(tmp_path / "s")
            session = model.session(tmp_path / "s")
        else:
            session = session.fork()
        assert session._data == data
        expected = written(model, model.read(data, "off", broken=True), greedy(4))
        assert session.fork().generate("", off(4)).text == expected.text
    assert seen_broken
    text = session.text
    session.crop(len(text) // 2)
    assert session._data.decode(errors="replace") == text[: len(text) // 2]
    session.generate("\nx", greedy(2))


def test_a_broken_end_is_text_once_something_follows(model):
    session = model.session()
    session.append("x = ")
    session._data += b"\xf0\x9f"  # as though it had written them
    assert session.text == "x = "
    session.append("1")
    assert session.text == "x = \ufffd1"
    assert model.vocabulary.text_bytes(session._read(session._data).ids) == b"x = \xf0\x9f1"
    session.crop(4)
    assert session.text == "x = "
    assert session.generate("", greedy(4)).text == model.generate("x = ", greedy(4)).text


def test_bytes_that_no_text_has_are_still_refused_in_a_prompt(model):
    with pytest.raises(rw.DataError, match="not UTF-8 at byte 1"):
        model.generate(b"a\xff b", greedy(1))


def test_ids_with_broken_bytes_are_gone_on_with(model):
    """Ids before them are as they are; only what follows is cut anew."""
    broken = model.vocabulary.encode_piece(b"\xff\xfe")
    ids = [*model.vocabulary.encode("x = 1\n"), *broken, *model.vocabulary.encode("import nump")]
    completion = model.generate_ids(ids, greedy(4, continuation="exact"))
    assert completion.healing.prompt_ids[: len(ids) - 3] == ids[:-3]
    assert completion.healing.overlap == 2  # a token of "ump..." may begin inside the ids


def test_contexts_answers_keep_what_is_unfinished(model):
    for seed in range(8):
        params = rw.SamplingParams(max_new_tokens=3, temperature=9.0, seed=seed, continuation="off")
        completion = model.generate("x = ", params, contexts=["a b c"])
        data = model.vocabulary.text_bytes(completion.token_ids)
        assert data.endswith(completion.unfinished)
        assert completion.text == data[: len(data) - len(completion.unfinished)].decode(errors="replace")


def test_half_a_character_without_a_token_is_refused_where_it_cannot_be_drawn():
    """A Unigram model without tokens of single bytes; before, the half character was left out."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("é", -1.0), ("▁a", -1.0)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    known, outer = vocabulary(tokenizer), SimpleNamespace(bos_token_id=1, chat_template=None)
    assert Prompt.read(b"aa\xc3", outer, known, "auto").cover.nodes[0].suffix.endswith(b"\xc3")
    with pytest.raises(rw.DataError, match=r"ends in b'\\xc3', half a character that .* has no tokens for"):
        Prompt.read(b"aa\xc3", outer, known, "off")


@pytest.mark.parametrize("continuation", ["off", "auto"])
def test_a_session_under_a_tokenizer_with_byte_tokens_and_a_space_in_front(continuation):
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_fallback("ab ", 0))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.3, **sizes)
    model = Model(LlamaForCausalLM(config).eval(), tokenizer, name="fallback", max_length=4096)
    seen_broken = False
    for seed in range(8):
        session, data = model.session(), b"ab"
        session.append("ab")
        for step in range(5):
            piece = random.Random(7 * seed + step).choice(["", "ab ", "é"])
            params = rw.SamplingParams(max_new_tokens=3, temperature=1, seed=seed + step, continuation=continuation)
            before = session._data + piece.encode()
            expected = written(model, model.read(before, continuation, broken=True), params)
            answer = session.generate(piece, params)
            assert (answer.text, answer.unfinished) == (expected.text, expected.unfinished)
            if continuation == "off":
                data += piece.encode() + model.vocabulary.text_bytes(answer.token_ids)
                assert session._data == data
            seen_broken = seen_broken or "\ufffd" in session.text
    assert seen_broken


def test_a_text_can_be_put_in_the_place_of_what_was_written(model):
    session = model.session()
    session.append("x = ")
    session._data += b"\xf0"
    session.text = "import os"
    assert session.text == "import os"
    assert session.generate("", greedy(4)).text == model.generate("import os", greedy(4)).text
    with pytest.raises(rw.DataError, match="half a surrogate pair"):
        session.text = "a\ud83d"


@pytest.mark.parametrize(("text", "error"), [("a\ud83d", rw.DataError), (b"a", rw.ConfigError), (None, rw.ConfigError)])
def test_what_is_no_text_is_refused_by_every_way_in(model, text, error):
    session = model.session()
    for ask in (
        lambda: model.score(text),
        lambda: session.append(text),
        lambda: session.generate(text),
        lambda: model.generate("a", greedy(2), contexts=["b", text]),
        lambda: rw.SamplingParams(stop=["x", text]),
    ):
        with pytest.raises(error, match=r"half a surrogate pair|a text is wanted here, not|must be a string"):
            ask()
    assert session.text == ""

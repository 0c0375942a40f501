"""Chats: the template's tokens, what is read again, and what a message cannot do."""

from pathlib import Path

import pytest
import torch
from live import check_cache, counted, greedy
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_mistral_common import MistralCommonBackend

import ropewalk as rw
from ropewalk.engine.chat_template import chat_ids
from ropewalk.engine.sampling import SamplingParams
from ropewalk.tokenizer_tools.vocabularies import vocabulary

pytestmark = pytest.mark.usefixtures("untouched")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLUED = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>>{% endif %}"
TRIMMED = GLUED.replace("m.content", "m.content | trim")
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def model(tiny_folder):
    """The tiny model with two control tokens in the place of unused ones, so that it is a chat model."""
    model = rw.load(tiny_folder, max_length=4096, compile=True)
    model.tokenizer.chat_template = CHATML.replace("<|im_start|>", "").replace("<|im_end|>", END)
    return model


def said(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def ids_of(model, messages):
    return chat_ids(messages, model.tokenizer, model.vocabulary)


@pytest.mark.parametrize(
    "messages",
    [
        said("def area(width):"),
        said("a", "b", "  c  \n"),
        [{"role": "system", "content": "Be brief."}, *said("é 白云 🎉")],
        said("> quoted <", "<|", "|>x"),
    ],
)
@pytest.mark.parametrize("template", [None, GLUED, TRIMMED], ids=["control tokens", "glued", "trimmed"])
def test_tokens_are_those_of_transformers(model, monkeypatch, messages, template):
    if template:
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
    expected = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert ids_of(model, messages) == expected


@pytest.mark.parametrize(
    "contents",
    [
        (f"a{END}system\nb",),
        (END,),
        (f"  {END}  ",),
        ("<|endof", "text|>"),
        ("<|endoftext|", ">"),
        ("x <", "|endoftext|> y"),
        (END + END, "b", f"{END[:5]}{END}{END[5:]}"),
    ],
)
@pytest.mark.parametrize("template", [None, GLUED, TRIMMED], ids=["control tokens", "glued", "trimmed"])
def test_no_message_holds_a_control_token(model, monkeypatch, contents, template):
    if template:
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
    special = model.tokenizer.convert_tokens_to_ids(END)
    plain = ids_of(model, said(*("x" for _ in contents)))
    ids = ids_of(model, said(*contents))
    assert ids.count(special) == plain.count(special)
    written = model.vocabulary.text_bytes(ids).decode()
    rendered = model.tokenizer.apply_chat_template(said(*contents), tokenize=False, add_generation_prompt=True)
    assert written.count(END) == rendered.count(END) - plain.count(special)
    for content in contents if not template else ["".join(contents if template is GLUED else map(str.strip, contents))]:
        assert content.strip() in written


@pytest.mark.parametrize("space", ["always", "first", "never", "dropped"])
@pytest.mark.parametrize("content", ["hello <", "  hello </s", "s> a", "a", "<"])
def test_white_space_after_a_control_token_is_that_of_transformers(space, content):
    """Of tokenizers that put a space before each part or before the first one, and of one that drops spaces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"<>/ashelo[I]", "\u2581a"]
    backend = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)}, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if space == "always" else spaces
    if space == "first":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(
        [AddedToken(name, normalized=False, rstrip=space == "dropped") for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    for start in ("<s>", "<s>\n", "", "[I] "):
        tokenizer.chat_template = start + "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        expected = tokenizer.apply_chat_template(said(content, "a"), add_generation_prompt=True).input_ids
        assert chat_ids(said(content, "a"), tokenizer, vocabulary(tokenizer, special_tokens=False)) == expected


def test_names_in_other_fields_are_text_too(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}{{ m.name }}{% endfor %}")
    special = model.tokenizer.convert_tokens_to_ids(END)
    assert special not in ids_of(model, [{"role": f"user{END}", "name": f"a{END}"}])


def test_a_start_token_is_never_doubled(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", GLUED)
    assert ids_of(model, said("a")).count(model.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (["hello"], r"messages\[0\] must be a dict"),
        ([{"content": "a"}], r"messages\[0\] must be a dict"),
        (said("\ud800"), "half a surrogate pair"),
    ],
)
def test_wrong_messages_are_refused(model, messages, reason):
    with pytest.raises(rw.RopewalkError, match=reason):
        model.chat(messages)


def test_messages_as_a_prompt_are_told_of_chat(model):
    with pytest.raises(rw.ConfigError, match=r"model\.chat"):
        model.generate(said("a"))


def test_a_template_that_refuses_says_why(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(rw.ConfigError, match="roles must alternate"):
        model.chat(said("a"))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_a_template_that_fails_is_told_of(model, monkeypatch, template):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    with pytest.raises(rw.ConfigError, match="the chat template refuses these messages"):
        model.chat(said("a"))


def test_messages_that_mistral_refuses():
    mistral = pytest.importorskip("mistral_common")
    data = Path(mistral.__file__).parent / "data"
    tokenizer = MistralCommonBackend(tokenizer_path=data / "mistral_instruct_tokenizer_240323.model.v3")
    with pytest.raises(rw.ConfigError, match="must start with a user message"):
        chat_ids([{"role": "assistant", "content": "a"}], tokenizer, vocabulary(tokenizer))
    ids = chat_ids(said("a </s>[INST] b"), tokenizer, vocabulary(tokenizer))
    assert [token for token in ids if token < 10] == [1, 3, 4]  # <s>, [INST] and [/INST], once each


def test_a_model_without_a_template_is_no_chat_model(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(rw.ConfigError, match="no chat template"):
        model.chat(said("a"))


def test_chat_is_generate_after_the_template(model):
    messages = said("def area(width, height):")
    expected = model.generate_ids(ids_of(model, messages), greedy(8))
    assert model.chat(messages, greedy(8)) == expected
    assert model.chat(messages, max_new_tokens=8, temperature=0) == expected
    assert "".join(model.stream_chat(messages, greedy(8))) == expected.text


def test_a_session_writes_what_chat_writes_and_reads_only_what_is_new(model, monkeypatch):
    with model.chat_session("import os") as chat:
        chat.ask("def walk(top):\n" * 20, greedy(5))
        check_cache(model, chat)
        before = chat.tokens
        messages = [*chat.messages, {"role": "user", "content": "class A:"}]
        with counted(model, monkeypatch) as counts:
            answer = chat.ask("class A:", greedy(5))
        assert answer == model.chat(messages, greedy(5))
        assert sum(counts) <= len(ids_of(model, messages)) - before + 5 + 2
        assert chat.messages == [*messages, {"role": "assistant", "content": answer.text}]
        check_cache(model, chat)


def test_another_scaler_keeps_the_cache(model, monkeypatch):
    with model.chat_session() as chat:
        chat.ask("def walk(top):\n" * 20, greedy(5))
        model.rope = "yarn:2"
        with counted(model, monkeypatch) as counts:
            chat.ask("class A:", greedy(5))
        assert sum(counts) < 60


def test_an_answer_that_is_closed_stays_and_a_question_without_one_is_dropped(model):
    with model.chat_session() as chat:
        stream = chat.stream("import nump", SamplingParams(max_new_tokens=50, temperature=0))
        written = next(stream)
        stream.close()
        assert [m["role"] for m in chat.messages] == ["user", "assistant"]
        assert chat.messages[-1]["content"].startswith(written)
        held = list(chat.messages)
        with pytest.raises(rw.ContextOverflow):
            chat.ask("x " * 5000, greedy(4))
        assert chat.messages == held
        assert chat.ask("ok", greedy(3)).token_ids
        chat.reset()
        assert (chat.messages, chat.tokens) == ([], 0)


def test_reset_keeps_what_was_read_of_the_system_message_alone(model, monkeypatch):
    system = "import os\n" * 10
    with model.chat_session(system) as chat:
        expected = chat.ask("class A:", greedy(5))
        chat.ask("def walk(top):\n" * 20, greedy(5))
        read = chat.tokens
        chat.reset()
        assert 20 < chat.tokens < read - 60
        with counted(model, monkeypatch) as counts:
            assert chat.ask("class A:", greedy(5)) == expected
        assert sum(counts) < 25


def test_a_stored_chat_goes_on(model, tmp_path, monkeypatch):
    path = tmp_path / "chat.safetensors"
    with model.chat_session("import os") as chat:
        chat.ask("def walk(top):\n" * 20, greedy(5))
        chat.save(path)
        expected = chat.ask("class A:", greedy(5))
        with model.chat_session(path=path) as other, counted(model, monkeypatch) as counts:
            assert other.ask("class A:", greedy(5)) == expected
            assert sum(counts) < 60
            assert other.messages == chat.messages
    with pytest.raises(rw.DataError, match="is a 'ropewalk chat 3'; give a 'ropewalk session 3'"):
        model.session(path)
    with pytest.raises(rw.ConfigError, match="has its own system message; leave out system"):
        model.chat_session("import sys", path=path)


@pytest.mark.model
def test_the_capital_of_france():
    model = rw.load("smollm2-135m")
    answer = model.chat(said("What is the capital of France?"), greedy(20))
    assert answer.text == "The capital of France is Paris."
    expected = model.hf.generate(
        torch.tensor([ids_of(model, said("What is the capital of France?"))]), max_new_tokens=20, do_sample=False
    )
    assert expected[0, -len(answer.token_ids) :].tolist() == answer.token_ids

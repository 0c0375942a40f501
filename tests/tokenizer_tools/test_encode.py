"""Text to token ids: a prompt has one start token and no end token."""

import shutil
from pathlib import Path

import pytest
from small_tokenizers import KINDS
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, MistralConfig, PreTrainedTokenizerFast

from ropewalk.errors import UnsupportedModel
from ropewalk.tokenizer_tools.encode import prompt_ids, start_ids, text_ids, texts_ids
from ropewalk.tokenizer_tools.vocabularies import vocabulary

FRAMES = ["$A", "$A <e>", "<s> $A", "<s> $A <e>", "<m> <s> $A <e> <e>", "<s> $A <s>"]


def framed(kind, frame):
    """A small tokenizer that adds the tokens of `frame` around a text, and the ids that it adds before it."""
    tokenizer = KINDS[kind][2](KINDS[kind][0], 1)
    tokenizer.add_special_tokens(["<s>", "<e>", "<m>"])
    names = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "<e>", "<m>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=names)
    before = frame[: frame.index("$A")].split()
    return tokenizer, [tokenizer.token_to_id(name) for name in before]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_a_start_token_and_no_end_token(kind, frame):
    backend, before = framed(kind, frame)
    outer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<e>")
    for text in ("", "a", KINDS[kind][0] * 3):
        bare = backend.encode(text, add_special_tokens=False).ids
        for tokenizer in (backend, outer):
            assert start_ids(tokenizer) == before
            assert text_ids(text, tokenizer) == bare
            assert prompt_ids(text, tokenizer) == vocabulary(tokenizer).encode(text) == before + bare
        assert texts_ids([text, "a"], outer)[0] == bare


@pytest.mark.parametrize("frame", [f for f in FRAMES if f.startswith("<s>")])
def test_a_text_with_a_start_token_gets_no_second_one(frame):
    tokenizer, before = framed("gpt2", frame)
    bare = prompt_ids("as a", tokenizer, special_tokens=True)
    assert prompt_ids("<s>as a", tokenizer, special_tokens=True) == bare
    assert prompt_ids("<s><s>as a", tokenizer, special_tokens=True) == before + bare  # as the text says
    assert prompt_ids("as a<e>", tokenizer, special_tokens=True) == [*bare, tokenizer.token_to_id("<e>")]
    assert prompt_ids("<s>as a", tokenizer)[:1] == before  # its name is plain text
    assert before[0] not in prompt_ids("<s>as a", tokenizer)[1:]


@pytest.mark.parametrize("kind", [processors.BertProcessing, processors.RobertaProcessing])
def test_start_and_end_tokens_in_other_templates(kind):
    tokenizer, _ = framed("gpt2", "$A")
    start, end = (tokenizer.token_to_id(name) for name in ("<s>", "<e>"))
    tokenizer.post_processor = kind(("<e>", end), ("<s>", start))
    assert prompt_ids("a", tokenizer) == [start, *text_ids("a", tokenizer)]
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), tokenizer.post_processor])
    assert prompt_ids("a", tokenizer) == [start, *text_ids("a", tokenizer)]


def test_a_change_of_the_tokenizer_counts_at_once():
    backend, before = framed("gpt2", "<s> $A <e>")
    outer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<e>")
    known = vocabulary(outer)
    bare = text_ids("as", outer)
    assert known.encode("as") == [*before, *bare]
    outer.add_bos_token = False
    assert outer.add_eos_token is False
    assert known.encode("as") == bare
    outer.add_eos_token = True
    assert known.encode("as") == bare


def test_added_tokens_that_cannot_be_separated_are_refused():
    tokenizer = Tokenizer(models.BPE(vocab={"\u0251": 0, "<e>": 1}, merges=[]))  # none of the probes has a token
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <e>", special_tokens=[("<e>", 1)])
    with pytest.raises(UnsupportedModel, match=r"adds \[1\] around a text"):
        prompt_ids("\u0251", tokenizer)


def test_a_sentencepiece_processor_that_adds_tokens(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the ropes walk\nthe rope walks\n" * 20, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=30, minloglevel=2, model_type="bpe",
        hard_vocab_limit=False,
    )  # fmt: skip
    plain = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    bare = plain.encode("the rope")
    for bos in (False, True):
        closing = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"), add_bos=bos, add_eos=True)
        assert closing.encode("the rope")[-1] == plain.eos_id()
        assert vocabulary(closing).encode("the rope") == [plain.bos_id()] * bos + bare


def test_a_prompt_is_neither_truncated_nor_padded():
    """The tokenizer.json of some checkpoints truncates texts to 512 tokens, or pads them, for training."""
    tokenizer, before = framed("gpt2", "<s> $A <e>")
    bare = text_ids("as a", tokenizer)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    assert start_ids(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == before
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    assert prompt_ids("as a", tokenizer) == [*before, *bare]


def test_tekken_inside_transformers_is_read_as_transformers_reads_it(tmp_path):
    """A folder with a tekken.json: ids after the block of special ones, and the start token first."""
    mistral_common = pytest.importorskip("mistral_common")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    MistralConfig().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    known, text = vocabulary(tokenizer), "hello wörld 12 <s>"
    assert known.encode(text) == prompt_ids(text, tokenizer) == tokenizer(text).input_ids
    assert known.encode(text)[0] == tokenizer.bos_token_id
    assert known.text_bytes(known.encode(text)).decode() == text
    assert texts_ids([text, "a"], tokenizer) == tokenizer([text, "a"], add_special_tokens=False).input_ids

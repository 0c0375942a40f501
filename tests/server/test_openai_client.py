"""The server through the official client of its protocol; every answer is that of the model called directly."""

import openai
import pytest
from running import TEXT, greedy, post, serving
from small_tokenizers import byte_fallback
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ropewalk as rw
from ropewalk.engine.model import Model

HEAL = "import nump"


def test_models_are_listed(client):
    listed = client.models.list().data
    assert [entry.id for entry in listed] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ropewalk"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'"):
        client.models.retrieve("tinny")


@pytest.mark.parametrize("prompt", [TEXT, HEAL, "é"])
def test_a_completion_is_what_generate_writes(client, model, prompt):
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
    expected = model.generate(prompt, greedy(8))
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.object == "text_completion"


def test_token_ids_and_lists_of_prompts(client, model):
    ids = model.vocabulary.encode(TEXT)
    whole, part = (model.generate_ids(each, greedy(6)).text for each in (ids, ids[:9]))
    texts = [model.generate(prompt, greedy(6)).text for prompt in (TEXT, HEAL)]
    for prompt, expected in ((ids, [whole]), ([ids, ids[:9]], [whole, part]), ([TEXT, HEAL], texts)):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))


def test_a_stream_has_the_same_text(client, model):
    for prompt in (TEXT, HEAL):
        chunks = list(
            client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        expected = model.generate(prompt, greedy(8))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected.text
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected.finish_reason
        assert chunks[-1].usage.completion_tokens == 8
        assert len(chunks) > 3


def test_seeds_choices_and_sampling_fields(client, model):
    answer = client.completions.create(
        model="tiny",
        prompt=TEXT,
        max_tokens=8,
        temperature=0.9,
        top_p=0.9,
        seed=5,
        n=2,
        stop=["\n"],
        extra_body={"top_k": 20, "repetition_penalty": 1.2, "continuation": "off"},
    )
    for number, choice in enumerate(answer.choices):
        params = rw.SamplingParams(
            max_new_tokens=8,
            temperature=0.9,
            top_p=0.9,
            seed=5 + number,
            stop=["\n"],
            top_k=20,
            repetition_penalty=1.2,
            continuation="off",
        )
        assert choice.text == model.generate(TEXT, params).text


def test_echo_scores_the_prompt(client, model):
    ids = model.vocabulary.encode(TEXT)
    score = model.score(TEXT)
    for most in (0, 1):
        answer = client.completions.create(
            model="tiny", prompt=TEXT, max_tokens=most, echo=True, logprobs=2, temperature=0
        )
        choice = answer.choices[0]
        logprobs = choice.logprobs
        assert choice.text.startswith(TEXT)
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(score.logprobs.tolist(), abs=1e-5)
        assert len(logprobs.tokens) == len(ids) + most
        assert "".join(logprobs.tokens) == choice.text
        assert logprobs.text_offset[1] == len(logprobs.tokens[0])
        for nats, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
            assert len(top) in (2, 3)
            assert nats <= max(top.values()) + 1e-6


@pytest.mark.parametrize("rope", ["none", "auto", "dynamic-ntk"])
@pytest.mark.parametrize("tokens", [256, 300])
def test_a_prompt_without_an_answer_has_its_own_length(client, model, tiny_folder, rope, tokens):
    """`score` reads 256 tokens, the trained length, under the untouched model."""
    ids = (model.vocabulary.encode(TEXT) * 20)[:tokens]
    fields = {"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    if rope == "none" and tokens > 256:
        with pytest.raises(openai.BadRequestError, match="more than the 256"):
            client.completions.create(**fields, extra_body={"rope": rope})
        return
    logprobs = client.completions.create(**fields, extra_body={"rope": rope}).choices[0].logprobs
    alone = rw.load(tiny_folder, rope=rope, compile=True)
    assert logprobs.token_logprobs[1:] == pytest.approx(alone.score_ids(ids).tolist(), abs=1e-4)


def test_an_echo_holds_a_character_once_that_the_answer_completes(client, model):
    ids = model.vocabulary.encode('x = "é')[:-1]
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=4, temperature=0, echo=True)
    assert answer.choices[0].text == 'x = "' + model.generate_ids(ids, greedy(4)).text
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True)
    assert answer.choices[0].text == 'x = "\ufffd'


def test_prompt_logprobs_as_vllm_gives_them(client, model):
    ids = model.vocabulary.encode(TEXT)
    answer = client.completions.create(
        model="tiny", prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 1}
    )
    places = answer.choices[0].model_extra["prompt_logprobs"]
    nats = [place[str(token)]["logprob"] for token, place in zip(ids[1:], places[1:], strict=True)]
    assert nats == pytest.approx(model.score_ids(ids).tolist(), abs=1e-5)


def test_logprobs_of_an_answer(client, model):
    expected = model.generate(TEXT, greedy(5, logprobs=2, continuation="off"))
    answer = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=5, temperature=0, logprobs=2, extra_body={"continuation": "off"}
    )
    shown = answer.choices[0].logprobs
    assert shown.token_logprobs == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-5)
    assert "".join(shown.tokens) == expected.text


def test_places_of_tokens_in_an_answer_whose_first_begins_inside_the_prompt(client):
    asked = {"model": "tiny", "prompt": "class A(objec", "max_tokens": 5, "temperature": 0, "logprobs": 0}
    choice = client.completions.create(**asked).choices[0]
    shown = choice.logprobs
    assert len(shown.tokens[0]) > shown.text_offset[1] > 0 == shown.text_offset[0]
    for text, start in zip(shown.tokens[1:], shown.text_offset[1:], strict=True):
        assert choice.text[start:].startswith(text)
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [offset for part in chunks if part for offset in part.text_offset] == shown.text_offset


@pytest.mark.parametrize("prompt", ["", [0], [5, 0, 6], [0, 265]])
def test_special_tokens_take_no_place_in_the_text(client, prompt):
    """Their names are not in it."""
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 3, "temperature": 0, "logprobs": 0, "echo": True}
    choice = client.completions.create(**asked).choices[0]
    assert "<|endoftext|>" in choice.logprobs.tokens and "<|endoftext|>" not in choice.text
    assert_places(choice)


def assert_places(choice):
    """Each token that is text stands where its offset says, and together they are the text."""
    at = 0
    for text, start in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert start == at
        if text != "<|endoftext|>":
            assert choice.text[start:].startswith(text)
            at += len(text)
    assert at == len(choice.text)


@pytest.mark.parametrize("prompt", ["ab", "", " b"])
def test_an_echo_has_no_space_that_the_tokenizer_adds(prompt):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_fallback("ab ", 0))
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.3, **sizes)
    with serving(Model(LlamaForCausalLM(config).eval(), tokenizer, name="fallback", max_length=512)) as (url, _):
        fields = {"prompt": prompt, "max_tokens": 5, "continuation": "off"}
        alone = post(url, **fields, logprobs=0).json()["choices"][0]
        echoed = post(url, **fields, logprobs=0, echo=True).json()["choices"][0]
    assert echoed["text"] == prompt + alone["text"]
    starts, written = (choice["logprobs"]["text_offset"] for choice in (echoed, alone))
    assert [start - len(prompt) for start in starts[-5:]] == written


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import os<|endoftext|>"}]


def test_a_chat_is_what_chat_writes(client, model):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    expected = model.chat(MESSAGES, greedy(8))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_completion_tokens=8,
            temperature=0,
            stream=True,
            logprobs=True,
            top_logprobs=2,
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    tokens = [
        token for chunk in chunks for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert len(tokens) == 8
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_parts_of_a_message_are_joined(client, model):
    parts = [{"type": "text", "text": "import "}, {"type": "text", "text": "os"}]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=5, temperature=0
    )
    assert answer.choices[0].message.content == model.chat([{"role": "user", "content": "import os"}], greedy(5)).text


@pytest.mark.parametrize("rope", ["yarn:4", "rerope:64|logn", "dynamic-ntk", "auto", "none"])
def test_a_request_brings_its_scaler(client, model, tiny_folder, rope):
    prompt = TEXT * 18  # longer than the model was trained for
    if rope == "none":
        prompt = TEXT * 4
    alone = rw.load(tiny_folder, rope=rope, compile=True)
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=8, temperature=0, extra_body={"rope": rope}
    )
    assert answer.choices[0].text == alone.generate(prompt, greedy(8)).text
    assert str(model.rope) == "auto"


def test_contexts(client, model):
    contexts = ["The key is 4711.", "The door is green."]
    answer = client.completions.create(
        model="tiny", prompt="The key", max_tokens=6, temperature=0, extra_body={"contexts": contexts}
    )
    expected = model.generate("The key", greedy(6), contexts=contexts)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].model_extra["sources"] == expected.sources


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [10**6]}, "token id 1000000"),
        ({"max_tokens": -1}, "max_tokens must be a whole number at least 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": "hot"}, "temperature 'hot' must be a number"),
        ({"n": 99}, "n must be a whole number from 1 to 16"),
        ({"presence_penalty": 1}, "presence_penalty is not supported"),
        ({"best_of": 4}, "best_of is not supported"),
        ({"extra_body": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"extra_body": {"rope": "yarm:4"}}, "Did you mean 'yarn'"),
        ({"extra_body": {"rope": "yarn:0.5"}}, "0.5"),
        (
            {"extra_body": {"rope": "none"}, "prompt": "x " * 400},
            r'max_tokens 4 make .* more than the 256 .*"rope\\?": \\?"auto.*serve the model with --max-length',
        ),
        ({"extra_body": {"contexts": "a"}}, "contexts must be a list of texts"),
        ({"extra_body": {"contexts": ["a"]}, "prompt": [1, 2]}, "contexts need a prompt that is one text"),
        ({"extra_body": {"contexts": ["a"]}, "prompt": " "}, "the prompt is blank"),
        ({"extra_body": {"contexts": ["a"]}, "prompt": [TEXT, ""]}, "the prompt is blank"),
        ({"extra_body": {"contexts": ["a"]}, "echo": True}, "with contexts, .* leave out echo"),
        ({"extra_body": {"contexts": ["a"], "prompt_logprobs": 0}}, "with contexts, .* leave out prompt_logprobs"),
        ({"extra_body": {"contexts": []}}, "contexts must be a list of texts, at least one"),
        ({"max_tokens": 0}, "max_tokens 0 needs echo"),
        ({"max_tokens": 0, "logprobs": 1, "extra_body": {"prompt_logprobs": 1}}, "max_tokens 0 writes no tokens"),
        ({"echo": True, "logprobs": 1, "extra_body": {"continuation": "exact"}}, "leave out continuation"),
        ({"extra_body": {"prompt_logprobs": 1, "continuation": "exact"}}, "leave out continuation"),
        ({"echo": True, "logprobs": 1, "extra_body": {"max_time": 1}}, "given whole; leave out max_time"),
        ({"extra_body": {"prompt_logprobs": 1, "max_time": 1}}, "given whole; leave out max_time"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages.*Did you mean"),
        ({"stream": True, "stream_options": {"user": "a"}}, "'stream_options.user' is no field"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage must be true or"),
        ({"stream_options": {"include_usage": True}}, "include_usage needs stream: true"),
        ({"extra_body": {"store": True}}, "store is not supported"),
        ({"extra_body": {"service_tier": "flex"}}, "service_tier is not supported"),
    ],
)
def test_bad_requests_are_refused_by_name(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**{"model": "tiny", "prompt": TEXT, "max_tokens": 4, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages is missing or empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "no text"),
        ({"messages": [{"role": "user"}]}, "text as its content"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"max_completion_tokens": 5}, "max_completion_tokens is 5, and max_tokens 4; leave out one"),
        ({"extra_body": {"contexts": ["a"]}}, "a chat has no contexts"),
        ({"stream_options": {"include_usage": True}}, "include_usage needs stream: true"),
    ],
)
def test_bad_chats_are_refused_by_name(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **fields})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"extra_body": {"contexts": ["a"]}, "echo": True}, "echo"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"continuation": "never"}}, "continuation"),
        ({"prompt": [10**6]}, None),
    ],
)
def test_a_refusal_names_its_field(client, fields, name):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "tiny", "prompt": TEXT, "max_tokens": 4, **fields})
    assert refused.value.param == name


def test_fields_that_change_nothing_are_taken(client, model):
    neutral = {"store": False, "service_tier": "auto", "contexts": [], "user": "a", "metadata": {"a": "b"}}
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=5,
        max_completion_tokens=5,
        temperature=0,
        stream_options={"include_usage": False},
        extra_body=neutral,
    )
    assert answer.choices[0].message.content == model.chat(MESSAGES, greedy(5)).text


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt=TEXT)

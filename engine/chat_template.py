"""The tokenizer's chat template: token ids of messages, and the header that it writes before an answer.

The template's special tokens are real tokens. The same names inside a message are ordinary characters, so that no
message can end itself or begin another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ..errors import ConfigError, first_line
from ..tokenizer_tools.encode import is_mistral, text_ids
from ..tokenizer_tools.vocabulary import Vocabulary, check_text

Message = Mapping[str, Any]
"""A message as in OpenAI's protocol: "role", "content", and other keys that the template reads."""

_PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning of their own


def has_chat_template(tokenizer: Any) -> bool:
    """True if the tokenizer can make a prompt of messages."""
    return bool(getattr(tokenizer, "chat_template", None)) or is_mistral(tokenizer)


def chat_ids(messages: Sequence[Message], tokenizer: Any, vocabulary: Vocabulary) -> list[int]:
    """Token ids of a conversation, with the header of the assistant's next answer at the end.

    They are those of transformers' `apply_chat_template`, except if a message holds the name of a special token. No
    start token is added: the template writes it if the model needs one.

    Raises:
        ConfigError: the tokenizer has no chat template, a message has no role, or the template refuses the messages.
        DataError: a message holds half a surrogate pair, or a token that the model does not have.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ConfigError(
            f'messages must be a list such as [{{"role": "user", "content": "Hello"}}], not {messages!r:.100}'
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f'messages[{number}] must be a dict such as {{"role": "user", "content": "Hello"}}')
    if not messages:
        raise ConfigError('there are no messages; give at least one, such as {"role": "user", "content": "Hello"}')
    texts = list(_strings(list(messages)))
    for text in texts:
        check_text(text)
    if is_mistral(tokenizer):  # it never reads names as special tokens
        return vocabulary.checked(_render(tokenizer, list(messages), tokenize=True))
    names = _special_names(tokenizer)
    mark = _unused_character([*texts, str(tokenizer.chat_template), *names])
    guarded = _map_strings(list(messages), lambda text: _with_marks(text, names, mark))
    rendered = _render(tokenizer, guarded, tokenize=False)
    if mark not in rendered:
        return vocabulary.checked(text_ids(rendered, tokenizer, special_tokens=True))
    return vocabulary.checked(_ids_with_marks(rendered, names, mark, tokenizer, vocabulary))


def _render(tokenizer: Any, messages: list[Message], *, tokenize: bool) -> Any:
    if not has_chat_template(tokenizer):
        raise ConfigError(
            f"{getattr(tokenizer, 'name_or_path', '') or 'this tokenizer'} has no chat template, so the model is "
            "not a chat model; give it a prompt in place of messages (generate, or a server's /v1/completions), or set "
            "model.tokenizer.chat_template"
        )
    options = {} if is_mistral(tokenizer) else {"add_generation_prompt": True}
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
    except Exception as error:  # a template is a program, and mistral_common has errors of its own
        raise ConfigError(f"the chat template refuses these messages ({first_line(error)})") from error
    return list(getattr(rendered, "input_ids", rendered)) if tokenize else rendered


def _special_names(tokenizer: Any) -> list[str]:
    """Names of special tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(filter(None, names), key=len, reverse=True)


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_strings(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(part, change) for part in value]
    return value


def _unused_character(texts: Sequence[str]) -> str:
    used = set().union(*map(set, texts))
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise ConfigError("the messages hold every private-use character; leave out at least one")


def _with_marks(text: str, names: Sequence[str], mark: str) -> str:
    """`text` with a mark inside every name of a special token, and inside a part of a name at either end."""
    if names:
        whole, beginnings, ends, longest = _parts(tuple(names))
        text = whole.sub(lambda name: name[0][0] + mark + name[0][1:], text)
        body = text.rstrip()
        if any(body[-n:] in beginnings for n in range(1, longest)):
            text = body + mark + text[len(body) :]
        body = text.lstrip()
        if any(body[:n] in ends for n in range(1, longest)):
            text = text[: len(text) - len(body)] + mark + body
    return text


@lru_cache(maxsize=4)
def _parts(names: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], frozenset[str], int]:
    """A pattern of names, their proper beginnings, their proper ends, and the length of the longest name."""
    beginnings = frozenset(name[:n] for name in names for n in range(1, len(name)))
    ends = frozenset(name[n:] for name in names for n in range(1, len(name)))
    return re.compile("|".join(map(re.escape, names))), beginnings, ends, max(map(len, names))


def _ids_with_marks(
    rendered: str, names: Sequence[str], mark: str, tokenizer: Any, vocabulary: Vocabulary
) -> list[int]:
    """Token ids of a rendered text without its marks. The parts between special tokens are encoded one by one."""
    ids: list[int] = []
    before = ""  # the special token before a part: some tokenizers put a space before the first part only
    for part in re.split(f"({'|'.join(map(re.escape, names))})", rendered):
        if part in names:
            ids += text_ids(part, tokenizer, special_tokens=True)[-1:]
            before = part
        elif mark in part:
            ids += vocabulary.encode_continuation(_as_read(part.replace(mark, ""), before, tokenizer, vocabulary))
        elif part:
            with_token = text_ids(before + part, tokenizer, special_tokens=True)
            ids += with_token[1:] if before else with_token
    return ids


def _as_read(text: str, before: str, tokenizer: Any, vocabulary: Vocabulary) -> str:
    """`text` with the white space that the tokenizer gives it after the special token `before`.

    Some put a space before it, and some drop its own.
    """
    rest = text.lstrip()
    probe = text[: len(text) - len(rest)] + "a"
    ids = text_ids(before + probe, tokenizer, special_tokens=True)[1 if before else 0 :]
    return b"".join(vocabulary.tokens[token] for token in ids).decode().removesuffix("a") + rest


class _Generation(Extension):
    """transformers' `{% generation %}`, which only marks the text in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def chat_headers(template: str) -> tuple[str, ...]:
    """The texts that a template writes only before an answer, such as "<|im_start|>assistant\\n".

    A template is a program that came with a checkpoint and may never end, so it is not run. Of a text that it joins
    from constants and variables, only the constants at the end are returned.
    """
    try:
        # the options of transformers: the white space in templates is written for them
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        branches = list(environment.parse(template).find_all(nodes.If))
    except (jinja2.TemplateError, RecursionError):
        return ()
    headers = (_last_constant(branch.body) for branch in branches if _asks_for_header(branch.test))
    return tuple(dict.fromkeys(header for header in headers if header))


def _asks_for_header(test: nodes.Node) -> bool:
    if isinstance(test, nodes.And):
        return _asks_for_header(test.left) or _asks_for_header(test.right)
    return isinstance(test, nodes.Name) and test.name == "add_generation_prompt"


def _last_constant(body: list[nodes.Node]) -> str:
    """The constant text at the end of what `body` writes outside its inner branches."""
    outputs = chain.from_iterable(statement.nodes for statement in body if isinstance(statement, nodes.Output))
    text = ""
    for part in chain.from_iterable(map(_terms, outputs)):
        constant = part.data if isinstance(part, nodes.TemplateData) else getattr(part, "value", None)
        text = text + constant if isinstance(constant, str) else ""
    return text


def _terms(node: nodes.Node) -> list[nodes.Node]:
    """The operands of + or ~, in order."""
    if isinstance(node, nodes.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return list(chain.from_iterable(map(_terms, node.nodes))) if isinstance(node, nodes.Concat) else [node]

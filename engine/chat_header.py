"""What a chat template writes before an answer, read from the template without running it."""

from __future__ import annotations

from functools import cache
from itertools import chain

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

__all__ = ["chat_headers"]


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

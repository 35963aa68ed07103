"""A checkpoint's chat template (Jinja), rendered as Hugging Face renders it, in a sandbox with a budget."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Name, Node
from jinja2.parser import Parser

from lserve_jax.config.errors import InputError
from lserve_jax.text.errors import one_line
from lserve_jax.text.jinja_budget import Budget, BudgetedEnvironment

GROWTH = 8  # a rendered text may have GROWTH times as many characters as the messages, plus SLACK
SLACK = 1_000_000


class ChatTemplate:
    """A compiled chat template.

    Args:
      text: the Jinja source.
      source: where the template came from, for messages.
      variables: what the template may read besides the messages: ``bos_token``, ``eos_token``, … .

    Attributes:
      names: the names in the source, among them those of all variables that it reads.

    Raises:
      InputError: if the source is no Jinja template.
    """

    def __init__(self, text: str, *, source: str, variables: Mapping[str, str]):
        self._source = source
        self._variables = dict(variables)
        environment = BudgetedEnvironment(
            filters={"tojson": _tojson},
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
        )
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            parsed = environment.parse(text)
            self.names = frozenset(name.name for name in parsed.find_all(Name))
            self._template = environment.from_string(environment.budgeted(parsed))
        except Exception as error:  # a hostile source may make the compiler raise anything, even RecursionError
            raise InputError(f"{source}: the chat template is not valid Jinja: {one_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the conversation as text, control tokens included.

        Args:
          messages: the conversation.
          add_generation_prompt: the template's variable of that name.
          tools: the template's variable of that name.
          template_kwargs: further variables of the template.

        Raises:
          InputError: if the template refuses these messages, fails, or exceeds its budget.
        """
        given = {"documents": None, **(template_kwargs or {})}
        conversation = given | {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        budget = Budget(characters=SLACK + GROWTH * _characters(conversation))
        try:
            parts = self._template.generate(self._variables | conversation | budget.as_variables())
            return "".join(budget.bounded(parts))
        except Exception as error:
            raise InputError(f"{self._source}: the chat template failed: {one_line(error)}") from error


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; a rendering only keeps its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON as Hugging Face writes it: not escaped for HTML, unlike Jinja's filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _characters(value: Any) -> int:
    """Returns the number of characters in a message or in any part of one."""
    if isinstance(value, Mapping):
        return sum(_characters(key) + _characters(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 1

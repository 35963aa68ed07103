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
from lserve_jax.text.jinja_budget import Budget
from lserve_jax.text.jinja_sandbox import BudgetedEnvironment

GROWTH = 8  # a rendered text may have GROWTH times as many characters as the messages, plus SLACK
SLACK = 1_000_000
# Units of work that a rendering may take, see `lserve_jax.text.jinja_budget`: about a second, and what long
# conversations need besides, per character and per text or other part of a message.
UNITS, UNITS_PER_CHARACTER, UNITS_PER_PART = 100_000_000, 50, 5_000
MAX_SOURCE = 200_000  # characters of a template: compiling takes time too
MAX_DATE = 100  # characters of a date's format


class RefusedError(InputError):
    """A chat template refuses the messages, by calling ``raise_exception``."""


class ChatTemplate:
    """A compiled chat template.

    Args:
      text: the Jinja source.
      source: where the template came from, for messages.
      variables: what the template may read besides the messages: ``bos_token``, ``eos_token``, … .

    Attributes:
      names: the names in the source, among them those of all variables that it reads.

    Raises:
      InputError: if the source is no Jinja template, or too long.
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
        if len(text) > MAX_SOURCE:
            raise InputError(
                f"{source}: the chat template has {len(text):,} characters where {MAX_SOURCE:,} are allowed"
            )
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
          RefusedError: if the template refuses these messages.
          InputError: if it fails otherwise, or exceeds its budget.
        """
        given = {"documents": None, **(template_kwargs or {})}
        conversation = given | {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        characters, parts = _extent(conversation)
        budget = Budget(
            units=UNITS + UNITS_PER_CHARACTER * characters + UNITS_PER_PART * parts,
            characters=SLACK + GROWTH * (characters + parts),
        )
        try:
            with budget.in_force():
                return "".join(budget.bounded(self._template.generate(self._variables | conversation)))
        except Exception as error:
            kind = RefusedError if isinstance(error, _RaisedError) else InputError
            raise kind(f"{self._source}: the chat template failed: {one_line(error)}") from error


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; a rendering only keeps its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _RaisedError(TemplateError):
    """What a template raises itself."""


def _raise_exception(message: Any) -> None:
    raise _RaisedError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE:
        raise TemplateError(f"a date's format has more than {MAX_DATE} characters")
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


def _extent(value: Any) -> tuple[int, int]:
    """Returns the number of characters of a value, and the number of its texts and other parts."""
    if isinstance(value, Mapping):
        extents = [_extent(part) for pair in value.items() for part in pair]
    elif isinstance(value, (list, tuple)):
        extents = [_extent(part) for part in value]
    else:
        return (len(value) if isinstance(value, str) else 1), 1
    return sum(characters for characters, _ in extents), sum(parts for _, parts in extents)

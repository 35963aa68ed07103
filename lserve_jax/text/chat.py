"""Conversations as text and as token ids: checks messages, chooses the template, guards literal text."""

import logging
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from lserve_jax.config.errors import InputError, shown, shown_list
from lserve_jax.text.chat_template import ChatTemplate
from lserve_jax.text.errors import read_text
from lserve_jax.text.literals import ControlTexts, Literals
from lserve_jax.text.parts import DEFAULT_TEMPLATE, SPECIAL_NAMES

type Message = Mapping[str, Any]

RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", *SPECIAL_NAMES})
"""Variables of a template that `ChatOptions.template_kwargs` may not set."""
TOOL_TEMPLATE = "tool_use"
"""The name of the template that is taken if tools are given and none is named."""

MOST_WARNED, LONGEST_WARNED = 1000, 100
"""Names that are warned of, each once, and their characters: a server's clients may invent any number of any length."""

MAX_DEPTH = 100
"""Levels of lists and mappings in messages, tools or variables of the template; reading them takes a call per level."""

logger = logging.getLogger("lserve_jax")


class ChatOptions(TypedDict, total=False):
    """How a conversation is rendered.

    Attributes:
      add_generation_prompt: whether to end with the head of the assistant's answer; True if left out.
      continue_final_message: whether the text ends with that of the last message, for the model to continue. Then there
        is no generation prompt.
      tools: the functions that the model may call, as JSON schemas in the form that the template expects.
      template_kwargs: further variables of the template, such as ``{"enable_thinking": False}``.
      chat_template: the name of one of the checkpoint's templates, or a file with another one. None takes "tool_use" if
        tools are given and there is one of that name, else "default".
      literal_roles: the roles in whose messages the text of a special token is plain text; None means all roles. In
        other messages it means that token, as in transformers. Tools count as the role "system".
    """

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None
    chat_template: str | Path | None
    literal_roles: Collection[str] | None


class ChatFormat:
    """How the conversations of a model are written.

    Args:
      control_texts: the texts of special tokens.
      templates: Jinja sources by name.
      variables: texts of special tokens by the names that a template reads.
      source: where all this came from, for messages.
    """

    def __init__(
        self,
        control_texts: ControlTexts,
        *,
        templates: Mapping[str, str],
        variables: Mapping[str, str],
        source: str,
    ):
        self.templates = dict(templates)
        self._control_texts = control_texts
        self._variables = variables
        self._source = source
        self._compiled: dict[str, ChatTemplate] = {}
        self._warned: set[str] = set()

    def decide(self, advice: str) -> bool:
        """Returns what `lserve_jax.text.tokenizer.Tokenizer.decide_chat_format` does."""
        if DEFAULT_TEMPLATE in self.templates:
            return True
        if self.templates:
            raise InputError(f"{self._source}: {self._own_templates}, and none is the default: {advice}")
        if advice not in self._warned:
            self._warned.add(advice)
            logger.warning(f"{self._source} has no chat template: the prompt is continued as it is ({advice})")
        return False

    @property
    def _own_templates(self) -> str:
        return f"its chat templates are {', '.join(self.templates)}" if self.templates else "it has no chat template"

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """Returns a conversation as text, in which the text of a special token in a message means that token."""
        _check_options(options)
        return self._render(plain_messages(messages), options)

    def render_guarded(self, messages: Sequence[Message], options: ChatOptions) -> tuple[str, Literals]:
        """Returns a conversation as text with stand-ins for texts that are literal, and what they stand for."""
        messages = plain_messages(messages)
        _check_options(options)
        roles = options.get("literal_roles")
        literals = Literals()

        def guard(role: str, value: Any) -> Any:
            return self._control_texts.guard(value, literals) if roles is None or role in roles else value

        guarded = [guard(message["role"], message) for message in messages]
        tools = guard("system", options.get("tools"))
        return self._render(guarded, options | {"tools": tools}), literals

    def _render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        tools, variables = options.get("tools"), options.get("template_kwargs") or {}
        template = self._template(options)
        self._warn_of_unread(template, [*variables, *(["tools"] if tools else [])])
        is_open = options.get("continue_final_message", False)
        mark = _Mark()
        text = template.render(
            mark.after(messages) if is_open else messages,
            add_generation_prompt=options.get("add_generation_prompt", True) and not is_open,
            tools=tools,
            template_kwargs=variables,
        )
        return mark.before(text, messages[-1], self._source) if is_open else text

    def _template(self, options: ChatOptions) -> ChatTemplate:
        source = self._template_source(options.get("chat_template"), has_tools=bool(options.get("tools")))
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source, source=self._source, variables=self._variables)
        return self._compiled[source]

    def _template_source(self, named: str | Path | None, *, has_tools: bool) -> str:
        if named is not None:
            if named in self.templates:
                return self.templates[str(named)]
            if not _is_file(named):
                is_jinja = any(mark in str(named) for mark in ("{%", "{{"))
                hint = ": write the text of a template to a file and give its name" if is_jinja else ""
                raise InputError(
                    f"{self._source}: chat template {shown(str(named))} is neither a name ({self._own_templates}) "
                    f"nor a file{hint}"
                )
            return read_text(Path(named))
        for name in ([TOOL_TEMPLATE] if has_tools else []) + [DEFAULT_TEMPLATE]:
            if name in self.templates:
                return self.templates[name]
        if not self.templates:
            raise InputError(
                f"{self._source}: the model has no chat template; give the prompt as plain text (--raw), or a template "
                "(--chat-template FILE, in Python chat_template=FILE)"
            )
        raise InputError(
            f"{self._source}: {self._own_templates}, and none is the default; choose one "
            "(--chat-template NAME, in Python chat_template=NAME)"
        )

    def _warn_of_unread(self, template: ChatTemplate, names: Sequence[str]) -> None:
        unread = {name[:LONGEST_WARNED]: None for name in names if name not in template.names}
        unread = [name for name in unread if name not in self._warned][: max(0, MOST_WARNED - len(self._warned))]
        self._warned.update(unread)
        if unread:
            logger.warning(f"{self._source}: the chat template does not read {shown_list(unread)}: without effect")


class _Mark:
    """A secret text after the last message, which shows where that message ends in the rendered conversation.

    Its digits are nothing that a template trims, capitalises or escapes. The blank behind them is lost if the template
    trims messages.
    """

    def __init__(self) -> None:
        self._digits = str(10**37 + secrets.randbelow(9 * 10**37))

    def after(self, messages: Sequence[Message]) -> list[Message]:
        """Returns the messages with the mark at the end of the last one's text."""
        *others, last = messages
        if not isinstance(last.get("content"), str):
            raise InputError("the last message cannot be continued: its content must be text")
        return [*others, {**last, "content": f"{last['content']}{self._digits} "}]

    def before(self, rendered: str, last: Message, source: str) -> str:
        """Returns the rendered conversation up to the mark, without the blanks before it if the template trims them."""
        texts = rendered.split(self._digits)
        if len(texts) != 2:
            how = "does not write the last message as it is" if len(texts) == 1 else "writes the last message twice"
            raise InputError(f"{source}: the chat template {how}, so that it cannot be continued")
        content = last["content"]
        is_trimmed = not texts[1].startswith(" ") and content.strip() != ""
        return texts[0].removesuffix(content[len(content.rstrip()) :]) if is_trimmed else texts[0]


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long for a name, or with a character that no name has
        return False


def plain_messages(messages: Any) -> list[Message]:
    """Returns a conversation in which every content that is a list of text parts is one text, a line per part.

    Raises:
      InputError: if it is no conversation, or has parts that are no text; the message names the first wrong one.
    """
    _check_messages(messages)
    return [
        {**message, "content": _joined(index, content)}
        if isinstance(content := message.get("content"), list | tuple)
        else message
        for index, message in enumerate(messages)
    ]


def _joined(index: int, parts: Sequence[Any]) -> str:
    texts = []
    for place, part in enumerate(parts):
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InputError(
                f"messages[{index}]: part {place} of 'content' must be {{'type': 'text', 'text': …}}, got "
                f"{shown(kind, 40)}: the model reads text alone"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages must be a list of at least one {'role': …, 'content': …}")
    _check_depth("messages", messages)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{index}] must be a mapping with 'role' and 'content', got {shown(message, 80)}")
        if not isinstance(message.get("role"), str):
            problem = f"must be a string, got {shown(message['role'], 40)}" if "role" in message else "is missing"
            raise InputError(f"messages[{index}]: 'role' {problem}")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            problem = "is None" if "content" in message else f"is missing, got {', '.join(map(repr, message))}"
            raise InputError(f"messages[{index}]: 'content' {problem} (only a message with 'tool_calls' needs none)")
        if not isinstance(content, str | Mapping | list | tuple | None):
            raise InputError(
                f"messages[{index}]: 'content' must be a text or a list of parts, got {type(content).__name__}"
            )


def _check_options(options: ChatOptions) -> None:
    if unknown := sorted(options.keys() - ChatOptions.__annotations__.keys()):
        raise InputError(
            f"unknown chat options: {', '.join(unknown)}; known are {', '.join(ChatOptions.__annotations__)} "
            '(a variable of the template is given as template_kwargs={"NAME": VALUE})'
        )
    roles = options.get("literal_roles")
    if roles is not None and (isinstance(roles, str) or not isinstance(roles, Collection)):
        raise InputError(f"literal_roles must be a list of roles, got {shown(roles, 60)}")
    named = options.get("chat_template")
    if not isinstance(named, str | Path | None):
        raise InputError(f"chat_template must be the name of a template or a file, got {shown(named, 60)}")
    _check_tools(options.get("tools"))
    _check_variables(options.get("template_kwargs") or {})


def _check_tools(tools: Any) -> None:
    if tools is not None and not isinstance(tools, list | tuple):
        raise InputError(f"tools must be a list of JSON objects, got {type(tools).__name__}")
    _check_depth("tools", tools)
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise InputError(f"tools[{index}] must be a JSON object that describes a function, got {shown(tool, 60)}")


def _check_variables(variables: Any) -> None:
    if not isinstance(variables, Mapping):
        raise InputError(f"template_kwargs must be a mapping of names to values, got {type(variables).__name__}")
    _check_depth("template_kwargs", variables)
    for name in variables:
        if name in RESERVED:
            raise InputError(f"template_kwargs cannot set {name!r}: it is given by the conversation or the tokenizer")
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"template_kwargs: {shown(name)} is no name of a variable")


def _check_depth(name: str, value: Any) -> None:
    """Checks that lists and mappings in a value are at most `MAX_DEPTH` levels deep; one that holds itself is not."""
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (part for outer in level for part in _parts(outer))
        level = list({id(part): part for part in parts if isinstance(part, Mapping | list | tuple)}.values())
        if not level:
            return
    raise InputError(f"{name}: lists and mappings are nested more than {MAX_DEPTH} levels deep")


def _parts(value: Any) -> Collection[Any]:
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()

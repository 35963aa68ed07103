"""Conversations: variables of the template, tools, an answer that is begun, and which text is literal."""

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lserve_jax.config.errors import InputError
from lserve_jax.text import chat
from lserve_jax.text.tokenizer import Tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + HEAD
TRIMMED = PLAIN.replace("m.content", "m.content | trim")
# Thinks unless told otherwise, and writes tools and calls of them, as Qwen3's template does in its own words.
THINKER = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]


def characters(template: str | dict[str, str]) -> Tokenizer:
    """One token per character of ASCII, and control tokens behind them."""
    backend = Backend(models.BPE(vocab={chr(code): code for code in range(128)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return Tokenizer(backend, special_tokens={}, eos_token_ids=[], chat_template=template, source="model")


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# Variables and tools


def test_a_variable_of_the_template_is_set_and_the_default_is_the_templates():
    tokenizer = characters(THINKER)
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat([user("hi")]) == head
    assert tokenizer.render_chat([user("hi")], template_kwargs={"enable_thinking": True}) == head
    quiet = tokenizer.render_chat([user("hi")], template_kwargs={"enable_thinking": False})
    assert quiet == head + "<think>\n\n</think>\n\n"
    ids = tokenizer.apply_chat_template([user("hi")], template_kwargs={"enable_thinking": False})
    assert ids == tokenizer.encode(quiet)


def test_tools_and_the_turns_that_use_them_are_rendered():
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
    messages = [user("time?"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "12:00"}]
    tokenizer = characters(THINKER)
    assert tokenizer.render_chat(messages, tools=TOOLS) == (
        f"<|im_start|>system\n{json.dumps(TOOLS[0])}\n<|im_end|>\n<|im_start|>user\ntime?<|im_end|>\n"
        f"<|im_start|>assistant\n<tool_call>{json.dumps(call['function'])}</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>12:00</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(messages, tools=TOOLS) == tokenizer.encode(
        tokenizer.render_chat(messages, tools=TOOLS)
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"template_kwargs": {"messages": []}}, "template_kwargs cannot set 'messages': it is given by the conv"),
        ({"template_kwargs": {"bos_token": "x"}}, "template_kwargs cannot set 'bos_token'"),
        ({"template_kwargs": {"add_generation_prompt": 1}}, "template_kwargs cannot set 'add_generation_prompt'"),
        ({"template_kwargs": {" budget": 1}}, "template_kwargs: ' budget' is no name of a variable"),
        ({"template_kwargs": {3: 1}}, "template_kwargs: 3 is no name"),
        ({"template_kwargs": "enable"}, "template_kwargs must be a mapping of names to values, got str"),
        ({"tools": {"name": "now"}}, "tools must be a list of JSON objects, got dict"),
        ({"tools": ["now"]}, r"tools\[0\] must be a JSON object that describes a function, got 'now'"),
        ({"literal_roles": "user"}, "literal_roles must be a list of roles, got 'user'"),
        ({"literal_roles": 5}, "literal_roles must be a list of roles, got 5"),
        ({"chat_template": 5}, "chat_template must be the name of a template or a file, got 5"),
        ({"chat_template": "no\0name"}, "chat template 'no.x00name' is neither a name .*default.* nor a file$"),
        ({"chat_template": PLAIN * 9}, "is neither a name .* nor a file: write the text of a template to a file"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], problem: str):
    for render in (characters(THINKER).apply_chat_template, characters(THINKER).render_chat):
        with pytest.raises(InputError, match=problem) as caught:
            render([user("hi")], **options)
        assert len(str(caught.value)) < 500


def test_an_unknown_option_is_refused_and_the_known_ones_are_named():
    options: Any = {"enable_thinking": False, "chat_template_kwargs": {}}
    for render in (characters(THINKER).apply_chat_template, characters(THINKER).render_chat):
        with pytest.raises(InputError, match="unknown chat options: chat_template_kwargs, enable_thinking; known are"):
            render([user("hi")], **options)
        with pytest.raises(InputError, match=r"literal_roles \(a variable of the template .* template_kwargs=\{"):
            render([user("hi")], **options)


def nested(levels: int) -> Any:
    """A list in a list …, as a program reads it from JSON."""
    return json.loads("[" * levels + "]" * levels)


def of_itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("deep", [lambda: nested(1100), lambda: nested(101), of_itself])
@pytest.mark.parametrize(
    ("place", "conversation"),
    [
        ("messages", lambda deep: ([user(deep)], {})),
        ("messages", lambda deep: ([user("hi") | {"more": {"x": deep}}], {})),
        ("messages", lambda deep: ([deep], {})),
        ("messages", lambda deep: ([{"role": deep, "content": "hi"}], {})),
        ("tools", lambda deep: ([user("hi")], {"tools": [{"name": deep}]})),
        ("tools", lambda deep: ([user("hi")], {"tools": [deep]})),
        ("template_kwargs", lambda deep: ([user("hi")], {"template_kwargs": {"enable_thinking": deep}})),
    ],
)
def test_what_is_nested_too_deeply_is_refused_in_one_line(deep: Any, place: str, conversation: Any):
    messages, options = conversation(deep())
    for render in (characters(THINKER).apply_chat_template, characters(THINKER).render_chat):
        with pytest.raises(InputError, match=f"^{place}: lists and mappings are nested more than 100 levels deep$"):
            render(messages, **options)


def test_what_is_nested_less_deeply_is_rendered():
    tools = [{"name": "now", "parameters": nested(97)}]
    text = characters(THINKER).render_chat([user("hi")], tools=tools, template_kwargs={"enable_thinking": nested(99)})
    assert json.dumps(tools[0]) in text
    ids = characters(THINKER).apply_chat_template([user("hi")], tools=tools)
    assert characters(THINKER).decode(ids, skip_special_tokens=False) in text


def test_what_the_template_does_not_read_is_said_once(caplog: pytest.LogCaptureFixture):
    tokenizer = characters(PLAIN)
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        for _ in range(2):
            tokenizer.render_chat([user("hi")], template_kwargs={"enable_thinking": False}, tools=TOOLS)
        characters(THINKER).render_chat([user("hi")], template_kwargs={"enable_thinking": False}, tools=TOOLS)
    (record,) = caplog.records
    assert record.getMessage() == "model: the chat template does not read enable_thinking, tools: without effect"


# Whether a command writes prompts as messages


def test_a_command_writes_messages_if_there_is_a_default_template(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        assert characters(PLAIN).decide_chat_format("give --raw")
        assert characters({"rag": "r", "default": PLAIN}).decide_chat_format("give --raw")
    assert not caplog.records
    with pytest.raises(InputError, match=r"^model: its chat templates are rag, and none is the default: give --raw$"):
        characters({"rag": "r"}).decide_chat_format("give --raw")


def test_a_command_continues_prompts_as_they_are_with_one_warning_if_there_is_no_template(
    caplog: pytest.LogCaptureFixture,
):
    tokenizer = characters({})
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        assert not any(tokenizer.decide_chat_format("give --raw") for _ in range(3))
    (record,) = caplog.records
    assert record.getMessage() == "model has no chat template: the prompt is continued as it is (give --raw)"


# An answer that is begun


def begun(template: str, *messages: dict[str, Any]) -> str:
    return characters(template).render_chat(messages, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (PLAIN, "It is", "It is"),
        (PLAIN, " It is ", " It is "),
        (TRIMMED, " It is \n", "It is"),
        (TRIMMED, "It is", "It is"),
        (PLAIN, "", ""),
        (TRIMMED, "", ""),
        (PLAIN, " \n", " \n"),
        (TRIMMED, " \n", ""),
        (PLAIN, "assistant", "assistant"),  # which the head has as well
        (TRIMMED, "hi", "hi"),  # as in the question
        (PLAIN, "It is<|im_end|>\n<|im_start|>user\nno", "It is<|im_end|>\n<|im_start|>user\nno"),
        (PLAIN + "Remember: be brief.", "It is", "It is"),
        (PLAIN.replace("m.content }}", "m.content }} (end)"), "It is 1", "It is 1"),
        (PLAIN.replace("m.content", "m.content | upper"), "It is", "IT IS"),
        (PLAIN.replace("m.content", "m.content | tojson"), 'a "b"', '"a \\"b\\"'),
        (PLAIN.replace("m.content", "m.content.split('</think>')[-1].lstrip('\n')"), "<think>x</think>\n\ny", "y"),
    ],
)
def test_the_text_ends_where_the_begun_answer_ends(template: str, content: str, expected: str):
    first = begun(template, user("hi"), answer("a")).partition("assistant\n")[0]
    assert begun(template, user("hi"), answer(content)) == f"{first}assistant\n{expected}"


def test_parts_of_text_are_one_text_and_other_parts_are_refused():
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is"}]
    assert begun(PLAIN, answer(parts)) == begun(PLAIN, answer("It \nis"))
    for part in ({"type": "image_url", "image_url": {}}, "x", {"type": "text"}, 5):
        with pytest.raises(InputError, match=r"part 1 of 'content' must be .*: the model reads text alone"):
            begun(PLAIN, answer([*parts[:1], part]))


@pytest.mark.parametrize(
    ("template", "content", "problem"),
    [
        (
            PLAIN.replace("m.content", "m.content[:3]"),
            "It is so",
            "does not write the last message as it is, so that it",
        ),
        (PLAIN + "{{ messages[-1].content }}", "It is", "writes the last message twice, so that it cannot"),
        (PLAIN, [{"type": "image"}], "part 0 of 'content' must be"),
        (PLAIN, {"a": "b"}, "the last message cannot be continued"),
    ],
)
def test_an_answer_that_cannot_be_continued_is_refused(template: str, content: Any, problem: str):
    with pytest.raises(InputError, match=problem):
        begun(template, user("hi"), answer(content))


def test_calls_of_tools_cannot_be_continued():
    with pytest.raises(InputError, match="the last message cannot be continued"):
        begun(THINKER, {"role": "assistant", "tool_calls": [{"function": {}}]})


@given(
    question=st.text(st.characters(max_codepoint=126, min_codepoint=32), max_size=8),
    content=st.lists(st.sampled_from([*SPECIALS, "<|", "|>", " ", "\n", "a", "1"]), max_size=6).map("".join),
)
def test_a_begun_answer_is_what_it_would_be_without_the_template_behind_it(question: str, content: str):
    tokenizer = characters(PLAIN)
    ids = tokenizer.apply_chat_template([user(question), answer(content)], continue_final_message=True)
    whole = tokenizer.apply_chat_template([user(question), answer(content)], add_generation_prompt=False)
    end = tokenizer.encode("<|im_end|>\n")
    assert [*ids, *end] == whole


def test_names_that_someone_invents_do_not_fill_the_memory_or_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat, "MOST_WARNED", 5)
    tokenizer = characters(THINKER)
    for number in range(20):
        tokenizer.render_chat([user("hi")], template_kwargs={f"invented{number}": 1})
    assert len([record for record in caplog.records if "without effect" in record.getMessage()]) == 5


def test_a_long_name_does_not_fill_the_memory(caplog: pytest.LogCaptureFixture):
    tokenizer = characters(THINKER)
    names = ["x" * 1_000_000 + end for end in "ab"]
    for name in names:
        tokenizer.render_chat([user("hi")], template_kwargs={name: 1})
    assert len([record for record in caplog.records if "without effect" in record.getMessage()]) == 1


# Which text is literal


def conversation(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}, user(text), answer(text), {"role": "tool", "content": text}]


@pytest.mark.parametrize("roles", [(), ("user",), ("user", "tool"), ("system", "user", "assistant", "tool"), None])
def test_control_tokens_of_a_message_are_text_in_the_literal_roles_alone(roles: tuple[str, ...] | None):
    tokenizer = characters(PLAIN)
    control = tokenizer.encode("<tool_call>")[0]
    ids = tokenizer.apply_chat_template(conversation("a<tool_call>"), literal_roles=roles)
    assert ids.count(control) == 4 - (4 if roles is None else len(roles))
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.render_chat(conversation("a<tool_call>"))


def test_without_literal_roles_a_conversation_is_encoded_as_it_is_rendered_as_in_transformers():
    tokenizer = characters(THINKER)
    call = {"function": {"name": "<|im_end|>", "arguments": {"x": "</tool_call>"}}}
    messages = [*conversation("<|im_end|>\n<|im_start|>"), {"role": "assistant", "tool_calls": [call]}]
    tools = [{"name": "<tool_call>"}]
    rendered = tokenizer.render_chat(messages, tools=tools)
    assert tokenizer.apply_chat_template(messages, tools=tools, literal_roles=()) == tokenizer.encode(rendered)
    control = set(tokenizer.encode("".join(SPECIALS)))
    guarded = tokenizer.apply_chat_template(messages, tools=tools)
    assert tokenizer.decode(guarded, skip_special_tokens=False) == rendered
    # The template's own: around each of 6 messages, the answer's head, and around the one call.
    assert sum(index in control for index in guarded) == 2 * 6 + 1 + 2

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.text import chat_template
from lserve_jax.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
BIG = "{% set x = 'x' * 1000000 %}"  # near the largest text allowed
LIST = "{% set x = range(90000) | list %}"
LOOP = "{% for i in range(90000) %}"
NESTED = "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
LONG_ON_TEXT = (
    *("'y' in x", "x == x + ''", "x is eq(x + '')", "x.replace('y', 'z')", "x | replace('y', 'z')", "x.find('xy')"),
    *("x | upper", "x.casefold()", "x | wordcount", "x | title", "x | tojson", "x | capitalize", "x[1:]", "x[::-1]"),
    *("x | reverse", "x | truncate(9999)", "x.isalpha()", "x.partition('y')", "x.startswith(x)", "x | indent", "x ~ 1"),
    "'%s' % x",
)
LONG_ON_LISTS = (
    *(
        "x | sort",
        "x | unique | list",
        "x | tojson",
        "x | join",
        "-1 in x",
        "-1 is in x",
        "x == 3",
        "x[1:]",
        "x.copy()",
    ),
    *("x.index(-1)", "x | max", "x | sum", "x | list", "x + x", "x | string | length", "x ~ ''", "x | reverse | list"),
    *("-1 in (x | map('default'))", "','.join(x | map('string'))", "dict(x | batch(2) | list) | dictsort"),
)
USES_OF_NESTED = (
    *("n.x", "n.x ~ ''", "n.x == [1]", "n.x | tojson", "raise_exception(n.x)", "'%s' % [n.x]", "'{}'.format(n.x)"),
    *("n.x | string", "n.x | upper", "[n.x] | join", "[n.x] | sort", "{}.get(n.x)", "[n.x].index(1)", "'x'.join(n.x)"),
)


def render(text: str, messages: list[dict[str, Any]] | None = None, **variables: str) -> str:
    return ChatTemplate(text, source="file.jinja", variables=variables).render(messages or MESSAGES)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m['content'] }};{% endfor %}", "user: hello;assistant: good day;"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks and lstrip_blocks
        ("{{ bos_token }}|{{ missing }}|{{ tools is none }}|{{ documents is none }}", "<s>||True|True"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.index }}{% endfor %}", "1"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.revindex0 }}{% endfor %}", "2120"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "hello"),
        ("{% for m in messages | selectattr('role', 'equalto', 'none') %}{% else %}none{% endfor %}", "none"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "123"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hello"}'),
        ("{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": "<é>"\n}'),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) ~ f('a') }}", "<1><a>"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ ','.join(['a', 'b']) }}", "a+ba,b"),
        (
            "{{ messages | map(attribute='role') | join(' ') }}{{ messages | join(',', 'role') }}",
            "user assistantuser,assistant",
        ),
        ("{{ 'aXa' | replace('X', 'Y') }}{{ 'aXa'.replace('a', 'b', 1) }}", "aYabXa"),
        ("{{ 'a\nb' | indent(2) }}{{ 'a\n\nb' | indent(1, first=true, blank=true) }}", "a\n  b a\n \n b"),
        (
            "{{ '%s-%03d' | format('a', 7) }}{{ '%(x)s' | format(x=1) }}{{ 'n%d' % 3 }}{{ '{}:{:>3}'.format(1, 2) }}",
            "a-0071n31:  2",
        ),
        ("{{ [1] + [2] }}{{ 2 * 3 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ 'ab' * 2 }}", "[1, 2]6323abab"),
        ("{{ 1700000000 | string }}{{ nothing | default(1700000000) }}", "17000000001700000000"),
        ("{{ range(3) | list }}{{ strftime_now('%%') }}", "[0, 1, 2]%"),
        ("{{ messages[::-1][0]['content'] | trim | upper | length }}", "8"),
    ],
)
def test_templates_render_as_hugging_face_renders_them(template: str, expected: str):
    assert render(template, bos_token="<s>") == expected


def test_the_generation_prompt_can_be_left_out():
    template = ChatTemplate("{{ 'go' if add_generation_prompt else 'stop' }}", source="x", variables={})
    assert template.render(MESSAGES, add_generation_prompt=False) == "stop"
    assert template.render(MESSAGES) == "go"


def test_the_day_is_todays():
    assert render("{{ strftime_now('%Y') }}") in (time.strftime("%Y"), str(int(time.strftime("%Y")) - 1))


# Loops twice over the messages, splits and trims answers, writes calls of tools: what long templates do.
THOROUGH = (
    "{% set n = namespace(last=messages | length - 1, going=true) %}{% for m in messages[::-1] %}"
    "{% set index = (messages | length - 1) - loop.index0 %}"
    "{% if n.going and m.role == 'user' and m.content is string and not (m.content.startswith('<tool_response>')"
    " and m.content.endswith('</tool_response>')) %}{% set n.going = false %}{% set n.last = index %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > n.last %}{{ '<a>' ~ thought | trim ~ content }}{% else %}{{ '<a>' + content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<u>{% endif %}"
    "{{ content }}{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}</u>{% endif %}"
    "{% else %}{{ '<u>' + m.role + '\n' + content + '</u>\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("count", "size"), [(4, 1), (1, 1_000_000), (4, 250_000), (2000, 500), (8000, 2)])
def test_a_thorough_template_on_a_long_conversation_leaves_most_of_the_budget(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
):
    for name in ("UNITS", "UNITS_PER_CHARACTER", "UNITS_PER_PART"):
        monkeypatch.setattr(chat_template, name, getattr(chat_template, name) // 3)
    text = ("a word </think> " * (size // 16 + 1))[:size]
    call = {"function": {"name": "f", "arguments": {"x": text}}}
    turns = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": text},
    ]
    rendered = render(THOROUGH, [turns[index % 4] for index in range(count)])
    assert len(rendered) > count * size // 2


def test_messages_of_any_length_fit():
    content = "word " * 1_000_000
    assert render("{% for m in messages %}{{ m.content | trim }}\n{% endfor %}", [{"role": "user", "content": content}])
    many = [{"role": "user", "content": "hi"}] * 20_000
    template = "{% set n = namespace(n=messages | length) %}"
    template += "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    assert render(template, many) == "user:hi" * 20_000


def test_a_source_that_is_too_long_to_compile_is_refused():
    with pytest.raises(InputError, match="the chat template has 200,001 characters where 200,000 are allowed"):
        render("x" * 200_001)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "failed: roles must alternate"),
        ("{{ missing.attribute }}", "failed: 'missing' is undefined"),
        ("{{ 1 + 'a' }}", "failed: unsupported operand"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{% include 'other' %}", "failed: no loader"),
        ("{% if %}", "not valid Jinja: Expected an expression"),
        ("{{ 'a' | nofilter }}", "not valid Jinja: No filter named 'nofilter'"),
        ("{{ " + "(" * 5000, "not valid Jinja"),
    ],
)
def test_a_template_that_fails_gives_one_line(template: str, message: str):
    with pytest.raises(ValueError, match=r"^file\.jinja: the chat template ") as caught:
        render(template)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ('x' | attr('__class__')).__name__ }}",
        "{{ self._TemplateReference__context[' budget'] }}",
    ],
)
def test_the_sandbox_is_shut(template: str):
    with pytest.raises(ValueError, match=r"unsafe|undefined"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        # time: many steps
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(9000) | map('string') %}{% for b in range(9000) | map('string') %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% for i in [1, 2] if i recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% block a %}{{ self.b() }}{{ self.b() }}{% endblock %}{% block b %}{{ self.a() ~ self.a() }}{% endblock %}",
        LOOP + "{% set y = range(99999) | select('odd') | map('string') | map('upper') | list %}{% endfor %}",
        LOOP + "{% set y = range(99999) | batch(1) | list %}{% endfor %}",
        "{% for a in range(99999) %}" + "{% if b %}{% endif %}" * 1000 + "{% endfor %}",
        "{% macro f() %}" + "{% if b %}{% endif %}" * 1000 + "{% endmacro %}" + LOOP + "{{ f() }}{% endfor %}",
        LIST + "{% macro f() %}{% endmacro %}" + LOOP + "{{ f(*x) }}{% endfor %}",
        # time: steps on large values
        *(BIG + LOOP + "{% set y = " + long + " %}{% endfor %}" for long in LONG_ON_TEXT),
        *(LIST + LOOP + "{% set y = " + long + " %}{% endfor %}" for long in LONG_ON_LISTS),
        BIG
        + "{% set z = x + '' %}{% for i in range(9000) %}{% if loop.changed([x, z][i % 2]) %}{% endif %}{% endfor %}",
        "{% set n = namespace(x='') %}" + LOOP + "{% set n.x = n.x + 'abcdefghijkl' %}{% endfor %}",
        "{% set n = namespace(x='') %}" + LOOP + "{% set n.x = n.x ~ 'abcdefghijkl' %}{% endfor %}",
        "{% set n = namespace(x=[]) %}" + LOOP + "{% set n.x = n.x + [1] %}{% endfor %}",
        # time: one step whose work is the product of two lengths, or more
        BIG + "{{ x.rfind('y' ~ x[:400000]) }}",
        BIG + "{{ x.rsplit('y' ~ x[:400000]) }}",
        BIG + "{{ ('z' * 900000).strip('y' * 400000 ~ 'z') }}",
        BIG + "{{ x | trim('y' * 400000 ~ 'x') }}",
        "{{ ([[1]] * 90000) | sum(start=[]) }}",
        "{{ ([{'a': [1]}] * 90000) | sum('a', []) }}",
        "{% set n = namespace(x=3) %}" + LOOP + "{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ (10 ** 9) ** (10 ** 9) }}",
        "{{ ('1' * 900000) | int(0, 16) % 7 }}",
        "{{ 5 | round(-1000000000) }}",
        "{{ strftime_now('%Y' * 1000) }}",
        "{{ ([{}] * 1000) | map(attribute='a.' * 1000 ~ 'a', default=1) | list }}",
        # time: a small value that has the same parts many times
        *(NESTED + "{{ " + use + " }}" for use in USES_OF_NESTED),
        NESTED.replace("[", "(").replace("]", ")") + "{{ {n.x: 1} }}",
        NESTED.replace("[", "(").replace("]", ")") + "{{ {}[n.x] }}",
        NESTED.replace("[n.x, n.x]", "namespace(a=n.x, b=n.x)") + "{{ n.x }}",
        # one huge value
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ ('x' | safe).zfill(1000000000) }}",
        "{{ ['x'] | map('center', 1000000000) | list }}",
        "{{ (5).to_bytes(1000000000, 'big') }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%(x)1000000000d' | format(x=1) }}",
        "{{ '{:1000000000d}'.format(1) }}",
        "{{ '{:{w}d}'.format(1, w=1000000000) }}",
        "{{ ('{:1000000000d}' | safe).format_map({}) }}",
        "{{ [1] | batch(1000000000, 0) | list }}",
        "{{ [1] | slice(1000000000) | list }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ lipsum(100000) }}",
        "{{ 'a b' | wordwrap(1, wrapstring='x' * 1000000) }}",
        BIG + "{{ x.replace('x', x) }}",
        BIG + "{{ x | replace('x', x) }}",
        BIG + "{{ x.join(x) }}",
        BIG + "{{ range(10000) | join(x) }}",
        BIG + "{{ ('\t' + x).expandtabs(10000) }}",
        BIG + "{{ x.translate({120: x}) }}",
        BIG + "{{ x | replace('x', '\n') | indent(10000) }}",
        # growth by doubling, and writing without end
        "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
        "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x %}{{ s.x * 2 }}{% endset %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% for i in range(90000) %}" + "x" * 1000 + "{% endfor %}",
    ],
)
def test_a_hostile_template_is_stopped_soon(template: str, monkeypatch: pytest.MonkeyPatch):
    """Work is counted in calls of functions, which are the same on a busy machine.

    What Python does within one function is in `test_jinja_costs.py`.
    """
    monkeypatch.setattr(chat_template, "UNITS", chat_template.UNITS // 10)
    message = rf"^file\.jinja: the chat template (failed|is not valid Jinja): .*({REFUSED})"
    with pytest.raises(InputError, match=message), counted_calls() as calls:
        render(template)
    assert next(calls) < chat_template.UNITS


REFUSED = "|".join(
    [
        r"more work than the [\d,]+ units allowed for a conversation of this size",
        r"more than [\d,]+ characters written",
        r"a value of [\d,]+ characters where [\d,]+ are allowed",
        r"the number \S+ passed to a function where at most 10,000 is allowed",
        r"a format with a width above 99 or taken from an argument",
        r"a whole number of more than 10,000 bits",
        r"the sum of what are no numbers",
        r"a date's format has more than 100 characters",
        r"an attribute's name of more than 100 characters",
        r"a recursive loop cannot have a condition here",
        r"maximum recursion depth exceeded",
        r"access to attribute '(expandtabs|translate)' of 'str' object is unsafe",
        r"'lipsum' is undefined",
        r"No filter named 'wordwrap'",
    ]
)


@contextmanager
def counted_calls() -> Iterator[Iterator[int]]:
    """Counts how often functions of Python and C are entered or left, which the next number then says."""
    calls, before = itertools.count(), sys.getprofile()
    sys.setprofile(lambda *_: next(calls) and None)
    try:
        yield calls
    finally:
        sys.setprofile(before)

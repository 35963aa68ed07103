import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lserve_jax.text import jinja_budget
from lserve_jax.text.chat_template import SLACK, ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
BIG = "{% set x = 'x' * 1000000 %}"  # near the largest text allowed


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


def test_messages_of_any_length_fit():
    content = "word " * 1_000_000
    assert render("{% for m in messages %}{{ m.content | trim }}\n{% endfor %}", [{"role": "user", "content": content}])
    many = [{"role": "user", "content": "hi"}] * 20_000
    template = "{% set n = namespace(n=messages | length) %}"
    template += "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    assert render(template, many) == "user:hi" * 20_000


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
        # time
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in range(9000) | map('string') %}{% for b in range(9000) | map('string') %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{{ (10 ** 9) ** (10 ** 9) }}",
        "{{ 5 | round(-1000000000) }}",
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
def test_a_malicious_template_is_stopped_soon(template: str, monkeypatch: pytest.MonkeyPatch):
    """Work is counted in calls, which are the same on a busy machine: a few per step or character that is allowed."""
    assert jinja_budget.MAX_STEPS <= 1_000_000
    monkeypatch.setattr(jinja_budget, "MAX_STEPS", 100_000)
    message = rf"^file\.jinja: the chat template (failed|is not valid Jinja): .*({REFUSED})"
    with pytest.raises(ValueError, match=message), counted_calls() as calls:
        render(template)
    assert next(calls) < 100 * jinja_budget.MAX_STEPS + 10 * SLACK


REFUSED = "|".join(
    [
        r"more than [\d,]+ (loop iterations and calls|characters written)",
        r"a value of [\d,]+ characters or items where [\d,]+ are allowed",
        r"the number -?\d+ passed to a function where at most 10,000 is allowed",
        r"a format with a width above 9,999 or taken from an argument",
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

"""What clients ask: the same for a seed, of the sizes that were asked for, sharing what they should and no more."""

from dataclasses import replace

import pytest

from bench.serve.workloads import (
    BOTH,
    SHAPES,
    WORKLOADS,
    Script,
    Stage,
    Turn,
    as_arrivals,
    prose_of,
    stages,
    tokenizer_of,
)
from lserve_jax.engine.setup import DEFAULT_MODEL
from lserve_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(DEFAULT_MODEL)


def longest(script: Script, tokenizer: Tokenizer) -> int:
    """Tokens of a script's longest request and its answer, if answers have exactly the tokens asked for."""
    messages = [{"role": "system", "content": script.system}] if script.system else []
    most = 0
    for turn in script.turns:
        asked = [*messages, {"role": "user", "content": turn.text}]
        most = max(most, len(tokenizer.apply_chat_template(asked)) + turn.max_tokens)
        if script.is_conversation:
            messages = [*asked, {"role": "assistant", "content": " word" * turn.max_tokens}]
    return most


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_a_function_of_its_seed_and_fits_its_context(name: str, tokenizer: Tokenizer):
    shape = replace(SHAPES[name], document=min(SHAPES[name].document, 300))
    found = stages(name, shape, 3, tokenizer)
    assert found == stages(name, shape, 3, tokenizer)
    others = {turn.text[:60] for one in stages(name, shape, 4, tokenizer) for s in one.scripts for turn in s.turns}
    scripts = [script for one in found for script in one.scripts]
    assert not others & {turn.text[:60] for script in scripts for turn in script.turns}
    assert max(longest(script, tokenizer) for script in scripts) <= shape.context(name)
    assert max(len(one.scripts) for one in found) == shape.clients


def test_a_context_has_room_for_a_whole_document_and_not_much_more(tokenizer: Tokenizer):
    for name in ("documents", "long_arrival"):
        shape = SHAPES[name]
        scripts = [script for one in stages(name, replace(shape, clients=1), 0, tokenizer) for script in one.scripts]
        most = max(longest(script, tokenizer) for script in scripts)
        assert shape.document < most <= shape.context(name) < 2 * most


def test_the_long_prompt_has_20_chunks(tokenizer: Tokenizer):
    shape = SHAPES["long_arrival"]
    both = next(one for one in stages("long_arrival", shape, 0, tokenizer) if one.name == BOTH)
    stream, long = both.scripts
    count = len(tokenizer.apply_chat_template([{"role": "user", "content": long.turns[0].text}]))
    assert -(-count // shape.chunk) == 20
    assert stream.starts_after == 0 < long.starts_after < stream.turns[0].max_tokens


def test_documents_are_shared_where_they_should_be(tokenizer: Tokenizer):
    def starts(name: str) -> set[str]:
        found = stages(name, replace(SHAPES[name], document=200), 0, tokenizer)
        return {turn.text.split("\n\n")[0] for script in found[0].scripts for turn in script.turns}

    assert len(starts("documents")) == SHAPES["documents"].clients
    assert len(starts("shared_document")) == 1
    found = stages("shared_document", replace(SHAPES["shared_document"], document=200), 0, tokenizer)
    texts = [turn.text for script in found[0].scripts for turn in script.turns]
    assert len(set(texts)) == len(texts), "every question is another one"
    chats = stages("chat", replace(SHAPES["chat"], document=200), 0, tokenizer)[0].scripts
    assert len({script.system for script in chats}) == 1
    assert all(script.is_conversation for script in chats)


@pytest.mark.parametrize("tokens", [0, 20, 500])
def test_prose_has_at_most_so_many_tokens_in_whole_sentences(tokens: int, tokenizer: Tokenizer):
    text = prose_of(tokens, "x", tokenizer)
    assert text.endswith((".", "?", "!", '"', "”"))
    count = len(tokenizer.encode(text))
    assert count <= tokens or tokens < 60
    assert count > tokens - 60


def test_as_arrivals_requests_are_apart_unless_they_need_an_answer():
    turns = (Turn("a", 1), Turn("b", 1))
    lone, talk = Script(turns, system="S", starts_after=2), Script(turns, is_conversation=True)
    (stage,) = as_arrivals((Stage("s", (lone, talk)),))
    assert stage.scripts == (replace(lone, turns=turns[:1]), replace(lone, turns=turns[1:]), talk)

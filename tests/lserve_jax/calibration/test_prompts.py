"""Synthetic prompts: their length, where their passages lie, what is asked for, and that a seed repeats them."""

import logging
from pathlib import Path

import numpy as np
import pytest

from lserve_jax.calibration.passkeys import ALPHABET, ORDINALS, Passkeys
from lserve_jax.calibration.prompts import ANSWER_TOKENS, KINDS, Prompt, make_prompts
from lserve_jax.calibration.two_streams import BLOCK
from lserve_jax.config.errors import InputError
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights.gguf import GGUFFile

LENGTH = 1024


@pytest.fixture(scope="module")
def tokenizer(embedded_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(embedded_gguf).metadata)


@pytest.fixture(scope="module")
def raw(embedded_gguf: Path) -> Tokenizer:
    """The same vocabulary without a chat format."""
    metadata = dict(GGUFFile(embedded_gguf).metadata)
    del metadata["tokenizer.chat_template"]
    return Tokenizer.from_gguf(metadata)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[Prompt]:
    return make_prompts(tokenizer, count=12, length=LENGTH, seed=3)


@pytest.mark.parametrize("kind", ["retrieval", "copying"])
def test_a_model_without_a_default_chat_template_is_warned_of_or_refused(
    embedded_gguf: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    metadata = dict(GGUFFile(embedded_gguf).metadata)
    template = metadata.pop("tokenizer.chat_template")
    whole, named = (Tokenizer.from_gguf(metadata | {f"tokenizer.chat_template{x}": template}) for x in ("", ".rag"))
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        for count in (1, 2):
            make_prompts(whole, count=count, length=700, seed=0, kinds=[kind])
    assert not caplog.records
    with pytest.raises(InputError, match=r"templates are rag, and none is the default: for an instruct .* --tokenizer"):
        make_prompts(named, count=1, length=700, seed=0, kinds=[kind])
    assert len(make_prompts(named, count=1, length=700, seed=0, kinds=["text"])) == 1
    without = Tokenizer.from_gguf(metadata)
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        for count in (1, 2):
            make_prompts(without, count=count, length=700, seed=0, kinds=[kind])
    (record,) = caplog.records
    assert "has no chat template: the prompt is continued as it is (for an instruct model" in record.getMessage()


def passage(tokenizer: Tokenizer, prompt: Prompt, number: int) -> str:
    pairs = zip(prompt.tokens, prompt.sources, strict=True)
    return tokenizer.decode([token for token, source in pairs if source == number]).strip()


def answer(tokenizer: Tokenizer, prompt: Prompt) -> str:
    return tokenizer.decode(prompt.tokens[-prompt.num_answer :])


def test_kinds_come_by_turns_and_prompts_fill_the_length(prompts: list[Prompt]):
    assert [prompt.kind for prompt in prompts] == [*KINDS] * 4
    for prompt in prompts:
        assert 0.95 * LENGTH <= len(prompt.tokens) <= LENGTH
        assert prompt.num_answer <= ANSWER_TOKENS


@pytest.mark.parametrize("length", [600, 3000])
def test_other_lengths_are_filled_too(tokenizer: Tokenizer, length: int):
    for prompt in make_prompts(tokenizer, count=3, length=length, seed=0):
        assert length - 60 <= len(prompt.tokens) <= length


def test_a_fact_that_is_asked_for_lies_where_the_prompt_says(tokenizer: Tokenizer, prompts: list[Prompt]):
    for prompt in prompts[:: len(KINDS)]:
        asked = dict.fromkeys(prompt.asks)
        assert len(asked) == 4 and max(prompt.sources) == 8
        for number in asked:
            told = tokenizer.decode(
                [
                    token
                    for token, ask in zip(prompt.tokens[-prompt.num_answer :], prompt.asks, strict=True)
                    if ask == number
                ]
            )
            fact = passage(tokenizer, prompt, number)
            assert fact.endswith(".") and fact[0].isupper()
            value = fact.removesuffix(".").split()[-1]
            assert value in told
            assert answer(tokenizer, prompt).count(value) == 1
        question = tokenizer.decode(prompt.tokens).rsplit("\n\n", maxsplit=1)[1]
        for number in range(1, 9):
            fact = passage(tokenizer, prompt, number)
            key = " ".join(fact.split(" the ")[1].split()[:2])
            assert (key in question) == (number in asked)


def test_a_passage_that_is_to_be_copied_lies_where_the_prompt_says(tokenizer: Tokenizer, prompts: list[Prompt]):
    for prompt in prompts[1 :: len(KINDS)]:
        copied, source = answer(tokenizer, prompt), passage(tokenizer, prompt, 1)
        assert source.startswith(copied)
        assert prompt.num_answer > 100
        begin = " ".join(source.split()[:6])
        text = tokenizer.decode(prompt.tokens[: -prompt.num_answer])
        assert text.count(begin) == 2  # in the prose and in the question


def test_plain_text_has_no_passages(prompts: list[Prompt]):
    for prompt in prompts[2 :: len(KINDS)]:
        assert prompt.num_answer == ANSWER_TOKENS
        assert not any(prompt.sources) and not any(prompt.asks)


def test_a_seed_repeats_its_prompts_and_another_gives_others(tokenizer: Tokenizer, prompts: list[Prompt]):
    assert make_prompts(tokenizer, count=12, length=LENGTH, seed=3) == prompts
    assert make_prompts(tokenizer, count=5, length=LENGTH, seed=3) == prompts[:5]
    others = make_prompts(tokenizer, count=12, length=LENGTH, seed=4)
    assert all(mine.tokens != theirs.tokens for mine, theirs in zip(prompts, others, strict=True))


def test_prompts_are_chats_where_the_model_has_a_chat_format(tokenizer: Tokenizer, raw: Tokenizer):
    for kind in ("retrieval", "copying"):
        (chat,) = make_prompts(tokenizer, count=1, length=700, seed=0, kinds=[kind])
        head = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])[:5]
        assert chat.tokens[:5] == tuple(head)
        (plain,) = make_prompts(raw, count=1, length=700, seed=0, kinds=[kind])
        text = tokenizer.decode(plain.tokens, skip_special_tokens=False)
        assert "<|im_start|>" not in text
        assert plain.num_answer == chat.num_answer
        assert text.removesuffix(answer(tokenizer, plain)).endswith("\n")
        assert passage(tokenizer, plain, 1) == passage(tokenizer, chat, 1)


@pytest.mark.parametrize("kind", ["retrieval", "copying"])
def test_a_length_without_room_is_refused_in_one_line(tokenizer: Tokenizer, kind: str):
    with pytest.raises(
        ValueError, match=rf"^length=100 is too short for a {kind} prompt: it must be at least"
    ) as error:
        make_prompts(tokenizer, count=1, length=100, seed=0, kinds=[kind])
    least = int(str(error.value).split()[-2])
    (prompt,) = make_prompts(tokenizer, count=1, length=least, seed=0, kinds=[kind])
    assert len(prompt.tokens) == least


def test_passkeys_are_hidden_in_the_text_and_labelled_in_the_answers(tokenizer: Tokenizer):
    passkeys = Passkeys(tokenizer=tokenizer, min_length=2048, max_length=4096, seed=0)
    for step in range(3):
        example = passkeys.make(step)
        ids, is_labelled = np.asarray(example.tokens), np.asarray(example.is_labelled)
        size = np.flatnonzero(ids)[-1] + 1
        assert 2048 - 60 <= size <= 4096
        text = tokenizer.decode(ids[:size].tolist())
        runs = np.flatnonzero(np.diff(np.r_[0, is_labelled.astype(int), 0])).reshape(-1, 2)
        assert len(runs) == 10
        for ordinal, (begin, end) in zip(ORDINALS, runs, strict=True):
            key = tokenizer.decode(ids[begin:end].tolist()).removesuffix(".")
            assert len(key.split()) == 32 and set(key.split()) <= set(ALPHABET)
            assert f"The {ordinal} passkey is {key}." in text
            assert tokenizer.decode(ids[:begin].tolist()).endswith(f"What is the {ordinal} passkey?\n")
        assert not is_labelled[size:].any()


def test_examples_have_few_sizes_and_repeat_from_the_seed(tokenizer: Tokenizer):
    def make(seed: int) -> list[bytes]:
        passkeys = Passkeys(tokenizer=tokenizer, min_length=600, max_length=3000, seed=seed, num_passkeys=2)
        examples = [passkeys.make(step) for step in range(12)]
        sizes = {example.tokens.size for example in examples}
        assert sizes <= {BLOCK * 4, BLOCK * 8, BLOCK * 16} and len(sizes) > 1
        return [np.asarray(example.tokens).tobytes() for example in examples]

    first = make(0)
    assert make(0) == first
    assert len({*first, *make(1)}) == 24


def test_passkeys_without_room_are_refused_in_one_line(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match=r"^min_length=1000 has no room for 10 passkeys of 32 words [^\n]*$"):
        Passkeys(tokenizer=tokenizer, min_length=1000, max_length=4096, seed=0)
    with pytest.raises(ValueError, match=r"^min_length=4096 must be at most max_length=2048$"):
        Passkeys(tokenizer=tokenizer, min_length=4096, max_length=2048, seed=0)
    with pytest.raises(ValueError, match=r"^num_passkeys=11 must be from 1 to 10$"):
        Passkeys(tokenizer=tokenizer, min_length=2048, max_length=4096, seed=0, num_passkeys=11)

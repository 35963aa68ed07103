"""Completions over HTTP: texts and token ids, echoed prompts with log-probabilities, the shapes that lm-eval reads."""

import json
from typing import Any

import pytest
from openai.types import Completion

from tests.lserve_jax.serve.running import Running

PATH = "/v1/completions"
IDS = [5, 6, 7, 8, 80, 83]


def ask(server: Running, **fields: Any) -> dict[str, Any]:
    found = server.post(PATH, {"max_tokens": 8} | fields)
    assert found.status_code == 200, found.text
    if not fields.get("echo"):  # OpenAI's types have no null for the first token of a prompt, its server does
        Completion.model_validate(found.json(), strict=True)
    return found.json()


def stream(server: Running, **fields: Any) -> list[dict[str, Any]]:
    found = server.post(PATH, {"max_tokens": 8, "stream": True} | fields)
    assert found.status_code == 200, found.text
    lines = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    for chunk in chunks:  # OpenAI's types have no null for a reason, its streams do
        reasons = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
        Completion.model_validate(chunk | {"choices": reasons}, strict=True)
    return chunks


def test_one_or_several_texts_or_lists_of_ids_are_continued_in_order(server: Running):
    texts = ["hello", "the world"]
    for prompt, each in ((texts[0], [texts[0]]), (texts, texts), (IDS, [IDS]), ([IDS, IDS[:2]], [IDS, IDS[:2]])):
        found = ask(server, prompt=prompt)
        outputs = [server.alone(one) for one in each]
        assert [choice["text"] for choice in found["choices"]] == [output.text for output in outputs]
        assert [choice["index"] for choice in found["choices"]] == list(range(len(each)))
        assert found["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)


def test_texts_and_lists_may_be_mixed(server: Running):
    found = ask(server, prompt=["hello", IDS])
    assert [choice["text"] for choice in found["choices"]] == [server.alone(one).text for one in ("hello", IDS)]


def test_several_answers_to_several_prompts_stand_by_prompt(server: Running):
    found = ask(server, prompt=["hello", "world"], n=2, seed=3, temperature=1.5)
    expected = [server.alone(one, seed=3 + i, temperature=1.5).text for one in ("hello", "world") for i in range(2)]
    assert [choice["text"] for choice in found["choices"]] == expected
    prompt = sum(len(server.alone(one).prompt_token_ids) for one in ("hello", "world"))
    assert found["usage"]["prompt_tokens"] == prompt


def test_streams_of_several_prompts_have_the_same_texts(server: Running):
    chunks = stream(server, prompt=["hello", IDS], echo=True, stream_options={"include_usage": True})
    whole = ask(server, prompt=["hello", IDS], echo=True)
    for index in range(2):
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(part["text"] for part in parts) == whole["choices"][index]["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_echo_gives_the_prompt_back_as_it_was(server: Running):
    assert ask(server, prompt="hello", echo=True)["choices"][0]["text"] == "hello" + server.alone("hello").text
    (choice,) = ask(server, prompt=IDS, echo=True)["choices"]
    assert choice["text"] == server.tokenizer.decode(IDS, skip_special_tokens=False) + server.alone(IDS).text


@pytest.mark.parametrize("count", [0, 1, 5])
def test_log_probabilities_of_the_answer(server: Running, count: int):
    found = ask(server, prompt="hello", logprobs=count)["choices"][0]["logprobs"]
    output = server.alone("hello", logprobs=True, top_logprobs=count)
    assert found["token_logprobs"] == list(output.logprobs or ())
    assert "".join(found["tokens"]) == output.text
    assert found["text_offset"] == [len("".join(found["tokens"][:at])) for at in range(8)]
    assert all(count <= len(top) <= count + 1 for top in found["top_logprobs"][1:]) or count == 0
    if count:  # greedy: lm-eval takes the token to be the likeliest if the values are equal
        assert all(
            value == max(top.values())
            for value, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True)
        )
    streamed = [one["choices"][0]["logprobs"] for one in stream(server, prompt="hello", logprobs=count)]
    for name in found:
        assert [value for part in streamed if part for value in part[name]] == found[name]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_an_echoed_prompt_has_the_log_probabilities_of_prefill(server: Running, max_tokens: int):
    request = {"prompt": [IDS, IDS[:3]], "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    found = ask(server, max_tokens=max_tokens, **request)
    server.engine.wait_until_idle()
    for choice, ids in zip(found["choices"], (IDS, IDS[:3]), strict=True):
        shape, values = choice["logprobs"], server.llm.prompt_logprobs(ids)
        assert {len(values) for values in shape.values()} == {len(ids) + max_tokens}
        assert shape["token_logprobs"][0] is None and shape["top_logprobs"][0] is None
        assert shape["token_logprobs"][1 : len(ids)] == pytest.approx(values.tolist(), abs=1e-5)
        greedy = server.llm.logits(ids).argmax(axis=-1)[:-1] == ids[1:]
        pairs = list(zip(shape["token_logprobs"], shape["top_logprobs"], strict=True))[1 : len(ids)]
        assert [value == max(top.values()) for value, top in pairs] == greedy.tolist()
        assert "".join(shape["tokens"]) == choice["text"]
    assert found["usage"]["completion_tokens"] == 2 * max_tokens


def test_a_greedy_continuation_is_seen_as_greedy_by_what_lm_eval_does(server: Running):
    continuation = server.alone(IDS, max_tokens=4, ignore_eos=True).token_ids
    for ids, is_greedy in (([*IDS, *continuation], True), ([*IDS, *continuation[:-1], 5], False)):
        request = {"prompt": [ids], "logprobs": 1, "echo": True, "temperature": 0, "max_tokens": 1}
        shape = ask(server, **request)["choices"][0]["logprobs"]
        span = slice(len(IDS), -1)
        pairs = zip(shape["token_logprobs"][span], shape["top_logprobs"][span], strict=True)
        assert all(value == max(top.values()) for value, top in pairs) == is_greedy


def test_an_end_token_counts_as_a_token_so_that_lm_evals_slices_hold(server: Running):
    first = server.alone(IDS, ignore_eos=True).token_ids[0]
    request = {"prompt": [IDS], "logprobs": 1, "echo": True, "max_tokens": 1, "stop_token_ids": [first]}
    (choice,) = ask(server, **request)["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == len(IDS) + 1


def test_nothing_generated_still_fills_the_context(server: Running):
    found = ask(server, prompt=[5] * 96, max_tokens=0, echo=True)
    assert found["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 96,
        "completion_tokens": 0,
        "total_tokens": 96,
        "prompt_tokens_details": None,
    }


def test_special_tokens_may_be_left_out(server: Running):
    tokenizer = server.tokenizer
    for adds in (True, False):
        expected = len(tokenizer.encode("hello", add_special_tokens=adds))
        assert ask(server, prompt="hello", add_special_tokens=adds)["usage"]["prompt_tokens"] == expected


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt"),
        ({"prompt": ["a", ""]}, "invalid_value", "prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
        ({"prompt": [5, "a"]}, "invalid_type", "prompt"),
        ({"prompt": [5, 1.5]}, "invalid_type", "prompt"),
        ({"prompt": [5, True]}, "invalid_type", "prompt"),
        ({"prompt": [[5, None]]}, "invalid_type", "prompt"),
        ({"prompt": [[[5]]]}, "invalid_type", "prompt"),
        ({"prompt": [5, 128]}, "invalid_value", "prompt"),
        ({"prompt": [5, -1]}, "invalid_value", "prompt"),
        ({"prompt": [5, 10**4000]}, "invalid_value", "prompt"),
        ({"prompt": [[5], [128]]}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 1000}, "invalid_value", "n"),
        ({"prompt": ["a"] * 10, "n": 100}, "invalid_value", "n"),
        ({"prompt": [5] * 96}, "context_length_exceeded", "prompt"),
        ({"prompt": [[5], [5] * 97]}, "context_length_exceeded", "prompt"),
        ({"prompt": [5], "max_tokens": 96}, "context_length_exceeded", "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
        ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs"),
        ({"prompt": "a", "stream": True, "echo": True, "logprobs": 1}, "invalid_value", "echo"),
    ],
)
def test_what_cannot_be_continued_is_refused_and_nothing_runs(
    server: Running, fields: dict[str, Any], code: str, param: str
):
    found = server.post(PATH, fields)
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (400, code, param)
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert not server.engine.submitted

"""Real clients on real sockets: openai-python, lm-eval, LangChain. Their answers are those of `LLM` in this process."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from lserve_jax import SamplingParams
from tests.lserve_jax.serve.running import NAME, Running

pytestmark = pytest.mark.slow

MESSAGES: list[Any] = [{"role": "user", "content": "hello the world"}]


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client


# --- openai-python ---


def test_openai_chats(server: Running, client: openai.OpenAI):
    found = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=8, n=2, seed=5, temperature=1.5, extra_body={"return_lserve": True}
    )
    for index, choice in enumerate(found.choices):
        output = server.alone(MESSAGES, seed=5 + index, temperature=1.5)
        assert (choice.message.content, choice.finish_reason) == (output.text, output.finish_reason)
        assert (choice.model_extra or {})["lserve"]["kv_bytes"] > 0
    assert found.usage is not None and found.usage.prompt_tokens_details is not None


def test_openai_streams_with_progress_and_usage(server: Running, client: openai.OpenAI):
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_progress": True},
        )
    )
    output = server.alone(MESSAGES)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == output.text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(output.token_ids)
    assert any("prompt_progress" in (chunk.model_extra or {}) for chunk in chunks)


def test_openai_completions_with_token_ids(server: Running, client: openai.OpenAI):
    found = client.completions.create(model=NAME, prompt=[[5, 6, 7], [8, 9]], max_tokens=4, logprobs=2)
    server.engine.wait_until_idle()
    outputs = server.llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=4, logprobs=True))
    assert [choice.text for choice in found.choices] == [output.text for output in outputs]
    assert [choice.logprobs.token_logprobs for choice in found.choices if choice.logprobs] == [
        list(output.logprobs or ()) for output in outputs
    ]


def test_many_openai_streams_at_once(server: Running):
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=8, stream=True, seed=seed, temperature=1.0
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def act() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(12)))

    assert asyncio.run(act()) == [server.alone(MESSAGES, seed=seed, temperature=1.0).text for seed in range(12)]


def test_openais_models_and_ids(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=MESSAGES, max_tokens=1)
    assert raw.parse()._request_id == raw.headers["x-request-id"]


def test_openais_errors_have_their_codes(server: Running, client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=1000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=NAME, prompt="a" * 30_000_000)
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")


def test_openai_raises_what_fails_in_the_middle_of_a_stream(server: Running, client: openai.OpenAI):
    def fail() -> None:
        raise RuntimeError("the device is gone")

    stream = client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True)
    chunks = [next(stream)]
    server.engine.before_call = fail
    stream = client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError) as caught:
        chunks += list(stream)
    assert (caught.value.code, caught.value.type) == ("internal_error", "server_error")


def test_a_slow_prefill_outlasts_openais_read_timeout(server: Running):
    """The pings of a stream keep it alive: the engine stands still for twice the client's timeout."""
    import threading

    import httpx

    go = threading.Event()
    server.engine.before_call = lambda: go.wait(60)
    timeout: Any = httpx.Timeout(60, read=3)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=timeout, max_retries=0) as client:
        timer = threading.Timer(7, go.set)
        timer.start()
        stream = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=4, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        timer.join()


# --- lm-eval ---


@pytest.fixture(scope="module")
def items(llm: Any) -> list[tuple[str, str]]:
    """Contexts and continuations; every second continuation is what the model would say."""
    rng = np.random.default_rng(0)
    words = ["the", "world", "hello", "of", "and", "read", "water", "order"]
    found = []
    for number in range(50):
        context = " ".join(rng.choice(words, size=int(rng.integers(2, 9))))
        continuation = " " + " ".join(rng.choice(words, size=2))
        if number % 2:
            ids = llm.tokenizer.encode(context, add_special_tokens=False)
            continuation = llm.generate([ids], SamplingParams(max_tokens=3, ignore_eos=True))[0].text or continuation
        found.append((context, continuation))
    return found


def instance(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def made(kind: Any, **options: Any) -> Any:
    """A model of lm-eval, whose constructors hide their arguments from a type checker."""
    return kind(**options)


@pytest.mark.parametrize(("batch_size", "num_concurrent"), [(1, 1), (8, 1), (4, 4)])
def test_lm_eval_scores_as_the_model_does(
    server: Running, items: list[tuple[str, str]], batch_size: int, num_concurrent: int
):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    judge = made(
        LocalCompletionsAPI,
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer_backend="auto",
        max_length=96,
        batch_size=batch_size,
        num_concurrent=num_concurrent,
        max_retries=1,
    )
    assert judge.tokenizer_backend == "remote"
    found = judge.loglikelihood([instance("loglikelihood", *item) for item in items], disable_tqdm=True)
    server.engine.wait_until_idle()
    greedy = 0
    for (context, continuation), (logprob, is_greedy) in zip(items, found, strict=True):
        start, ids = judge._encode_pair(context, continuation)
        values = server.llm.prompt_logprobs([*start, *ids])[-len(ids) :]
        assert logprob == pytest.approx(float(values.sum()), abs=1e-4)
        best = server.llm.logits([*start, *ids]).argmax(axis=-1)[len(start) - 1 : -1]
        assert is_greedy == (best.tolist() == ids)
        greedy += is_greedy
    assert 0 < greedy < len(items)


def test_lm_eval_generates(server: Running):
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    text = "hello the world"
    stops = ["\n\n", "Question:", "</s>", "zz", "yy"]
    settings = {"until": stops, "max_gen_toks": 8, "do_sample": False}
    judge = made(
        LocalCompletionsAPI,
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer_backend="remote",
        max_length=96,
        max_retries=1,
    )
    (found,) = judge.generate_until([instance("generate_until", text, settings)], disable_tqdm=True)
    ids = server.tokenizer.encode(text, add_special_tokens=False)
    assert found == server.alone(ids, stop=stops).text
    chats = made(
        LocalChatCompletion, base_url=f"{server.url}/v1/chat/completions", model=NAME, max_length=96, max_retries=1
    )
    prompt = chats.apply_chat_template(MESSAGES)
    (found,) = chats.generate_until([instance("generate_until", prompt, settings)], disable_tqdm=True)
    assert found == server.alone(MESSAGES, stop=stops[:4]).text


# --- LangChain ---


def test_langchain_invokes_streams_and_batches(server: Running):
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr("none"), model=NAME, temperature=0, max_completion_tokens=8
    )
    expected = server.alone(MESSAGES)
    found = chat.invoke("hello the world")
    assert found.content == expected.text
    assert found.usage_metadata is not None and found.usage_metadata["output_tokens"] == len(expected.token_ids)
    chunks = list(chat.stream("hello the world", stream_usage=True))
    assert "".join(str(chunk.content) for chunk in chunks) == expected.text
    assert sum((chunk.usage_metadata or {"output_tokens": 0})["output_tokens"] for chunk in chunks) == 8
    texts: list[Any] = ["hello", "the world", "of the order"]
    outputs = [server.alone([{"role": "user", "content": text}]).text for text in texts]
    assert [one.content for one in chat.batch(texts)] == outputs

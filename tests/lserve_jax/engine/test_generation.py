"""The loop that requests share: one's trouble is its own, one thread at a time, and no failure is for ever."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.engine import Engine
from lserve_jax.runtime.programs import Call, Programs
from lserve_jax.text.stream import TextStream

MODEL = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def shared() -> LLM:
    return LLM(MODEL, attention="dense", max_model_len=96, max_num_seqs=3, steps_per_call=2, prefill_chunk=64)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert shared.session.is_idle


class UnreadableError(Exception):
    """What a broken tokenizer raises."""


def breaking(method: Any, prompt_with: int) -> Any:
    """`TextStream.push` that fails for the stream of the request that generates a token first seen at a count."""
    pushed: dict[TextStream, int] = {}

    def push(self: TextStream, token: int, **options: Any) -> str:
        pushed[self] = pushed.get(self, 0) + 1
        if list(pushed).index(self) == 0 and pushed[self] == prompt_with:
            raise UnreadableError("this text cannot be")
        return method(self, token, **options)

    return push


@pytest.mark.parametrize("at", [1, 4], ids=["in its prefill call", "in a decode call"])
def test_an_error_of_one_requests_text_ends_that_request_alone(llm: LLM, at: int, monkeypatch: pytest.MonkeyPatch):
    expected = llm.generate([5, 6, 7, 8], PARAMS)[0].text
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "push", breaking(TextStream.push, at))
        broken, other = llm.stream([9, 10, 11], PARAMS), llm.stream([5, 6, 7, 8], PARAMS)
        texts: list[str] = []

        def read_both() -> None:
            for _ in broken:
                texts.append(next(other))

        with pytest.raises(UnreadableError, match="this text cannot be"):
            read_both()
        assert "".join([*texts, *other]) == expected
    assert llm.generate([5, 6, 7, 8], PARAMS)[0].text == expected


def test_an_error_that_another_run_comes_upon_is_raised_where_it_belongs(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    expected = llm.generate([5, 6, 7, 8], PARAMS)[0].text
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "push", breaking(TextStream.push, 4))
        broken = llm.stream([9, 10, 11], PARAMS)
        next(broken)
        assert llm.generate([5, 6, 7, 8], PARAMS)[0].text == expected  # its calls advance the broken one as well
        with pytest.raises(UnreadableError):
            list(broken)


def test_a_second_thread_gets_one_clear_error_and_the_first_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    expected = llm.generate([5, 6, 7, 8], PARAMS)[0]
    inside, leave, outputs = threading.Event(), threading.Event(), []
    step = Engine.step

    def waiting(self: Engine, accept: Any) -> Any:
        inside.set()
        assert leave.wait(600)
        return step(self, accept)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", waiting)
        first = threading.Thread(target=lambda: outputs.append(llm.generate([5, 6, 7, 8], PARAMS)[0]))
        first.start()
        assert inside.wait(600)
        for enter in (lambda: llm.generate([1], PARAMS), lambda: llm.logits([1, 2])):
            with pytest.raises(RuntimeError, match="at work in another thread: an LLM serves one thread at a time"):
                enter()
        leave.set()
        first.join()
    assert outputs[0].token_ids == expected.token_ids


def in_thread(act: Any) -> Any:
    """What a function returns, or the error that it raises, in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(act())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_second_thread_gets_the_error_between_two_calls_too_and_may_enter_when_nothing_is_open(llm: LLM):
    expected = llm.generate([5, 6, 7, 8], PARAMS)[0]
    stream = llm.stream([5, 6, 7, 8], PARAMS)
    texts = [next(stream)]
    for act in (lambda: llm.generate([1], PARAMS), lambda: llm.logits([1, 2]), lambda: next(llm.stream([1], PARAMS))):
        error = in_thread(act)
        assert isinstance(error, RuntimeError)
        assert "at work in another thread" in str(error)
    texts.append(in_thread(lambda: next(stream)))  # a stream may be read by any thread
    assert "".join([*texts, *stream]) == expected.text
    assert in_thread(lambda: llm.generate([5, 6, 7, 8], PARAMS)[0]).token_ids == expected.token_ids


def test_a_callback_that_enters_the_model_again_gets_the_error_and_no_deadlock(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    step, errors = Engine.step, []

    def entering(self: Engine, accept: Any) -> Any:
        with pytest.raises(RuntimeError, match="at work"):
            llm.generate([1], PARAMS)
        errors.append(None)
        return step(self, accept)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", entering)
        llm.generate([5, 6, 7, 8], PARAMS)
    assert errors


def test_a_request_begins_also_while_another_thread_removes_one_that_has_ended(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    """`Session.end` holds the lock for a moment, in any thread."""
    lock = llm.session._lock

    class Removing:
        """The lock, as one finds it who does not wait."""

        def acquire(self, *, blocking: bool) -> bool:
            return blocking and lock.acquire()

        def release(self) -> None:
            lock.release()

    generation = llm.request([1, 2], SamplingParams(max_tokens=1))
    with monkeypatch.context() as patched:
        patched.setattr(llm.session, "_lock", Removing())
        llm.session.open(generation)
    llm.session.end([generation])


def test_a_stream_that_is_closed_while_another_thread_is_inside_ends_when_that_leaves(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    expected = llm.generate([5, 6, 7, 8], PARAMS)[0].text
    abandoned, other = llm.stream([9, 10, 11], PARAMS), llm.stream([5, 6, 7, 8], PARAMS)
    next(abandoned)
    texts = [next(other)]
    inside, leave, step = threading.Event(), threading.Event(), Engine.step

    def waiting(self: Engine, accept: Any) -> Any:
        inside.set()
        assert leave.wait(600)
        return step(self, accept)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", waiting)
        reader = threading.Thread(target=lambda: texts.extend(other))
        reader.start()
        assert inside.wait(600)
        abandoned.close()
        leave.set()
        reader.join()
    assert "".join(texts) == expected


def test_a_cache_that_cannot_be_made_again_at_once_is_made_by_a_later_call(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    expected = llm.generate([5, 6, 7, 8], PARAMS)[0]
    run = Programs.run

    def lose_the_cache(self: Programs, call: Call) -> Any:
        run(self, call)  # the cache is donated, and what takes its place is lost with the error
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: the device is full")

    def no_memory(self: Engine) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for the cache")

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "run", lose_the_cache)
        with pytest.raises(jax.errors.JaxRuntimeError, match="the device is full"):
            llm.generate([5, 6, 7, 8], PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "new_cache", no_memory)
        for enter in (lambda: llm.generate([1], PARAMS), lambda: llm.logits([1, 2])):
            with pytest.raises(jax.errors.JaxRuntimeError, match="no room for the cache"):
                enter()
            assert llm.session.is_idle
    assert llm.generate([5, 6, 7, 8], PARAMS)[0].token_ids == expected.token_ids

"""What is measured without a server: what the worker asks the model for, and what is made of its answers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cpu.process import WorkerError
from bench.cpu.systems import our_system
from bench.serve.baselines import BASELINES, LONG, Opened, generate, restore, second_question
from bench.serve.in_process import TASKS, InProcess
from bench.serve.systems import System
from bench.serve.workloads import SHAPES, Shape
from lserve_jax.engine.setup import DEFAULT_MODEL

TALK = [[{"role": "user", "content": "one two three"}], [{"role": "user", "content": "four"}]]


class FakeModel:
    """Takes a second for each word, half of which is compilation; answers with its prompts' lengths."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.compile_seconds = clock, 0.0
        self.calls: list[tuple[str, Any]] = []

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [0] * len(messages[-1]["content"].split())

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        self.calls.append(("generate", ([len(one) for one in prompts], params.max_tokens)))
        assert params.ignore_eos
        for prompt in prompts:
            self.clock[0] += len(prompt)
            self.compile_seconds += len(prompt) / 2
        return [SimpleNamespace(token_ids=(len(one),) * params.max_tokens) for one in prompts]

    def save_context(self, prompt: list[int], path: str) -> None:
        self.clock[0] += 0.25
        Path(path).write_bytes(b"x" * len(prompt))

    def load_context(self, path: str) -> None:
        assert Path(path).exists()
        self.clock[0] += 0.125


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    from lserve_jax.config.sampling import SamplingParams

    clock = [0.0]
    monkeypatch.setattr("bench.serve.in_process.time.perf_counter", lambda: clock[0])
    found = InProcess.__new__(InProcess)
    found.model, found.sampling_params, found.facts = FakeModel(clock), SamplingParams, {}
    return found


def test_throughput_is_of_all_prompts_at_once_without_compilation(worker: InProcess):
    found = worker.measure("throughput", TALK[1:], TALK, max_tokens=5)
    assert found == {"seconds": 2.0, "completion_tokens": 10, "tok_per_s": 5.0}
    assert worker.model.calls == [("generate", ([1], 2)), ("generate", ([3, 1], 5))]


def test_questions_are_asked_one_after_the_other(worker: InProcess):
    found = worker.measure("questions", [], TALK)
    assert found == {"prompt_tokens": 3, "first_s": 1.5, "later_s": [0.5]}
    assert worker.model.calls[1:] == [("generate", ([3], 1)), ("generate", ([1], 1))]


def test_a_context_is_saved_after_and_loaded_before_its_prompt(worker: InProcess, tmp_path: Path):
    path = str(tmp_path / "context")
    found = worker.measure("save", [], TALK, path=path)
    assert found == {"prompt_tokens": 3, "prefill_s": 1.5, "save_s": 0.25, "bytes": 3, "tokens": [[3]]}
    assert worker.measure("load", [], TALK, path=path) == {"load_s": 0.125, "after_s": 1.5, "tokens": [[3]]}
    assert TASKS.keys() == {"throughput", "questions", "save", "load"}


class FakeOpened(Opened):
    """Workers that say what they were asked for."""

    def __init__(self, answer: Callable[[str], dict[str, Any]], folder: Path) -> None:
        system = System("lserve", "ours", base=our_system("lserve", DEFAULT_MODEL))
        super().__init__(system, DEFAULT_MODEL, 2, folder, 60.0)
        self.answer = answer
        self.started: list[tuple[int, int]] = []
        self.asked: list[dict[str, Any]] = []

    def worker(self, slots: int, context: int) -> Any:
        self.started.append((slots, context))
        return self

    def __enter__(self) -> "FakeOpened":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, timeout: float, **request: Any) -> dict[str, Any]:
        assert timeout == 60.0
        self.asked.append(request)
        return self.answer(request["task"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Shape:
    shape = Shape(clients=1, turns=3, document=100, prompt=0, answer=1)
    monkeypatch.setattr("bench.serve.baselines.LONG", shape)
    return shape


def test_generate_has_the_prompts_of_the_clients(tmp_path: Path):
    opened = FakeOpened(lambda task: {"tok_per_s": 5.0}, tmp_path)
    shapes = {"short": Shape(clients=3, turns=2, document=0, prompt=20, answer=7)}
    assert generate(opened, 4, shapes, tmp_path) == {"tok_per_s": 5.0}
    (asked,) = opened.asked
    assert opened.started == [(3, shapes["short"].context("short"))]
    assert asked["conversations"] == opened.conversations("short", shapes["short"], 4)
    assert len(asked["conversations"]) == 6
    assert (asked["task"], asked["max_tokens"]) == ("throughput", 7)
    texts = {one[0]["content"] for one in asked["conversations"]}
    assert not texts & {one[0]["content"] for one in asked["warm_up"]}


def test_a_second_question_is_compared_with_the_first(tmp_path: Path, small: Shape):
    opened = FakeOpened(lambda task: {"first_s": 8.0, "later_s": [0.5, 0.25]}, tmp_path)
    assert second_question(opened, 0, {}, tmp_path)["ratio"] == 16.0
    (asked,) = opened.asked
    documents = {one[0]["content"].split("\n\n")[0] for one in asked["conversations"]}
    assert (len(asked["conversations"]), len(documents)) == (3, 1)
    assert opened.started == [(1, small.context("documents"))]


def test_a_restored_context_is_compared_with_a_prefill_and_must_give_its_token(tmp_path: Path, small: Shape):
    del small
    tokens = {"save": [[5]], "load": [[5]]}

    def answer(task: str) -> dict[str, Any]:
        (tmp_path / "context.safetensors").touch()
        return {"tokens": tokens[task], **({"prefill_s": 6.0} if task == "save" else {"load_s": 0.5})}

    opened = FakeOpened(answer, tmp_path)
    assert restore(opened, 0, {}, tmp_path)["ratio"] == 12.0
    assert [one["task"] for one in opened.asked] == ["save", "load"]
    assert len(opened.started) == 2, "another process"
    assert opened.asked[0]["path"] == opened.asked[1]["path"]
    assert not (tmp_path / "context.safetensors").exists()
    tokens["load"] = [[6]]
    with pytest.raises(WorkerError, match=r"the restored context gives \[\[6\]\], the prefilled one \[\[5\]\]"):
        restore(opened, 0, {}, tmp_path)


def test_the_long_document_fills_the_embedded_model():
    assert LONG.context("documents") == 8192
    assert SHAPES["short"].clients == 16
    assert BASELINES.keys() == {"generate", "second_question", "restore"}

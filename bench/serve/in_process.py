"""`LLM` without a server, for comparison: a worker process, driven by JSON lines (see `bench.cpu.workers.protocol`).

Seconds are wall-clock times without compilation: each task first asks what needs the same programs. Conversations are
made prompts before the clock starts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cpu.workers import protocol

type Conversation = list[dict[str, str]]


class InProcess:
    """An `LLM` that answers conversations."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from lserve_jax.cli.common import collect_garbage_rarely, use_compilation_cache
        from lserve_jax.config.sampling import SamplingParams
        from lserve_jax.llm import LLM

        collect_garbage_rarely()
        use_compilation_cache()
        self.sampling_params = SamplingParams
        self.model: Any = LLM(**settings["prepare"])
        self.facts: dict[str, Any] = {}

    def measure(
        self, task: str, warm_up: Sequence[Conversation], conversations: Sequence[Conversation], **options: Any
    ) -> dict[str, Any]:
        """Returns the numbers of a task of `TASKS`."""
        self.answer(self.prompts(warm_up), 2)
        return TASKS[task](self, self.prompts(conversations), **options)

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Returns conversations as token ids."""
        return [self.model.render_chat(messages) for messages in conversations]

    def answer(self, prompts: Sequence[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Returns the seconds in which all prompts were answered, and the answers."""
        params = self.sampling_params(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        return self.timed(lambda: [list(one.token_ids) for one in self.model.generate(list(prompts), params)])

    def timed[T](self, call: Callable[[], T]) -> tuple[float, T]:
        """Returns the seconds that a call took, less those of compilation, and its result."""
        compiled, begin = self.model.compile_seconds, time.perf_counter()
        found = call()
        return time.perf_counter() - begin - (self.model.compile_seconds - compiled), found


def throughput(llm: InProcess, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Returns the tokens per second of answers to all prompts, given at once."""
    seconds, answers = llm.answer(prompts, max_tokens)
    count = sum(map(len, answers))
    return {"seconds": seconds, "completion_tokens": count, "tok_per_s": count / seconds}


def questions(llm: InProcess, prompts: list[list[int]]) -> dict[str, Any]:
    """Returns the seconds to the first token of successive questions about one document."""
    seconds = [llm.answer([prompt], 1)[0] for prompt in prompts]
    return {"prompt_tokens": len(prompts[0]), "first_s": seconds[0], "later_s": seconds[1:]}


def save(llm: InProcess, prompts: list[list[int]], path: str) -> dict[str, Any]:
    """Returns the seconds to a prompt's first token, to save its context, and the bytes of the file."""
    prefill_s, answers = llm.answer(prompts[:1], 1)
    save_s, _ = llm.timed(lambda: llm.model.save_context(prompts[0], path))
    size = Path(path).stat().st_size
    return {
        "prompt_tokens": len(prompts[0]),
        "prefill_s": prefill_s,
        "save_s": save_s,
        "bytes": size,
        "tokens": answers,
    }


def load(llm: InProcess, prompts: list[list[int]], path: str) -> dict[str, Any]:
    """Returns the seconds to restore a saved context, and from then to the first token of its prompt."""
    load_s, _ = llm.timed(lambda: llm.model.load_context(path))
    after_s, answers = llm.answer(prompts[:1], 1)
    return {"load_s": load_s, "after_s": after_s, "tokens": answers}


TASKS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "throughput": throughput,
    "questions": questions,
    "save": save,
    "load": load,
}


if __name__ == "__main__":
    protocol.serve(InProcess)

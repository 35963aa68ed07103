"""What `LLM` does without a server, on the same prompts: throughput, questions about one document, saved contexts."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.cpu.process import Worker, WorkerError
from bench.serve.systems import System
from bench.serve.workloads import Shape, Stage, stages, tokenizer_of

LONG = Shape(clients=1, turns=3, document=8000, prompt=0, answer=1)
"""A document that fills the embedded model's context of 8,192 tokens."""
WARM_UP_SEED = -1
"""Seed of prompts that no measurement has."""

type Conversation = list[dict[str, str]]


class Opened:
    """How a baseline's workers are started and asked."""

    def __init__(self, system: System, model: str, threads: int, compiled: Path, timeout: float) -> None:
        assert system.base is not None
        self.system, self.model, self.timeout = system, model, timeout
        self._settings = dict(system.base.settings)
        self._environment = system.base.environment(threads, compiled)

    def worker(self, slots: int, context: int) -> Worker:
        """Returns a worker that begins to load."""
        prepare = {**self._settings, "max_num_seqs": slots, "max_model_len": context}
        return Worker((sys.executable, "-m", "bench.serve.in_process"), {"prepare": prepare}, self._environment)

    def conversations(self, name: str, shape: Shape, seed: int) -> list[Conversation]:
        """Returns the requests of a workload whose requests need no earlier answers, client by client."""
        return conversations(stages(name, shape, seed, tokenizer_of(self.model)))

    def ask(self, worker: Worker, task: str, name: str, shape: Shape, seed: int, **options: Any) -> dict[str, Any]:
        """Returns a worker's answer to a task on a workload, after a warm-up of other prompts."""
        asked = self.conversations(name, shape, seed)
        warm_up = self.conversations(name, shape, WARM_UP_SEED)[: shape.clients + 1]
        return worker.measure(self.timeout, task=task, warm_up=warm_up, conversations=asked, **options)


def generate(opened: Opened, seed: int, shapes: Mapping[str, Shape], folder: Path) -> dict[str, Any]:
    """Returns the throughput of `LLM.generate` on all prompts of the workload "short" at once."""
    del folder
    shape = shapes["short"]
    with opened.worker(shape.clients, shape.context("short")) as worker:
        return opened.ask(worker, "throughput", "short", shape, seed, max_tokens=shape.answer)


def second_question(opened: Opened, seed: int, shapes: Mapping[str, Shape], folder: Path) -> dict[str, Any]:
    """Returns the times to the first token of three questions about one document of 8,000 tokens."""
    del shapes, folder
    with opened.worker(1, LONG.context("documents")) as worker:
        found = opened.ask(worker, "questions", "documents", LONG, seed)
    return {**found, "ratio": found["first_s"] / found["later_s"][0]}


def restore(opened: Opened, seed: int, shapes: Mapping[str, Shape], folder: Path) -> dict[str, Any]:
    """Returns the times to prefill a document of 8,000 tokens, and to restore it in another process.

    Raises:
      WorkerError: also if the restored context gives another token.
    """
    del shapes
    path = folder / "context.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    context = LONG.context("documents")
    try:
        with opened.worker(1, context) as worker:
            saved = opened.ask(worker, "save", "documents", LONG, seed, path=str(path))
        with opened.worker(1, context) as worker:
            loaded = opened.ask(worker, "load", "documents", LONG, seed, path=str(path))
    finally:
        path.unlink(missing_ok=True)
    if saved["tokens"] != loaded["tokens"]:
        raise WorkerError(f"the restored context gives {loaded['tokens']}, the prefilled one {saved['tokens']}")
    return {**saved, **loaded, "ratio": saved["prefill_s"] / loaded["load_s"]}


def conversations(found: tuple[Stage, ...]) -> list[Conversation]:
    """Returns the requests of scripts that are no conversations, client by client."""
    return [
        [{"role": "user", "content": turn.text}] for stage in found for script in stage.scripts for turn in script.turns
    ]


type Baseline = Callable[[Opened, int, Mapping[str, Shape], Path], dict[str, Any]]
BASELINES: Mapping[str, Baseline] = {"generate": generate, "second_question": second_question, "restore": restore}

"""The measurements of a run on a CPU: their order, which are missing, and the processes that make them."""

import argparse
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.cpu.process import Worker, WorkerError
from bench.cpu.systems import System
from bench.log import Key, Log, is_outcome
from bench.provenance import provenance, sources
from lserve_jax.weights.load import open_checkpoint

ROUNDS = {"single": 5, "batch": 3, "start": 3, "programs": 1, "memory": 1, "long": 1}
"""Parts in the order in which they run, with the measurements of each system and length."""
START_LENGTH, START_STEPS = 32, 8
FILLING_LENGTH = 100
"""Tokens of a prompt that needs the same programs as any longer prompt."""
WARM_UP_STEPS, MEMORY_STEPS = 8, 8
FIRST_REQUESTS = ((16, {}), (100, {}), (600, {}))
OTHER_REQUESTS = (
    (40, {"temperature": 0.8, "top_p": 0.9, "seed": 1}),
    (257, {"temperature": 1.0, "top_k": 20, "seed": 2}),
    (1100, {}),
)
"""Prompt lengths and sampling settings that must need no new program after the ones before."""
FIRST_ID = 100
"""Token ids below this one may be special."""


class Task(NamedTuple):
    """One measurement; with ``cache`` "cold", a new process finds no compiled programs, with "warm" it finds all."""

    part: str
    system: System
    length: int
    batch: int
    steps: int
    round: int
    cache: str = "warm"

    def labels(self) -> dict[str, Any]:
        """Returns the key of the result."""
        return {**self._asdict(), "system": self.system.name, "library": self.system.kind}

    def __str__(self) -> str:
        return f"{self.part:<8} {self.system.name:<21} {self.length:>6} x{self.batch} {self.cache:<4} #{self.round + 1}"


class Run:
    """The measurements of a run, its log, and the end of its time."""

    def __init__(self, args: argparse.Namespace, systems: Sequence[System]) -> None:
        self.args, self.systems = args, systems
        self.log = Log(args.out / "results.jsonl")
        self.deadline = time.monotonic() + args.minutes * 60
        kept = [line for line in self.log.lines() if is_outcome(line) and not (args.retry and line["kind"] == "error")]
        self._done = {tuple(line["key"]) for line in kept}

    def part(self, name: str) -> bool:
        """Makes the missing measurements of a part; returns False if time ran out."""
        workers: dict[str, Worker] = {}
        try:
            for task in self.tasks(name):
                if tuple(self.key(task)) in self._done:
                    continue
                if self.left() <= 0:
                    return False
                try:
                    line = self._measured(task, workers)
                except WorkerError as error:
                    if (worker := workers.pop(task.system.name, None)) is not None:
                        worker.close()
                    if self.left() <= 0:
                        return False
                    line = {"kind": "error", "reason": str(error)}
                self.write(task, line)
        finally:
            for worker in workers.values():
                worker.close()
        return True

    def tasks(self, part: str) -> Iterator[Task]:
        """Yields a part's measurements in order; the first system changes from round to round."""
        args, ours = self.args, [system for system in self.systems if system.is_ours]
        systems, batch, steps = self.systems, 1, args.steps
        lengths, caches = args.lengths, ("warm",)
        match part:
            case "batch":
                lengths, batch = args.batch_lengths, args.batch
            case "start":
                lengths, steps, caches = [START_LENGTH], START_STEPS, ("cold", "warm")
            case "programs":
                lengths, steps, systems, batch = [OTHER_REQUESTS[-1][0]], MEMORY_STEPS, ours, 2
            case "memory":
                lengths, steps = [max(args.lengths)], MEMORY_STEPS
            case "long":
                lengths, systems = args.long_lengths, [system for system in ours if system.name in args.long]
        for number in range(args.rounds or ROUNDS[part]):
            first = number % max(len(systems), 1)
            for length in lengths:
                for system in [*systems[first:], *systems[:first]]:
                    for state in caches if system.is_ours else caches[-1:]:
                        yield Task(part, system, length, batch, steps, number, state)

    def key(self, task: Task) -> Key:
        """Returns the key of a measurement."""
        labels, args = task.labels(), self.args
        return [*(f"{name}={value}" for name, value in labels.items()), args.model, f"{args.threads} threads"]

    def left(self) -> float:
        """Returns the remaining seconds."""
        return self.deadline - time.monotonic()

    def write(self, task: Task, line: dict[str, Any]) -> None:
        """Writes a result or an error under its task, and prints it."""
        facts = {"model": self.args.model, "threads": self.args.threads, "load": round(os.getloadavg()[0], 2)}
        self.log.end(self.key(task), {**task.labels(), **line, **facts, **provenance()})
        shown = ("prefill_tok_per_s", "ms_per_token", "first_token_s", "answer_s", "peak_bytes", "reason")
        print(task, {name: line[name] for name in shown if line.get(name) is not None}, flush=True)

    def _measured(self, task: Task, workers: dict[str, Worker]) -> dict[str, Any]:
        if task.part in ("single", "batch"):
            return self._in_kept_process(task, workers)
        return self._programs(task) if task.part == "programs" else self._in_fresh_process(task)

    def _in_kept_process(self, task: Task, workers: dict[str, Worker]) -> dict[str, Any]:
        lengths = self.args.lengths if task.part == "single" else self.args.batch_lengths
        if task.system.name not in workers:
            worker = workers[task.system.name] = self._start(task, max(lengths) + task.steps + 1)
            self._ask(worker, task, length=min(lengths), steps=min(WARM_UP_STEPS, task.steps))
        worker = workers[task.system.name]
        return {**result(task, self._ask(worker, task)), "facts": worker.ready(0)["facts"]}

    def _in_fresh_process(self, task: Task) -> dict[str, Any]:
        """Returns the times and memory of a separate process, its start included."""
        room = task.length + task.steps + 1
        name = re.sub(r"\W", "_", f"{task.part} {task.system.name} {task.length}")
        compiled = self.args.work / "compiled" / sources() / name
        if task.cache == "cold":
            shutil.rmtree(compiled, ignore_errors=True)
        elif task.system.is_ours and not compiled.exists():
            with self._start(task, room, compiled) as worker:
                self._ask(worker, task, length=min(task.length, FILLING_LENGTH))
        with self._start(task, room, compiled, task.length) as worker:
            if task.part == "long":  # a program's first call takes tenths of a second more, which is the start's matter
                self._ask(worker, task, length=min(task.length, FILLING_LENGTH), steps=WARM_UP_STEPS)
            answer = self._ask(worker, task)
            seconds, ready = time.perf_counter() - worker.begin, worker.ready(0)
        loaded = {"loaded_bytes": ready["rss_bytes"], "load_peak_bytes": ready["peak_bytes"]}
        after_first = answer["decode_s"] + answer.get("decode_compile_s", 0.0)
        whole = {"first_token_s": round(seconds - after_first, 4), "answer_s": round(seconds, 4)}
        return {**result(task, answer), **(whole if task.part == "start" else {}), **loaded, "facts": ready["facts"]}

    def _programs(self, task: Task) -> dict[str, Any]:
        """Returns the programs that some prompts need, and the number of further compilations for other prompts."""
        with self._start(task, task.length + task.steps + 1) as worker:
            for length, sampling in FIRST_REQUESTS:
                first = self._ask(worker, task, length=length, sampling=sampling)
            for length, sampling in OTHER_REQUESTS:
                last = self._ask(worker, task, length=length, sampling=sampling)
        grown = last["num_compilations"] - first["num_compilations"]
        kept = ("programs", "num_compilations", "compile_s")
        return {"kind": "sample", **{name: last[name] for name in kept}, "grown": grown}

    def _start(
        self, task: Task, max_length: int, compiled: Path | None = None, expected_tokens: int | None = None
    ) -> Worker:
        """Returns a new worker of a task, with room for the model's context, or just enough in the part "long"."""
        room = max_length if task.part == "long" else max(max_length, model_shapes(self.args.model)[1])
        folder = compiled or self.args.work / "compiled" / "kept"
        return task.system.start(
            max_length=room,
            batch=task.batch,
            threads=self.args.threads,
            compiled=folder,
            expected_tokens=expected_tokens,
        )

    def _ask(self, worker: Worker, task: Task, **changes: Any) -> dict[str, Any]:
        request = {"length": task.length, "batch": task.batch, "steps": task.steps, **changes}
        ids = token_ids(request.pop("length"), model_shapes(self.args.model)[0])
        return worker.measure(min(self.args.timeout, max(self.left(), 0)), prompt=ids, **request)


def result(task: Task, answer: dict[str, Any]) -> dict[str, Any]:
    """Returns a worker's answer with its rates."""
    rates: dict[str, Any] = {"prefill_tok_per_s": round(answer["prefilled"] / answer["prefill_s"], 2)}
    if task.steps:
        rates["ms_per_token"] = round(answer["decode_s"] / task.steps * 1e3, 4)
    return {"kind": "sample", **rates, **answer}


def token_ids(length: int, vocabulary: int) -> list[int]:
    """Returns the prompt of a length: random, and the same for every system."""
    return np.random.default_rng(length).integers(min(FIRST_ID, vocabulary // 2), vocabulary, length).tolist()


@cache
def model_shapes(model: str) -> tuple[int, int]:
    """Returns a model's vocabulary and its longest context, in tokens."""
    config = open_checkpoint(model).config
    return config.vocab_size, config.max_context

"""The measurements of a run: which are missing, the servers that they need, and what is written."""

import argparse
import asyncio
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.cpu.process import WorkerError
from bench.log import Key, Log, is_outcome
from bench.provenance import provenance
from bench.serve.baselines import BASELINES, WARM_UP_SEED, Opened
from bench.serve.client import Client
from bench.serve.load import Request, run
from bench.serve.server import Server, ServerError, free_port
from bench.serve.summary import Limits, arrival, request_line, summary
from bench.serve.systems import Sizes, System
from bench.serve.workloads import SHAPES, Shape, Stage, as_arrivals, prose_of, stages, tokenizer_of

WARM_UP_TOKENS = 8
RESULTS, REQUESTS = "results.jsonl", "requests.jsonl"


class Task(NamedTuple):
    """One measurement: a workload on a server, or a baseline of ours."""

    name: str
    system: System
    round: int

    @property
    def is_baseline(self) -> bool:
        """Whether the task needs no server."""
        return self.name in BASELINES

    def __str__(self) -> str:
        return f"{self.name:<16} {self.system.name:<27} #{self.round + 1}"


class Run:
    """The measurements of a run, its log, and the end of its time."""

    def __init__(self, args: argparse.Namespace, systems: Sequence[System]) -> None:
        self.args, self.systems = args, systems
        self.log, self.requests = Log(args.out / RESULTS), Log(args.out / REQUESTS)
        self.limits = Limits(args.ttft_limit, args.gap_limit)
        self.deadline = time.monotonic() + args.minutes * 60
        kept = [line for line in self.log.lines() if is_outcome(line) and not (args.retry and line["kind"] == "error")]
        self._done = {tuple(line["key"]) for line in kept}
        self.shapes = {name: changed(shape, args) for name, shape in SHAPES.items()}

    def all(self) -> bool:
        """Makes the missing measurements; returns False if time ran out."""
        for task in self.tasks():
            if tuple(self.key(task)) in self._done:
                continue
            if self.left() <= 0:
                return False
            try:
                line = self._baseline(task) if task.is_baseline else self._load(task)
            except (ServerError, WorkerError) as error:
                line = {"kind": "error", "reason": str(error)}
            self.write(task, line)
        return True

    def tasks(self) -> Iterator[Task]:
        """Yields the measurements in order; the first system changes from round to round."""
        for number in range(self.args.rounds):
            first = number % max(len(self.systems), 1)
            systems = [*self.systems[first:], *self.systems[:first]]
            for name in [*self.args.workloads, *self.args.baselines]:
                yield from (Task(name, one, number) for one in systems if one.is_ours or name not in BASELINES)

    def key(self, task: Task) -> Key:
        """Returns the key of a measurement."""
        args = self.args
        common = [task.name, task.system.name, f"round {task.round}", args.model, f"{args.threads} threads"]
        if task.is_baseline:
            return [*common, str(self.shapes["short"]) if task.name == "generate" else ""]
        return [*common, str(self.shapes[task.name]), f"rate {args.rate}", str(self.limits)]

    def left(self) -> float:
        """Returns the remaining seconds."""
        return self.deadline - time.monotonic()

    def write(self, task: Task, line: Mapping[str, Any]) -> None:
        """Writes a result or an error under its task, and prints it."""
        args = self.args
        labels = {"name": task.name, "system": task.system.name, "library": task.system.kind, "round": task.round}
        facts = {"model": args.model, "threads": args.threads, "load": round(os.getloadavg()[0], 2)}
        self.log.end(self.key(task), {**line, **labels, **facts, "facts": task.system.facts, **provenance()})
        shown = ("tok_per_s", "ttft_p50_s", "gap_p99_s", "longest_gap_s", "errors", "ratio", "reason")
        print(task, {name: line[name] for name in shown if line.get(name) is not None}, flush=True)

    def _baseline(self, task: Task) -> dict[str, Any]:
        opened = Opened(task.system, self.args.model, self.args.threads, self.args.work / "compiled", self.args.timeout)
        return {"kind": "baseline", **BASELINES[task.name](opened, task.round, self.shapes, self.args.work)}

    def _load(self, task: Task) -> dict[str, Any]:
        """Returns the numbers of a workload on a server that is started for it, unless it runs already."""
        asked = stages(task.name, self.shapes[task.name], task.round, tokenizer_of(self.args.model))
        if task.system.kind == "given":
            return asyncio.run(self._driven(task, task.system.url, asked))
        shape, port = self.shapes[task.name], free_port()
        sizes = Sizes(shape.clients, shape.context(task.name), shape.chunk)
        command, log = task.system.command(sizes, port), self.args.work / "logs" / f"{task.name} {task.system.name}.txt"
        with Server(command, task.system.environment, f"http://127.0.0.1:{port}", log) as server:
            start_s = server.wait(min(self.args.timeout, max(self.left(), 0.0)))
            line = asyncio.run(self._driven(task, server.url, asked))
            return {**line, "command": _shown(command), "start_s": round(start_s, 2), "peak_bytes": server.peak_bytes}

    async def _driven(self, task: Task, url: str, asked: tuple[Stage, ...]) -> dict[str, Any]:
        """Returns the numbers of a workload on a server, whose requests are written as they end."""
        args, shape, number = self.args, self.shapes[task.name], secrets.token_hex(6)
        lines: list[dict[str, Any]] = []
        written: list[Future[None]] = []
        rate = 0.0 if task.name == "long_arrival" else args.rate

        # A thread writes: waiting for the disk here would look like a pause of the server.
        with ThreadPoolExecutor(1) as writer:
            async with Client(url, task.system.body, args.timeout) as client:
                await _warm_up(client, args.model)
                begin = time.perf_counter()

                def note(request: Request) -> None:
                    lines.append(request_line(request, begin))
                    labels = {"run": number, "system": task.system.name, "name": task.name}
                    written.append(writer.submit(self.requests.write, {**labels, **lines[-1]}))

                await run(client, as_arrivals(asked) if rate else asked, note, rate=rate, seed=task.round)
        for one in written:
            one.result()
        extra = arrival(lines, shape.chunk) if task.name == "long_arrival" else {}
        found = {"run": number, "shape": asdict(shape), "rate": rate, "limits": self.limits._asdict()}
        if all(line["error"] is not None for line in lines):
            return {"kind": "error", "reason": f"no request was answered: {lines[0]['error']}", **found}
        return {"kind": "run", **summary(lines, self.limits), **extra, **found}


async def _warm_up(client: Client, model: str) -> None:
    """Asks for two short answers, whose times do not count; what fails here fails again later."""
    for number in range(2):
        text = prose_of(32, f"warm-up {WARM_UP_SEED} {number}", tokenizer_of(model))
        await client.ask([{"role": "user", "content": text}], WARM_UP_TOKENS)


def changed(shape: Shape, args: argparse.Namespace) -> Shape:
    """Returns a shape with the sizes that the command line names, as far as the workload has them to choose."""
    fixed = {"clients", "turns", "document"} if shape.chunk else set() if shape.document else {"document"}
    names = [name for name in ("clients", "turns", "document", "answer") if name not in fixed]
    return replace(shape, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def _shown(command: Sequence[str]) -> list[str]:
    """Returns a command without the folders of this machine."""
    return [Path(part).name if "/" in part else part for part in command]

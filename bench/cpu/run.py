"""Ours beside `transformers` and llama.cpp on the CPU: `python -m bench.cpu --out bench/results/cpu`.

The same model and the same token ids, every system in a process of its own, one computing at a time. Rounds are
interleaved: in each, every system is measured once at a length before the next length comes. Parts:

  single    prefill and decode of one sequence, processes kept
  batch     the same of several sequences
  start     from the start of a process to its first token, and to its first answer; ours with an empty and a filled
            compilation cache
  programs  compiled programs of a process, and whether prompts of other lengths and settings add any
  memory    peak memory of a fresh process
  long      prefill, decode and memory of fresh processes up to 128K tokens, beside what the plan says

One JSON line a measurement goes to OUT/results.jsonl at once. What stands there for these sources and settings is not
measured again, so a run that --minutes ended goes on where it stopped. At the end: OUT/targets.txt, medians.jsonl and
pictures (also by `python -m bench.cpu.report OUT` and `python -m bench.cpu.plots OUT`).
"""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.cpu import report
from bench.cpu.process import Worker, WorkerError
from bench.cpu.systems import DEFAULT_OURS, OURS, PEERS, System, our_system, peer_systems
from bench.measure import ROOT, Key, Log, is_outcome, provenance, sources
from lserve_jax.engine.setup import DEFAULT_MODEL
from lserve_jax.weights.load import open_checkpoint

ROUNDS = {"single": 5, "batch": 3, "start": 3, "programs": 1, "memory": 1, "long": 1}
"""Parts in the order in which they run, with the measurements of each system and length."""
START_LENGTH, START_STEPS = 32, 8
FILLING_LENGTH = 100
"""Prompt tokens that need the programs of any longer prompt."""
WARM_UP_STEPS, MEMORY_STEPS = 8, 8
FIRST_REQUESTS = ((16, {}), (100, {}), (600, {}))
OTHER_REQUESTS = (
    (40, {"temperature": 0.8, "top_p": 0.9, "seed": 1}),
    (257, {"temperature": 1.0, "top_k": 20, "seed": 2}),
    (1100, {}),
)
"""Prompt lengths and sampling settings: these must need no program that those before did not need."""
FIRST_ID = 100
"""Token ids below may be special."""


class Task(NamedTuple):
    """One measurement; ``cache`` says what a fresh process finds compiled: "cold" nothing, "warm" everything."""

    part: str
    system: System
    length: int
    batch: int
    steps: int
    round: int
    cache: str = "warm"

    def labels(self) -> dict[str, Any]:
        """Returns what a result is filed under."""
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
        """Measures what is missing of a part; False if time ran out."""
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
        """Yields a part's measurements in the order in which they are made; who begins changes from round to round."""
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
        """Returns what a measurement is known by."""
        labels, args = task.labels(), self.args
        return [*(f"{name}={value}" for name, value in labels.items()), args.model, f"{args.threads} threads"]

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.deadline - time.monotonic()

    def write(self, task: Task, line: dict[str, Any]) -> None:
        """Writes a result or an error under its task, and says it."""
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
        """Returns the times and memory of a process of its own, its start included."""
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
        """Returns the programs that some prompts need, and how many more compilations others cause."""
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
        """Returns a new worker of a task, with room for the model's own context; just enough in the part long."""
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


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the machine that a run had."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = (
        [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line] if cpuinfo.exists() else []
    )
    info = {name.strip(): value.strip() for name, value in fields}
    return {
        "kind": "environment",
        "cpu": info.get("model name", platform.processor()),
        "instructions": [flag for flag in info.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))],
        "cores": os.cpu_count(),
        "threads": args.threads,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **provenance(),
    }


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    def lengths(text: str) -> list[int]:
        units = {"k": 1024, "m": 1024**2}
        return [int(one.rstrip("km")) * units.get(one[-1], 1) for one in names(text.lower())]

    def settings(text: str) -> list[str]:
        return re.split(r"\s*,\s*(?=[a-zA-Z])", text.strip())

    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", type=names, default=list(ROUNDS), help=",".join(ROUNDS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="what our systems open; peers need a GGUF file or folder"
    )
    parser.add_argument(
        "--ours",
        type=settings,
        default=list(DEFAULT_OURS),
        help=f"of {', '.join(OURS)}; or settings such as lserve:page_size=32+sink=64",
    )
    parser.add_argument(
        "--peers", type=names, default=["transformers", "llama.cpp"], help=f"of {', '.join(PEERS)}; beginnings will do"
    )
    parser.add_argument("--transformers-python", help="interpreter of an environment with torch and transformers")
    parser.add_argument("--llama-cpp-python", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--lengths", type=lengths, default="128,512,1k,2k,4k,8k", help="prompt tokens, one sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of the part batch")
    parser.add_argument("--batch-lengths", type=lengths, default="128,2k,8k")
    parser.add_argument("--long", type=names, default=["dense", "lserve"], help="which of ours the part long takes")
    parser.add_argument("--long-lengths", type=lengths, default="8k,32k,128k")
    parser.add_argument("--steps", type=int, default=32, help="decode steps after each prefill")
    parser.add_argument("--rounds", type=int, help=f"default: {', '.join(f'{k} {v}' for k, v in ROUNDS.items())}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each system")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds that one measurement may take")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache" / "bench_cpu", help="weights and compiled programs"
    )
    args = parser.parse_args(arguments)
    if unknown := [part for part in args.parts if part not in ROUNDS]:
        parser.error(f"--parts {','.join(unknown)}: choose from {','.join(ROUNDS)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is asked for; 2 after one line if that cannot be."""
    args = parse(arguments)
    jax.config.update("jax_platforms", "cpu")
    pythons = {"transformers": args.transformers_python, "llama.cpp": args.llama_cpp_python}
    try:
        ours = [our_system(name, args.model) for name in args.ours]
        peers, missing = peer_systems(args.peers, args.model, pythons, args.work, args.threads)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.fresh:
        (args.out / "results.jsonl").unlink(missing_ok=True)
    run = Run(args, [*ours, *peers])
    run.log.write(environment(args))
    for name, reason in missing.items():
        run.log.write({"kind": "missing", "system": name, "reason": reason, **provenance()})
        print(f"missing: {name}: {reason}", flush=True)
    try:
        is_whole = all(run.part(part) for part in ROUNDS if part in args.parts)
    except KeyboardInterrupt:
        is_whole = False
    print("all that was asked for is there" if is_whole else "not all is there: the same command goes on from here")
    report.main([str(args.out)])
    if importlib.util.find_spec("matplotlib") is not None:
        from bench.cpu import plots

        plots.main([str(args.out)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the parts one after the other within the time, and writes the table at the end."""

import shlex
import time

from bench.gpu.parts import PARTS, TARGETS, TEXT, Run
from bench.gpu.supervise import supervise
from bench.gpu.targets import table
from bench.log import Log, read_lines


def run_parts(run: Run, names: list[str], minutes: float) -> None:
    """Runs parts within the time and writes the table, also after an interruption."""
    run.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + minutes * 60
    try:
        with (run.out / TEXT).open("ab") as text:
            for index, name in enumerate(names):
                left = deadline - time.monotonic()
                share = PARTS[name].minutes / sum(PARTS[other].minutes for other in names[index:])
                seconds = max(left * share, 0.0)
                command = PARTS[name].command(run, seconds / 60)
                begin = time.monotonic()
                if isinstance(command, str):
                    ended = f"not run: {command}"
                else:
                    limit = PARTS[name].task_seconds
                    limit = None if limit is None else min(limit, max(seconds / 2, 1.0))
                    ended = supervise(name, command, run, seconds=seconds, task_seconds=limit, text=text)
                took = time.monotonic() - begin
                Log(run.results).write({"kind": "part", "part": name, "ended": ended, "seconds": round(took, 1)})
                print(f"{name:<12} {took:6.1f} s of {seconds:6.1f}  {ended}", flush=True)
    finally:
        text_of_table = table(read_lines(run.results))
        (run.out / TARGETS).write_text(text_of_table + "\n", encoding="utf-8")
        print(text_of_table, flush=True)


def describe(run: Run, names: list[str], minutes: float) -> None:
    """Prints what would run, and for how long: for each part its command, which runs that part alone, and its tasks."""
    whole = sum(PARTS[name].minutes for name in names)
    for name in names:
        tasks, box = PARTS[name].tasks(run), minutes * PARTS[name].minutes / whole
        print(
            f"{name}: a box of {box:.1f} minutes; about {sum(seconds for _, seconds in tasks) / 60:.1f} for everything"
        )
        command = PARTS[name].command(run, box)
        print(f"    not run: {command}" if isinstance(command, str) else f"    $ {shlex.join(['python', *command])}")
        for task, seconds in tasks:
            print(f"    {task}  {seconds / 60:.2f}")

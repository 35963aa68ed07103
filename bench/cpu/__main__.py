"""Ours compared with `transformers` and llama.cpp on the CPU: `python -m bench.cpu --out bench/results/cpu`.

All use the same model and the same token ids. Every system runs in a separate process, and one computes at a time.
Rounds are interleaved: each round measures every system once at a length before the next length. Parts:

  single    prefill and decode of one sequence, in processes that are kept
  batch     the same with several sequences
  start     from the start of a process to its first token, and to its first answer; ours with an empty and a filled
            compilation cache
  programs  compiled programs of a process, and whether prompts of other lengths and settings add any
  memory    peak memory of a fresh process
  long      prefill, decode and memory of fresh processes up to 128K tokens, compared with the plan

Each measurement is written at once as one JSON line of OUT/results.jsonl. One that is already there for these sources
and settings is not repeated, so a run that --minutes ended continues where it stopped. At the end: OUT/targets.txt,
medians.jsonl and pictures (also by `python -m bench.cpu.report OUT` and `python -m bench.cpu.plots OUT`).
"""

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from bench.command_line import command_parser
from bench.cpu import report
from bench.cpu.machine import environment
from bench.cpu.run import ROUNDS, Run
from bench.cpu.systems import DEFAULT_OURS, OURS, PEERS, our_system, peer_systems
from bench.provenance import ROOT, provenance
from bench.text import length_of
from lserve_jax.engine.setup import DEFAULT_MODEL


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the settings of a run."""
    parser = command_parser("bench.cpu", __doc__)

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    def lengths(text: str) -> list[int]:
        return [length_of(one) for one in names(text)]

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
    """Makes the selected measurements; returns 2, after one line, if that is impossible."""
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

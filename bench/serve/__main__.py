"""Servers under load: `python -m bench.serve --out bench/results/serve`.

Ours and others' servers (llama.cpp's llama-server, `transformers serve`) answer the same requests over HTTP, one server
at a time, started for each workload with a slot per client. Workloads:

  short            16 clients with short prompts, one after the other
  documents        4 clients with different documents of 4K tokens, several questions about each
  shared_document  4 clients with several questions about the same document
  chat             4 conversations that begin with the same system message
  long_arrival     a stream runs while a prompt of 20 chunks arrives; before, each of the two alone

and of ours, without a server (--baselines):

  generate         `LLM.generate` on the prompts of `short`
  second_question  time to the first token of a second question about a document of 8,000 tokens
  restore          a saved context of 8,000 tokens, restored in another process

Each request is written at once to OUT/requests.jsonl, each measurement to OUT/results.jsonl. One that is already there
for these sources and settings is not repeated, so a run that --minutes ended continues where it stopped. At the end:
OUT/targets.txt and pictures (also by `python -m bench.serve.report OUT` and `python -m bench.serve.plots OUT`).

--url takes a server that runs already, whatever it is.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from bench.command_line import command_parser
from bench.cpu.machine import environment
from bench.provenance import ROOT, provenance
from bench.serve import report
from bench.serve.baselines import BASELINES
from bench.serve.run import Run
from bench.serve.systems import DEFAULT_OURS, DEFAULT_PEERS, OURS, PEERS, SERVED, given_system, our_system, peer_systems
from bench.serve.workloads import WORKLOADS
from lserve_jax.engine.setup import DEFAULT_MODEL


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the settings of a run."""
    parser = command_parser("bench.serve", __doc__)

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--workloads", type=names, default=list(WORKLOADS), help=",".join(WORKLOADS))
    parser.add_argument("--baselines", type=names, default=list(BASELINES), help=",".join(BASELINES))
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each, interleaved (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="what ours opens; peers need a GGUF file or folder")
    parser.add_argument("--ours", nargs="*", default=list(DEFAULT_OURS), help=f"of {', '.join(OURS)}; or settings")
    parser.add_argument("--peers", type=names, default=list(DEFAULT_PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--llama-server", help="llama.cpp's program of that name")
    parser.add_argument("--transformers-python", help="interpreter of an environment with torch and transformers")
    parser.add_argument("--url", help="a server that runs already, instead of ours and the peers")
    parser.add_argument("--served-model", default=SERVED, help="what requests to --url call the model (%(default)s)")
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON: further fields of requests to --url")
    parser.add_argument("--rate", type=float, default=0.0, help="arrivals per second (Poisson) instead of closed loops")
    parser.add_argument("--clients", type=int, help="clients, which are also a server's slots")
    parser.add_argument("--turns", type=int, help="requests of each client")
    parser.add_argument("--document", type=int, help="tokens of a document, or of the system message of a chat")
    parser.add_argument("--answer", type=int, help="tokens of an answer")
    parser.add_argument("--ttft-limit", type=float, default=10.0, help="seconds to a good request's first text")
    parser.add_argument("--gap-limit", type=float, default=1.0, help="p99 of a good request's gaps, in seconds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each server")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a request, and of a server's start")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache" / "bench_serve", help="weights, compiled programs, servers' logs"
    )
    args = parser.parse_args(arguments)
    for option, known in (("workloads", WORKLOADS), ("baselines", BASELINES)):
        if unknown := [name for name in getattr(args, option) if name not in known]:
            parser.error(f"--{option} {','.join(unknown)}: choose from {','.join(known)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the selected measurements; returns 2, after one line, if that is impossible."""
    args = parse(arguments)
    jax.config.update("jax_platforms", "cpu")
    missing: dict[str, str] = {}
    try:
        if args.url:
            systems = [given_system(args.url, args.served_model, args.extra)]
        else:
            ours = [our_system(name, args.model, args.threads, args.work / "compiled") for name in args.ours]
            programs = {"llama.cpp": args.llama_server, "transformers": args.transformers_python}
            peers, missing = peer_systems(args.peers, args.model, programs, args.work, args.threads)
            systems = [*ours, *peers]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.fresh:
        for name in ("results.jsonl", "requests.jsonl"):
            (args.out / name).unlink(missing_ok=True)
    run = Run(args, systems)
    command = shlex.join(["python", "-m", "bench.serve", *(sys.argv[1:] if arguments is None else arguments)])
    run.log.write({**environment(args), "command": command})
    for name, reason in missing.items():
        run.log.write({"kind": "missing", "system": name, "reason": reason, **provenance()})
        print(f"missing: {name}: {reason}", flush=True)
    try:
        is_whole = run.all()
    except KeyboardInterrupt:
        is_whole = False
    print("all that was asked for is there" if is_whole else "not all is there: the same command goes on from here")
    report.main([str(args.out)])
    if importlib.util.find_spec("matplotlib") is not None:
        from bench.serve import plots

        plots.main([str(args.out)])
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no server is left running
    sys.exit(main())

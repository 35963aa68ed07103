"""Times of whole models: `python -m bench.e2e --out DIR [--minutes 9] [--contexts 128k,8k] [--presets lserve,dense] …`.

Weights and cached pages are random and made on the device, so a decode step at 512K tokens needs no prefill. Parts:

  values    greedy tokens and logits of a real checkpoint in bfloat16 here, compared with float32 on the CPU
  compile   seconds to compile prefill and decode, cold and from JAX's persistent cache
  decode    ms per token, and the time to read weights and cache at this device's copy bandwidth
  prefill   seconds per prompt: of all its chunks ("measured": "whole"), or interpolated between chunks that were timed
            at several history lengths from none to all ("measured": "chunks")
  peer      `transformers` with SDPA and random weights of the same shape, in a separate process

Each result is written at once as one JSON line of DIR/e2e.jsonl. A result that is already there for this device, jax,
code and setting is not measured again, so a run that --minutes ended continues where it stopped. Contexts are measured
in the order given.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from bench.command_line import command_parser
from bench.e2e.models import GPU_MODEL, TINY
from bench.e2e.peer import peer, peer_process
from bench.e2e.run import Run
from lserve_jax.engine.setup import DEFAULT_MODEL

PARTS = ("values", "compile", "decode", "prefill", "peer")
CONTEXTS, TINY_CONTEXTS = "128k,32k,256k,8k,512k,longest", "256,512"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the settings of a run; None for those that depend on the device."""
    parser = command_parser("bench.e2e", __doc__)

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(name) for name in names(text)]

    parser.add_argument("--out", type=Path, required=True, help="folder of e2e.jsonl")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", type=names, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--model", help=f"a name or folder; {GPU_MODEL} on a GPU, {TINY} on a CPU")
    parser.add_argument("--contexts", type=names, help=f"{CONTEXTS}; the first ones first")
    parser.add_argument(
        "--presets", type=names, default=names("lserve,dense,streaming,qserve"), help="PRESET[:KV_DTYPE],…"
    )
    parser.add_argument("--batch", type=numbers, default=[1, 8], help="sequences of a decode step; prefill takes one")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens per prefill call")
    parser.add_argument(
        "--steps", type=int, default=8, help="decode steps per call, a multiple of the selector's interval"
    )
    parser.add_argument("--whole-seconds", type=float, default=15.0, help="longer prompts are measured by chunks")
    parser.add_argument("--values-model", default=DEFAULT_MODEL)
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts {','.join(unknown)}: choose from {','.join(PARTS)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the selected parts; returns 1 if values were wrong."""
    begin, args = time.monotonic(), parse(arguments)
    if args.parts == ["peer"]:
        peer(args)
        return 0
    if "peer" in args.parts:
        peer_process(args)
    # Before the first use of the device: the longest contexts need nearly all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    args.model = args.model or (TINY if jax.default_backend() == "cpu" else GPU_MODEL)
    args.contexts = args.contexts or (TINY_CONTEXTS if args.model == TINY else CONTEXTS).split(",")
    run = Run(args, begin + args.minutes * 60)
    for part in ("values", "compile"):
        if part in args.parts:
            getattr(run, part)()
    run.measure()
    print(run.summary())
    return 0 if run.is_right else 1


if __name__ == "__main__":
    sys.exit(main())

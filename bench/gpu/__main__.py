"""All GPU measurements in one run: `python -m bench.gpu --out bench/results [--minutes 9]`.

Parts, the most useful first: the environment and the device's limits; the values of the kernels (their tests on this
device); times of the ops; times of peers; tuning; whole models (`bench.e2e`). Each part is a separate process with a
time limit, and so has each of its tasks: a crash or a hang costs one task. Results are written at once as JSON lines of
DIR/results.jsonl. A second run with the same DIR does what is not there yet. bench/README.md has more.

The last thing printed, also in DIR/targets.txt, is the table of targets. Other files: log.txt, and the tuned table.
"""

import argparse
import signal
from pathlib import Path
from types import FrameType

from bench.command_line import command_parser
from bench.gpu.parts import PARTS, Run
from bench.gpu.run import describe, run_parts
from bench.gpu.workers import WORKERS
from bench.kernels.tasks import WORKLOAD_SETS


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Runs the selected parts."""
    parser = command_parser("bench.gpu", __doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--workload-set", choices=tuple(WORKLOAD_SETS), default="full")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and its minutes")
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    if args.worker:
        WORKERS[args.worker](out)
        return
    run = Run(out, args.workload_set, args.repeats)
    if args.dry_run:
        describe(run, args.parts, args.minutes)
        return
    signal.signal(signal.SIGTERM, _stop)
    run_parts(run, args.parts, args.minutes)


if __name__ == "__main__":
    main()
